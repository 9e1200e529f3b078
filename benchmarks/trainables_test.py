"""Oracle: the base model by itself."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.trainables import Adapted, Full
from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.evaluation.compare import compare_models
from hylorada_jax.evaluation.perplexity_test import SEQ_LEN, documents
from hylorada_jax.training.config import TrainingConfig


def test_before_training_every_trainable_is_scored_as_its_base(base):
    adapted = Adapted(base, HyLoRADAConfig(method="lora", lora_rank=2)).model
    models = {"base": base, "full": Full(base), "adapted": adapted}
    found = compare_models(models, documents(), seq_len=SEQ_LEN, batch_size=2, progress=False)
    losses = {name: measures.perplexity.loss for name, measures in found.items()}
    assert losses == pytest.approx(dict.fromkeys(models, losses["base"]), rel=1e-6)  # float32
    sizes = 0, sum(leaf.size for leaf in jax.tree.leaves(base.params)), adapted.num_trainable
    assert tuple(measures.parameters for measures in found.values()) == sizes


@pytest.mark.parametrize("kind", ["full", "adapted"])
def test_what_a_step_is_given_as_numbers_is_not_compiled_into_it(base, kind):
    """A benchmark's runs that differ in these alone share the first one's program."""
    trained = Full(base) if kind == "full" else Adapted(base, HyLoRADAConfig(method="lora", lora_rank=2))
    params = trained.start(0)
    config = TrainingConfig(output="runs", steps=4, warmup_steps=0, learning_rate=1e-3, weight_decay=0.0)
    other = dataclasses.replace(config, learning_rate=1e-2, weight_decay=0.5)
    first, second = (trained.optimizer(params, each) for each in (config, other))
    gradients = jax.tree.map(jnp.ones_like, params)
    updates = [each.update(gradients, second.init(params), params)[0] for each in (first, second)]
    jax.tree.map(np.testing.assert_array_equal, *updates)
    decayed = jax.tree.map(lambda leaf: jnp.abs(leaf).max(), updates[1])
    assert max(jax.tree.leaves(decayed)) > 1e-2  # more than Adam's own update, of one rate
