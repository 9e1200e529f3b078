"""The measures in JAX against the reference's, and against the loss that transformers computes itself."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

import hylorada_torch
from hylorada_jax.errors import ConfigError
from hylorada_jax.evaluation.lost_in_the_middle import evaluate_lost_in_the_middle
from hylorada_jax.evaluation.perplexity import evaluate_perplexity
from hylorada_torch.evaluation import evaluate_lost_in_the_middle as torch_lost_in_the_middle
from hylorada_torch.evaluation import evaluate_perplexity as torch_perplexity
from parity_tests.families import VOCAB, all_in_float64, measuring, torch_base
from parity_tests.models import CONFIGS, build

DOCUMENTS = [np.random.default_rng(n).integers(VOCAB, size=n) for n in (45, 12, 30)]
SEQ_LEN = 23  # of which neither the tenths nor the thirds are equal


def test_both_packages_measure_the_same():
    with measuring("float64"):
        pair = build("gpt2", dataclasses.replace(CONFIGS["hylorada_v1"], lora_dropout=0.5), "float64")
        pair.model.adapters = pair.adapters
        reference = pair.reference.train()  # measured without dropout all the same
        with all_in_float64():
            expected = torch_perplexity(reference, DOCUMENTS, seq_len=SEQ_LEN, stride=7)
            lost = torch_lost_in_the_middle(reference, DOCUMENTS, seq_len=SEQ_LEN)
        options: dict[str, Any] = {"seq_len": SEQ_LEN, "batch_size": 2, "progress": False}
        assert evaluate_perplexity(pair.model, DOCUMENTS, stride=7, **options).perplexity == pytest.approx(
            expected, rel=1e-10
        )
        found = evaluate_lost_in_the_middle(pair.model, DOCUMENTS, **options)
    np.testing.assert_allclose(found.buckets, lost.buckets, rtol=1e-10)
    thirds = (found.perplexity, found.middle, found.ends)
    assert thirds == pytest.approx((lost.perplexity, lost.middle, lost.ends), rel=1e-10)
    assert reference.training


def test_the_perplexity_of_a_window_is_transformers_own_loss():
    with all_in_float64(), torch.no_grad():
        model = torch_base("llama", "float64")
        ids = torch.tensor(DOCUMENTS[2])[None]
        loss = model(input_ids=ids, labels=ids).loss
        measured = torch_perplexity(model, DOCUMENTS[2:], seq_len=len(DOCUMENTS[2]))
    assert measured == pytest.approx(float(loss.exp()), rel=1e-12)
    assert hylorada_torch.evaluate_perplexity is torch_perplexity


@pytest.mark.parametrize("stride", [0, SEQ_LEN + 1])
def test_the_reference_refuses_windows_that_skip_tokens(stride):
    with pytest.raises(ConfigError, match="stride"):
        torch_perplexity(None, DOCUMENTS, seq_len=SEQ_LEN, stride=stride)


@pytest.mark.parametrize("seq_len", [0, 9])
def test_both_packages_refuse_sequences_of_fewer_tokens_than_tenths(seq_len):
    # Whatever the documents are: before these and the model are looked at.
    for measure in (evaluate_lost_in_the_middle, torch_lost_in_the_middle):
        for documents in (DOCUMENTS, []):
            with pytest.raises(ConfigError, match=f"seq_len.{seq_len}"):
                measure(None, documents, seq_len=seq_len)
