"""Both optimizers against torch's AdamW, clipping and scheduler, with the groups of method.md §7."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import traverse_util
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.lr_scheduler import LambdaLR

import hylorada_torch
from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.surgery.layout import tensor_name
from hylorada_jax.training.config import TrainingConfig
from hylorada_jax.training.optimizer import GROUPS, label_tree, make_optimizer, schedule
from hylorada_torch.optimizer import schedule as reference_schedule
from parity_tests.measure import precision
from parity_tests.tolerances import STEP

STEPS, LR, RATIO, DECAY, MAX_NORM = 20, 3e-4, 16.0, 0.1, 1.0

# The table of method.md §7, row by row: peak rate, weight decay, and a leaf of every name.
TABLE: list[tuple[float, float, dict[str, tuple[int, ...]]]] = [
    (LR, DECAY, {"q_proj.lora_A": (2, 3)}),
    (LR * RATIO, DECAY, {"q_proj.lora_B": (4, 2)}),
    (LR, 0.0, {"q_proj.magnitude": (4,)}),
    (LR, 0.0, {f"q_proj.{leaf}": () for leaf in ("magnitude_gate", "residual_weight", "position_scale")}),
    (LR, 0.0, {"q_proj.scale_from_structure": (3,), "position_bias": (8,), "structure_encoder.gate": ()}),
    (1e-3, 0.0, {f"self_attn.{leaf}": (2,) for leaf in ("alpha", "beta", "position_bias")}),
    (2e-4, DECAY, {"mlp.down": (2, 3), "mlp.up": (3, 2)}),
    (2e-4, 0.0, {"mlp.gate_scores": (2,)}),
    (LR, DECAY, {"embed_tokens.embedding": (5, 3)}),
    (LR, 0.0, {"norm.scale": (3,), "norm.bias": (3,)}),
]
SHAPES = {name: shape for *_, leaves in TABLE for name, shape in leaves.items()}
PEAK = {name: rate for rate, _, leaves in TABLE for name in leaves}
CONFIG = HyLoRADAConfig(lora_plus_enabled=True, lora_plus_ratio=RATIO)


def settings_of(warmup, shape="linear"):
    return TrainingConfig(
        output="unused",
        steps=STEPS,
        schedule=shape,
        learning_rate=LR,
        warmup_ratio=warmup / STEPS,
        weight_decay=DECAY,
        max_grad_norm=MAX_NORM,
    )


def tree_of(leaves):
    return traverse_util.unflatten_dict(leaves, sep=".")


def test_the_tree_has_every_group():
    assert set(jax.tree.leaves(label_tree(tree_of(PEAK)))) == set(GROUPS)


# The size of a step's gradients as a power of ten, None for zero; mostly about where they are clipped.
def sizes(largest):
    size = st.none() | st.integers(-3, 3) | st.integers(-3, 3) | st.integers(-largest, largest)
    return st.lists(size, min_size=STEPS, max_size=STEPS)


@pytest.mark.parametrize("warmup", [0, 5])
@settings(max_examples=10)
@given(seed=st.integers(0, 2**32 - 1), sizes=sizes(150))
def test_float64(warmup, seed, sizes):
    params, gradients = draw(seed, sizes, "float64")
    expected = by_torch(params, gradients, warmup)
    with precision("float64"):
        check(by_jax(warmup, "float64")(params, gradients), expected, "float64")
    check(by_reference(params, gradients, warmup), expected, "float64")


@settings(max_examples=10)
@given(seed=st.integers(0, 2**32 - 1), sizes=sizes(15))
def test_float32(seed, sizes):
    params, gradients = draw(seed, sizes, "float32")
    with precision("float32"):
        got = by_jax(5, "float32")(params, gradients)
    assert {str(step.dtype) for step in got.values()} == {"float32"}
    check(got, by_torch(params, gradients, 5), "float32")


def draw(seed, sizes, dtype):
    """(parameters of order 1, the steps' gradients) by name; some leaves' gradients are far smaller."""
    rng = np.random.default_rng(seed)
    params = {name: rng.normal(size=shape).astype(dtype) for name, shape in SHAPES.items()}
    scale = np.array([0.0 if size is None else 10.0**size for size in sizes])
    gradients = {}
    for name, shape in SHAPES.items():
        own = scale * rng.choice([1.0, 1.0, 1e-5, 0.0], STEPS)
        gradients[name] = (own.reshape(-1, *[1] * len(shape)) * rng.normal(size=(STEPS, *shape))).astype(
            dtype
        )
    return params, gradients


@functools.cache
def by_jax(warmup, dtype):
    """(parameters, gradients) → every step, by name; compiled once."""
    optimizer = make_optimizer(tree_of(PEAK), settings_of(warmup), CONFIG)

    @jax.jit
    def run(params, gradients):
        def step(carry, gradient):
            params, state = carry
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), updates

        return jax.lax.scan(step, (params, optimizer.init(params)), gradients)[1]

    def steps(params, gradients):
        taken = run(
            *jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), (tree_of(params), tree_of(gradients)))
        )
        return traverse_util.flatten_dict(taken, sep=".")

    return steps


def by_reference(params, gradients, warmup):
    named = {name: tensor_name(*name.rpartition(".")[::2]) for name in SHAPES}
    leaves = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in params.items()}
    adapters = {named[name]: leaf for name, leaf in leaves.items()}
    optimizer, scheduler = hylorada_torch.make_optimizer(adapters, settings_of(warmup), CONFIG)

    def clip():
        hylorada_torch.clip_by_global_norm(leaves.values(), MAX_NORM)

    return steps_in_torch(leaves, gradients, clip, optimizer, scheduler)


def by_torch(params, gradients, warmup):
    """In float64, whatever the numbers' dtype."""
    leaves = {name: torch.nn.Parameter(torch.tensor(value).double()) for name, value in params.items()}
    groups = [
        {"params": [leaves[name] for name in row], "lr": rate, "weight_decay": decay}
        for rate, decay, row in TABLE
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)

    def factor(step):
        """Linear warm-up, then linear decay to 0."""
        return step / warmup if step < warmup else (STEPS - step) / (STEPS - warmup)

    def clip():
        gradient = torch.cat([leaf.grad.flatten() for leaf in leaves.values() if leaf.grad is not None])
        norm = gradient.norm().item()
        # torch divides by the norm plus 1e-6, which no paper does: the bound is raised by as much.
        bound = MAX_NORM * (1 + 1e-6 / norm) if norm else MAX_NORM
        torch.nn.utils.clip_grad_norm_(leaves.values(), bound)

    return steps_in_torch(leaves, gradients, clip, optimizer, LambdaLR(optimizer, factor))


def steps_in_torch(leaves, gradients, clip, optimizer, scheduler):
    """Every step, by name."""
    steps: dict[str, list[np.ndarray]] = {name: [] for name in leaves}
    for number in range(STEPS):
        before = {name: leaf.detach().clone() for name, leaf in leaves.items()}
        for name, leaf in leaves.items():
            leaf.grad = torch.tensor(gradients[name][number], dtype=leaf.dtype)
        clip()
        optimizer.step()
        scheduler.step()
        for name, leaf in leaves.items():
            steps[name].append((leaf.detach() - before[name]).numpy())
    return {name: np.stack(taken) for name, taken in steps.items()}


def check(got, expected, dtype):
    assert set(got) == set(expected)
    errors = {name: np.abs(got[name] - expected[name]).max() / PEAK[name] for name in expected}
    assert max(errors.values()) <= STEP[dtype], errors


@pytest.mark.parametrize("shape", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 3, STEPS])
def test_both_schedules_have_one_shape(shape, warmup):
    training = settings_of(warmup, shape)
    ours, reference = schedule(training), reference_schedule(training)
    with jax.enable_x64(True):
        found = [float(ours(step)) for step in range(STEPS + 3)]
    np.testing.assert_allclose(found, [reference(step) for step in range(STEPS + 3)], rtol=0, atol=1e-15)
