"""Oracles: the table of method.md section 7, transformers' schedule, AdamW's first step in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import ConfigError
from hylorada_jax.training.config import TrainingConfig
from hylorada_jax.training.optimizer import (
    GROUPS,
    label_tree,
    make_optimizer,
    peak_rates,
    reported_rate,
    schedule,
)

LINEAR_LEAVES = [
    "lora_A", "lora_B", "magnitude", "magnitude_gate", "residual_weight", "position_scale",
    "scale_from_structure",
]  # fmt: skip
TREE = {
    "layer": {
        "q_proj": dict.fromkeys(LINEAR_LEAVES, 0.0),
        "attention": {"alpha": 0.0, "beta": 0.0, "position_bias": 0.0},
        "mlp": {"down": 0.0, "up": 0.0, "gate_scores": 0.0},
        "norm": {"scale": 0.0, "bias": 0.0},
    },
    "embed_tokens": {"embedding": 0.0},
    "position_bias": 0.0,
    "structure_encoder": {"proj_weight": 0.0},
}
# path -> (peak rate at lr = 3e-4 with ratio 16, decays): method.md's table, row by row.
TABLE = {
    "layer/q_proj/lora_A": (3e-4, True),
    "layer/q_proj/lora_B": (48e-4, True),
    "layer/q_proj/magnitude": (3e-4, False),
    "layer/q_proj/magnitude_gate": (3e-4, False),
    "layer/q_proj/residual_weight": (3e-4, False),
    "layer/q_proj/position_scale": (3e-4, False),
    "layer/q_proj/scale_from_structure": (3e-4, False),
    "position_bias": (3e-4, False),
    "structure_encoder/proj_weight": (3e-4, False),
    "layer/attention/alpha": (1e-3, False),
    "layer/attention/beta": (1e-3, False),
    "layer/attention/position_bias": (1e-3, False),
    "layer/mlp/down": (2e-4, True),
    "layer/mlp/up": (2e-4, True),
    "layer/mlp/gate_scores": (2e-4, False),
    "embed_tokens/embedding": (3e-4, True),
    "layer/norm/scale": (3e-4, False),
    "layer/norm/bias": (3e-4, False),
}
TRAINING = TrainingConfig(
    output="run", steps=10, learning_rate=3e-4, warmup_ratio=0.0, weight_decay=0.1, max_grad_norm=1e9
)
LORA_PLUS = HyLoRADAConfig(lora_plus_enabled=True, lora_plus_ratio=16.0)


def by_path(tree):
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(key.key for key in path): leaf for path, leaf in leaves}


def test_every_leaf_has_the_rate_and_decay_of_the_table():
    labels, rates = by_path(label_tree(TREE)), peak_rates(TRAINING, LORA_PLUS)
    assert {path: GROUPS[label].decays for path, label in labels.items()} == {
        p: row[1] for p, row in TABLE.items()
    }
    found = {path: rates[label] for path, label in labels.items()}
    assert found == pytest.approx({path: row[0] for path, row in TABLE.items()})


def test_without_lora_plus_both_factors_share_a_rate():
    rates = peak_rates(TRAINING, HyLoRADAConfig(lora_plus_ratio=16.0))
    assert rates["lora_B"] == rates["lora_A"] == 3e-4


def test_the_rate_that_is_reported_is_one_that_a_leaf_has():
    mlp = {"mlp": {"down": 0.0, "gate_scores": 0.0}}
    assert reported_rate(TREE, TRAINING, LORA_PLUS) == 3e-4
    assert reported_rate(mlp, TRAINING, LORA_PLUS) == 2e-4
    assert reported_rate(mlp | {"daa": {"alpha": 0.0}}, TRAINING, LORA_PLUS) == 1e-3


def test_first_update_is_adamws_closed_form_in_every_group():
    # m/√v of the first step is sign(g) up to ε/|g|, so the update is −rate·(sign(g) + decay·p).
    params = jax.tree.map(lambda _: jnp.full((2,), 0.5), TREE)
    gradients = jax.tree.map(lambda _: jnp.array([0.3, -0.7]), TREE)
    optimizer = make_optimizer(params, TRAINING, LORA_PLUS)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    for path, update in by_path(updates).items():
        rate, decays = TABLE[path]
        expected = -rate * (np.array([1.0, -1.0]) + 0.1 * 0.5 * decays)
        # float32: half a dozen roundings in Adam's quotient.
        np.testing.assert_allclose(update, expected, rtol=1e-5, err_msg=path)


def test_the_gradient_is_clipped_over_all_groups_together():
    # Adam's step hardly shows the gradient's length, so look at the first moment, 0.1·g after one step.
    params = {"lora_A": jnp.zeros(2), "magnitude": jnp.zeros(1)}
    gradients = {"lora_A": jnp.array([3.0, 0.0]), "magnitude": jnp.array([4.0])}
    training = TrainingConfig(output="run", steps=10, max_grad_norm=1.0)
    optimizer = make_optimizer(params, training, LORA_PLUS)
    _, state = optimizer.update(gradients, optimizer.init(params), params)
    moments = optax.tree_utils.tree_get_all_with_path(state, "mu")
    found = np.concatenate([leaf for _, tree in moments for leaf in jax.tree.leaves(tree)])
    # The norm is 5 over both groups, so g/5 = (0.6, 0, 0.8).
    np.testing.assert_allclose(np.sort(found), [0, 0.06, 0.08], rtol=1e-6)


@pytest.mark.parametrize("warmup", [0, 5, 20])
@pytest.mark.parametrize("shape", ["linear", "cosine", "constant"])
def test_schedule_equals_transformers(shape, warmup):
    torch = pytest.importorskip("torch")
    from transformers import get_scheduler

    training = TrainingConfig(output="run", steps=20, schedule=shape, warmup_ratio=warmup / 20)
    assert training.rising_steps == warmup
    inner = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    name = {"constant": "constant_with_warmup"}.get(shape, shape)
    theirs = get_scheduler(name, inner, warmup, 20)
    factor = schedule(training)
    for step in range(20):
        with jax.enable_x64(True):
            assert float(factor(jnp.int32(step))) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12), step
        inner.step()
        theirs.step()


def test_a_leaf_without_a_group_is_named():
    with pytest.raises(ConfigError, match="layer/q_proj/lora_C"):
        label_tree({"layer": {"q_proj": {"lora_C": 0.0}}})
