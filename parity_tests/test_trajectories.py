"""Training in JAX against the reference: 20 AdamW steps with LoRA+ on the same text, in float64."""

import dataclasses
import functools
import itertools

import numpy as np
import pytest

from hylorada_jax.config import METHODS
from hylorada_jax.data.corpus import load_documents
from hylorada_jax.surgery import layout
from hylorada_jax.training.config import TrainingConfig
from parity_tests.families import VOCAB, measuring
from parity_tests.models import CONFIGS, build
from parity_tests.tolerances import TRAJECTORY
from parity_tests.trajectories import train_jax, train_torch

# Rates that move the adapters far in 20 steps, a gradient norm that clips some steps and not others.
TRAINING = TrainingConfig(
    output="unused", steps=20, learning_rate=5e-3, warmup_ratio=0.1, weight_decay=0.1, max_grad_norm=0.5
)
# Every method once, the last with all that is on.
CASES = [
    ("gpt2", "lora, rslora, its own targets"),
    ("gpt2", "dora"),
    ("llama", "lorada"),
    ("qwen2", "longlora"),
    ("llama", "sparse"),
    ("qwen2", "hylorada_v1, ranks by depth"),
    ("gpt2", "hylorada_v2"),
    ("qwen2", "hylorada"),
]
FULLEST = ("gpt2", "hylorada_v2")


def test_every_method_is_trained():
    assert {CONFIGS[name].method for _, name in CASES} == set(METHODS)


@pytest.mark.parametrize(
    ("family", "name"),
    [pytest.param(*case, marks=() if case == FULLEST else pytest.mark.apart) for case in CASES],
)
def test_twenty_steps(family, name):
    config = dataclasses.replace(CONFIGS[name], lora_plus_enabled=True)
    batches = [batch | structure_of(config) for batch in text_batches()]
    with measuring("float64"):
        pair = build(family, config, "float64", spread=0.0)
        start = layout.flatten(pair.model.sites, pair.adapters)
        expected_losses, expected = train_torch(pair, TRAINING, batches)
        losses, got = train_jax(pair, TRAINING, batches)
    assert sum(expected_losses[-2:]) < sum(expected_losses[:2])
    # DAA's β has no gradient: the softmax does not see it.
    moved = {name: np.abs(expected[name] - start[name]).max() for name in start if not name.endswith(".beta")}
    assert min(moved.values()) > 1000 * TRAJECTORY, moved
    np.testing.assert_allclose(losses, expected_losses, rtol=0, atol=TRAJECTORY)
    assert set(got) == set(expected)
    errors = {name: np.abs(got[name] - expected[name]).max() for name in expected}
    assert max(errors.values()) <= TRAJECTORY, errors


@functools.cache
def text_batches():
    """Twenty batches of two rows of characters: two in turn, learnt by heart, so that the loss must fall."""
    text = (
        character for document in load_documents("python-stdlib", form="text") for character in document.text
    )
    codes = np.array([ord(character) for character in itertools.islice(text, 2 * 2 * 13)], np.int32)
    assert codes.max() < VOCAB
    rows = codes.reshape(2, 2, 13)
    return [{"input_ids": batch[:, :-1], "labels": batch[:, 1:]} for batch in rows] * 10


def structure_of(config):
    """What the method reads beside the tokens."""
    return (
        {"structure_ids": np.arange(24, dtype=np.int32).reshape(2, 12) % 7} if config.use_hylorada_v2 else {}
    )
