"""Oracle: the base model by itself."""

import jax
import pytest

from benchmarks.trainables import Adapted, Full
from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.evaluation.compare import compare_models
from hylorada_jax.evaluation.perplexity_test import SEQ_LEN, base, documents  # noqa: F401 - a fixture


def test_before_training_every_trainable_is_scored_as_its_base(base):  # noqa: F811
    adapted = Adapted(base, HyLoRADAConfig(method="lora", lora_rank=2)).model
    models = {"base": base, "full": Full(base), "adapted": adapted}
    found = compare_models(models, documents(), seq_len=SEQ_LEN, batch_size=2, progress=False)
    losses = {name: measures.perplexity.loss for name, measures in found.items()}
    assert losses == pytest.approx(dict.fromkeys(models, losses["base"]), rel=1e-6)  # float32
    sizes = 0, sum(leaf.size for leaf in jax.tree.leaves(base.params)), adapted.num_trainable
    assert tuple(measures.parameters for measures in found.values()) == sizes
