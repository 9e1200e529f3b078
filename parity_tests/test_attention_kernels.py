"""The TPU kernels of attention, run step by step on this machine, against the plain formula in float64."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hylorada_jax.math.distance_attention import distance_attention
from hylorada_jax.math.position import MAX_DISTANCE, relative_buckets
from hylorada_jax.math.splash import splash_attention
from parity_tests.tolerances import BFLOAT16, LAYER, UNIT_ROUNDOFF, relative_error

# The kernel, tokens of a block (of which jax's has 128 at least), and whether it takes a position bias.
KERNELS: dict[str, tuple[Callable[..., jax.Array], int, bool]] = {
    "splash": (splash_attention, 128, False),
    "distance": (distance_attention, 16, True),
}
# Of 4 heads over 2 of keys and values, and a bias for each, unless said otherwise.
CASES: dict[str, dict[str, Any]] = {
    "segments": {"segments": True},
    "window": {"window": 20, "soft_cap": 2.0, "kv_heads": 1, "adapted": 1},
    "bidirectional": {"causal": False, "kv_heads": 4},
}


def draw(length, *, kv_heads, adapted, segments, position_bias):
    """(the numbers of which there are gradients, a cotangent, segments)."""
    rng = np.random.default_rng(0)
    numbers = {
        "query": rng.normal(size=(2, length, 4, 8)),
        "key": rng.normal(size=(2, length, kv_heads, 8)),
        "value": rng.normal(size=(2, length, kv_heads, 8)),
    }
    if position_bias:
        numbers["position_bias"] = rng.normal(size=(64, adapted))
    ids = jnp.asarray(np.sort(rng.integers(0, 4, (2, length)), axis=1)) if segments else None
    return numbers, rng.normal(size=numbers["query"].shape), ids


def formula(
    query,
    key,
    value,
    *,
    scale,
    position_bias=None,
    segment_ids=None,
    causal=True,
    window=None,
    soft_cap=None,
):
    """Attention as it is written down; sums in float32 at least."""
    wide = partial(jnp.einsum, preferred_element_type=jnp.promote_types(query.dtype, jnp.float32))
    key, value = (jnp.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))
    logits = wide("bqhd,bkhd->bhqk", query, key) * scale
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    slots = np.arange(query.shape[1])
    distance = slots[:, None] - slots
    if position_bias is not None:
        buckets = relative_buckets()[distance + MAX_DISTANCE - 1]
        logits = logits + jnp.moveaxis(position_bias[buckets], -1, 0)
    visible = (distance >= 0) | (not causal)
    if window is not None:
        visible = visible & (distance < window)
    if segment_ids is not None:
        visible = visible & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    weights = jax.nn.softmax(jnp.where(visible, logits, -jnp.inf), axis=-1).astype(value.dtype)
    return wide("bhqk,bkhd->bqhd", weights, value).astype(query.dtype)


def pulled(run, numbers, cotangent, dtype):
    """What a function gives, and its gradients, all in float64; the table is float32 at least."""
    tensors, wide = ("query", "key", "value"), jnp.promote_types(dtype, jnp.float32)
    arrays = {name: jnp.asarray(x, dtype if name in tensors else wide) for name, x in numbers.items()}

    @jax.jit
    def forward_and_back(arrays, cotangent):
        out, pull = jax.vjp(lambda arrays: run(**arrays), arrays)
        return {"out": out} | pull(cotangent)[0]

    found = forward_and_back(arrays, jnp.asarray(cotangent, dtype))
    return {name: np.asarray(x, np.float64) for name, x in found.items()}


@pytest.mark.parametrize(
    ("kernel", "case", "dtype"),
    [(kernel, case, "float32") for kernel in KERNELS for case in CASES]
    + [(kernel, "segments", "bfloat16") for kernel in KERNELS],
)
def test_a_kernel_and_its_gradients_equal_the_formula(kernel, case, dtype):
    run, block, biased = KERNELS[kernel]
    options = {"scale": 0.4, "kv_heads": 2, "adapted": 4, "segments": False} | CASES[case]
    asked = {name: options.pop(name) for name in ("kv_heads", "adapted", "segments")}
    # Three blocks, the last not full.
    numbers, cotangent, ids = draw(5 * block // 2, **asked, position_bias=biased)
    options["segment_ids"] = ids
    # Of the very numbers that the kernel gets.
    given = {n: np.asarray(jnp.asarray(x, dtype if x.ndim == 4 else "float32")) for n, x in numbers.items()}
    cotangent = np.asarray(jnp.asarray(cotangent, dtype), np.float64)
    with jax.enable_x64(True):
        exact = pulled(partial(formula, **options), given, cotangent, "float64")
    own = partial(run, **options, block=block, interpret=True)
    got, plain = (pulled(run, given, cotangent, dtype) for run in (own, partial(formula, **options)))
    for name, expected in exact.items():
        allowed = LAYER["float32"]
        if dtype == "bfloat16":
            loss = max(relative_error(plain[name], expected), UNIT_ROUNDOFF[dtype])
            allowed = loss * BFLOAT16["forward" if name == "out" else "gradient"]
        assert relative_error(got[name], expected) <= allowed, name


def test_a_window_may_be_chosen_while_the_program_runs():
    numbers, _, _ = draw(40, kv_heads=2, adapted=4, segments=False, position_bias=True)
    run = partial(
        distance_attention, **jax.tree.map(jnp.float32, numbers), block=16, interpret=True, scale=0.4
    )
    np.testing.assert_array_equal(jax.jit(lambda window: run(window=window))(7), run(window=7))
