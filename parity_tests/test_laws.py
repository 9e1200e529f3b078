"""What the layers' own tests cannot show: attention as a whole, dropout, and what is for training alone."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import nnx

import hylorada_jax
import hylorada_jax.nnx
import hylorada_torch
from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.math import position as jax_position
from hylorada_jax.math.attention import DAA, attention
from hylorada_jax.math.pattern import Pattern
from hylorada_jax.models.families.family import Mixture
from hylorada_jax.models.mixture import MixtureBlock
from hylorada_jax.surgery.intercept import adapt
from hylorada_jax.surgery.layout import flatten
from hylorada_jax.surgery.plan import DROPOUT_RATE
from hylorada_torch import position as torch_position
from hylorada_torch.attention import attend
from parity_tests.families import measuring
from parity_tests.layers import LAYERS, Draw
from parity_tests.measure import errors, precision
from parity_tests.models import CONFIGS, build, torch_results
from parity_tests.tolerances import LAYER, MODEL, relative_error


@pytest.mark.parametrize("soft_cap", [None, 1.5])
@pytest.mark.parametrize("implementation", ["dense", "blockwise"])  # of those for any device
def test_attention_hides_what_is_masked_whatever_daa_does(implementation, soft_cap):
    """An α below zero would turn a masked logit into the largest one, were the mask there before it."""
    rng = np.random.default_rng(0)
    leaves = {
        "query": rng.normal(size=(2, 6, 4, 3)),
        "key": rng.normal(size=(2, 6, 2, 3)),
        "value": rng.normal(size=(2, 6, 2, 3)),
        "alpha": np.array([-1.5, 0.5, 2.0, -0.1]),
        "beta": rng.normal(size=4),
        "position_bias": 3 * rng.normal(size=(64, 4)),
    }
    valid = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 1, 0]], bool)
    positions = np.array([[0, 1, 2, 3, 4, 5], [0, 1, 2, 40, 41, 900]])
    cotangent = rng.normal(size=(2, 6, 4, 3))

    daa = hylorada_torch.PositionalDAA(4, dtype=torch.float64)
    daa.load_state_dict({name: torch.tensor(leaves[name]) for name in DAA._fields})
    tensors = {name: torch.tensor(leaves[name], requires_grad=True) for name in ("query", "key", "value")}
    tensors |= dict(daa.named_parameters())
    query, key, value = (tensors[name].transpose(1, 2) for name in ("query", "key", "value"))
    visible = torch.tensor(np.tril(np.ones((6, 6), bool)) & valid[:, None, None])
    at = torch.tensor(positions)
    y = attend(query, key, value, visible, daa=daa, positions=(at, at), soft_cap=soft_cap).transpose(1, 2)
    gradients = torch.autograd.grad(y, list(tensors.values()), torch.tensor(cotangent))

    @jax.jit
    def run(leaves, valid, positions):
        def attended(leaves):
            query, key, value, *of_daa = (leaves[name] for name in tensors)
            pattern = Pattern.of_rows(positions, key_valid=valid)
            options = {"soft_cap": soft_cap, "implementation": implementation}
            return attention(query, key, value, pattern, daa=DAA(*of_daa), **options)

        y, pull_back = jax.vjp(attended, leaves)
        return y, pull_back(cotangent)[0]

    with precision("float64"):
        got, got_gradients = run(leaves, valid, positions)
    assert relative_error(got, y.detach()) <= LAYER["float64"]
    largest = max(gradient.abs().max().item() for gradient in gradients)
    for name, gradient in zip(tensors, gradients, strict=True):
        # As a part of the largest of all: β's is zero, for the softmax does not see it.
        difference = np.abs(np.asarray(got_gradients[name]) - gradient.numpy()).max()
        assert difference <= LAYER["float64"] * largest, name


# Dropout: with A, B, down and up the identity the update shows its mask. RATE makes 1/(1 − RATE) exact.

SIZE, RATE = 32, 0.5
X = np.random.default_rng(1).uniform(1, 2, (1, 4, SIZE)).astype(np.float32)
BASE = np.ones_like(X)
EYE = np.eye(SIZE, dtype=np.float32)
LORA = {"lora_A": EYE, "lora_B": EYE}
SPARSE = {"down": EYE, "up": EYE, "gate_scores": np.zeros(SIZE, np.float32)}
RNGS = {"dropout": jax.random.key(0)}


def jax_linear():
    layer = hylorada_jax.LoRALinear(SIZE, SIZE, rank=SIZE, alpha=SIZE, dropout=RATE)
    return layer.apply({"params": LORA}, X, BASE, 0 * EYE, deterministic=False, rngs=RNGS) - BASE


def jax_sparse():
    layer = hylorada_jax.SparseAdapter(SIZE, topk_ratio=1.0, dropout=RATE)
    return layer.apply({"params": SPARSE}, X, deterministic=False, rngs=RNGS) - X


def attached(config, resolved):
    """The output of a layer x ↦ x with what is attached to it, less its output without."""
    resolved = jax.tree.map(jnp.asarray, resolved)
    variables = {"params": {"kernel": EYE}, "hylorada": resolved}
    with adapt(resolved, config, train=True):
        return nn.Dense(SIZE, use_bias=False).apply(variables, X, rngs=RNGS) - X


def attached_linear():
    return attached(HyLoRADAConfig(method="lora"), {"lora_A": EYE, "scaled_B": EYE, DROPOUT_RATE: RATE})


def attached_sparse():
    config = HyLoRADAConfig(method="sparse", sparse_dropout=RATE)
    return attached(config, {"down": EYE, "up": EYE, "mask": np.ones(SIZE, np.float32)})


def attached_expert():
    """The one expert of a mixture, x ↦ x, of which up is adapted."""
    block = MixtureBlock(Mixture(experts=1, chosen=1, width=SIZE), lambda gate, up: up)
    kernels = {name: {"kernel": EYE[None]} for name in ("gate_proj", "up_proj", "down_proj")}
    leaves = {"lora_A": EYE[None], "scaled_B": EYE[None]}
    resolved = {"experts": {"up_proj": leaves}, DROPOUT_RATE: RATE}
    resolved = jax.tree.map(jnp.asarray, resolved)
    variables = {"params": {"gate": {"kernel": EYE[:, :1]}, "experts": kernels}, "hylorada": resolved}
    with adapt(resolved, HyLoRADAConfig(method="lora"), train=True):
        return block.apply(variables, jnp.asarray(X), rngs=RNGS) - X


def nnx_linear():
    layer = hylorada_jax.nnx.LoRALinear(SIZE, SIZE, SIZE, SIZE, RATE, rngs=nnx.Rngs(0))
    return with_values(layer, LORA)(X, BASE, 0 * EYE, deterministic=False) - BASE


def nnx_sparse():
    layer = hylorada_jax.nnx.SparseAdapter(SIZE, SIZE, topk_ratio=1.0, dropout=RATE, rngs=nnx.Rngs(0))
    return with_values(layer, SPARSE)(X, deterministic=False) - X


def nnx_attached_sparse():
    model = nnx.Dict(mlp=nnx.Dict(down_proj=nnx.Linear(SIZE, SIZE, use_bias=False, rngs=nnx.Rngs(0))))
    config = HyLoRADAConfig(
        method="sparse", sparse_adapter_dim=SIZE, sparse_topk_ratio=1.0, sparse_dropout=RATE
    )
    layer = hylorada_jax.nnx.adapt(model, config, nnx.Rngs(0)).mlp.down_proj
    return with_values(layer, SPARSE | {"kernel": EYE})(X) - X


def with_values(module, values):
    for name, value in values.items():
        getattr(module, name)[...] = jnp.asarray(value)
    return module


def torch_linear():
    layer = hylorada_torch.LoRALinear(SIZE, SIZE, rank=SIZE, alpha=SIZE, dropout=RATE)
    return in_training(layer, LORA)(*map(torch.tensor, (X, BASE, 0 * EYE))).numpy() - BASE


def torch_sparse():
    layer = hylorada_torch.SparseAdapter(SIZE, SIZE, topk_ratio=1.0, dropout=RATE)
    return in_training(layer, SPARSE)(torch.tensor(X)).numpy() - X


def in_training(layer, leaves):
    layer.load_state_dict({name: torch.tensor(value) for name, value in leaves.items()})
    return layer.train().requires_grad_(False)


@pytest.mark.parametrize(
    ("update", "kept"),
    [
        *((update, X) for update in (jax_linear, attached_linear, attached_expert, nnx_linear, torch_linear)),
        *(
            (update, F.gelu(torch.tensor(X)).numpy())
            for update in (jax_sparse, attached_sparse, nnx_sparse, nnx_attached_sparse, torch_sparse)
        ),
    ],
)
def test_dropout_drops_from_the_update_alone_and_keeps_its_mean(update, kept):
    got = np.asarray(update())
    # To float32's rounding of sums of order 1; what is not dropped is at least 1.6.
    of_zero, of_kept = (np.isclose(got, value, rtol=0, atol=1e-5) for value in (0, kept / (1 - RATE)))
    assert np.all(of_zero ^ of_kept)
    # A half of 128, within five standard deviations.
    assert abs(of_kept.mean() - (1 - RATE)) <= 5 * 0.5 / 128**0.5


def linen_gates(**gates):
    layer = hylorada_jax.HyLoRADALinear(3, 4, rank=2, **gates)
    return layer.init(jax.random.key(0), X[..., :3], X[..., :4], np.ones((4, 3)))["params"]


def nnx_gates(**gates):
    return vars(hylorada_jax.nnx.HyLoRADALinear(3, 4, rank=2, rngs=nnx.Rngs(0), **gates))


def torch_gates(**gates):
    return dict(hylorada_torch.HyLoRADALinear(3, 4, rank=2, **gates).named_parameters())


def attached_gates(**gates):
    config = HyLoRADAConfig(method="hylorada_v1", **gates)
    model = build("llama", config, "float32").model
    return {name.rpartition(".")[2]: leaf for name, leaf in flatten(model.sites, model.adapters).items()}


@pytest.mark.parametrize("leaves", [linen_gates, nnx_gates, torch_gates, attached_gates])
def test_gates_start_where_the_settings_say(leaves):
    found = leaves(gate_init=0.25, residual_init=-0.75)
    for name, start in (("magnitude_gate", 0.25), ("residual_weight", -0.75)):
        assert np.all(np.asarray(found[name][...].tolist()) == start)


@pytest.mark.parametrize("name", ["DoRALinear", "HyLoRADALinear", "HyLoRADAv2Linear", "HyLoRADAUnified"])
def test_the_norm_is_detached_by_default_as_method_md_says(name):
    made = (
        getattr(hylorada_jax, name)(3, 4),
        getattr(hylorada_jax.nnx, name)(3, 4, rngs=nnx.Rngs(0)),
        getattr(hylorada_torch, name)(3, 4),
    )
    # Section 1; for DoRA as its paper and PEFT.
    assert [layer.detach_norm for layer in made] == [name == "DoRALinear"] * 3


def test_the_nudge_of_the_structure_buckets():
    """Up to 200 buckets the 1e-6 in their logarithm decides at 163 and 188 alone, one distance each."""
    offsets = np.array([-505, 504, 505])
    expected = torch_position.structure_buckets(offsets, 163)
    got = jax_position.structure_buckets(163)[offsets + jax_position.MAX_DISTANCE - 1]
    np.testing.assert_array_equal(got, expected)
    assert expected[2] == expected[1] + 1


def test_frequencies_and_periods_below_zero():
    """Only their absolute values count. No layer is drawn with such periods, which start at 24 and more."""
    case = LAYERS["temporal_encoder"].case(Draw())
    for leaf in ("freq_scale", "periods"):
        case.leaves[leaf] = -np.abs(case.leaves[leaf])
    found = errors(case, "float64")
    assert max(found.values()) <= LAYER["float64"], found


def test_shifted_groups_are_for_training_alone():
    with measuring("float64"):
        pair = build("qwen2", CONFIGS["longlora"], "float64")
        inputs: Any = {name: value for name, value in pair.inputs.items() if name != "labels"}
        run = jax.jit(
            lambda *trees, train: pair.model.apply(*trees, train=train, **inputs).logits,
            static_argnames="train",
        )
        in_evaluation, in_training = (run(pair.adapters, train=train) for train in (False, True))
    expected = torch_results(pair.reference.eval(), pair.inputs, pair.reference.adapters())["logits"]
    scored = pair.inputs["labels"] >= 0
    assert relative_error(np.asarray(in_evaluation)[scored], expected) <= MODEL["float64"]
    assert relative_error(np.asarray(in_training)[scored], expected) > 1e-3
