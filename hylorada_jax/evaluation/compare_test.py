"""Oracle: the measures of each model on its own."""

import copy
from typing import Any

import jax
import numpy as np
import pytest

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.data.document import TokenizedDocument
from hylorada_jax.errors import ConfigError
from hylorada_jax.evaluation.compare import compare_models
from hylorada_jax.evaluation.lost_in_the_middle import evaluate_lost_in_the_middle
from hylorada_jax.evaluation.perplexity import evaluate_perplexity
from hylorada_jax.evaluation.perplexity_test import SEQ_LEN, documents
from hylorada_jax.evaluation.sweep import loss_sweep
from hylorada_jax.model import HyLoRADAModel


def test_each_model_is_measured_as_on_its_own_and_reads_what_it_can(base):
    models: dict[str, Any] = {"base": base}
    for method in ("lora", "hylorada_v2"):
        model = HyLoRADAModel(base, HyLoRADAConfig(method=method, lora_rank=2, structure_dim=8))
        models[method] = model
        rng = np.random.default_rng(1)
        model.adapters = jax.tree.map(
            lambda x, rng=rng: x + rng.normal(0, 0.5, x.shape).astype(x.dtype), model.adapters
        )
    texts = documents()
    options: dict[str, Any] = {"seq_len": SEQ_LEN, "batch_size": 2, "progress": False}
    structured = [TokenizedDocument(tokens, structure_ids=tokens % 7) for tokens in texts]
    found = compare_models(models, structured, **options)
    untold = compare_models(models, texts, **options)
    assert list(found) == list(models)
    for name, model in models.items():
        read = structured if name == "hylorada_v2" else texts
        perplexity = evaluate_perplexity(model, read, **options)
        by_place = evaluate_lost_in_the_middle(model, read, **options)
        assert found[name].parameters == (0 if name == "base" else model.num_trainable)
        assert found[name].perplexity == perplexity
        np.testing.assert_array_equal(found[name].by_place.losses, by_place.losses)
        assert (found[name].perplexity == untold[name].perplexity) is (read is texts)
    assert len({measures.perplexity.loss for measures in found.values()}) == 3
    with pytest.raises(ConfigError, match="base, lora"):
        compare_models({name: models[name] for name in ("base", "lora")}, structured)


def test_models_that_pack_and_that_cannot_are_measured_on_the_same_tokens(base):
    texts = documents()
    options: dict[str, Any] = {"seq_len": SEQ_LEN, "batch_size": 2, "max_tokens": 2 * SEQ_LEN}
    unable = copy.copy(base)
    object.__setattr__(unable, "supports_segments", False)
    found = compare_models({"base": base, "unable": unable}, texts, **options, progress=False)
    assert found["base"].perplexity == found["unable"].perplexity
    alone = evaluate_perplexity(base, texts, **options, packing=False, progress=False)
    assert found["base"].perplexity == alone != evaluate_perplexity(base, texts, **options, progress=False)


def test_measures_of_one_model_share_what_is_compiled(base):
    sweep = loss_sweep(base)
    evaluate_perplexity(sweep, documents(), seq_len=SEQ_LEN, batch_size=2, progress=False)
    evaluate_lost_in_the_middle(sweep, documents(), seq_len=SEQ_LEN, batch_size=2, progress=False)
    assert sweep._run._cache_size() == 1  # type: ignore[attr-defined]
