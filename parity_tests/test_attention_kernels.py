"""The TPU kernels of attention, run step by step on this machine, against the plain formula in float64.

The formula itself, where it has sinks, against transformers' torch attention of gpt-oss.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from hylorada_jax.errors import ConfigError
from hylorada_jax.math.attention import DAA, attention
from hylorada_jax.math.distance_attention import distance_attention
from hylorada_jax.math.pattern import Pattern
from hylorada_jax.math.splash import splash_attention
from parity_tests.tolerances import BFLOAT16, LAYER, UNIT_ROUNDOFF, relative_error

# The kernel, tokens of a block (of which jax's has 128 at least), and whether it takes a position bias.
KERNELS: dict[str, tuple[Callable[..., jax.Array], int, bool]] = {
    "splash": (splash_attention, 128, False),
    "distance": (distance_attention, 16, True),
}
# Of 4 heads over 2 of keys and values, and α and a bias for each, unless said otherwise.
CASES: dict[str, dict[str, Any]] = {
    "segments": {"segments": True, "sinks": True},
    "window": {"window": 20, "soft_cap": 2.0, "kv_heads": 1, "adapted": 1, "sinks": True},
    "bidirectional": {"causal": False, "kv_heads": 4},
}


def draw(length, *, kv_heads=2, adapted=4, segments=False, position_bias=False, sinks=False, **facts):
    """(the numbers of which there are gradients, what is seen); document 0 is padding, in front."""
    rng = np.random.default_rng(0)
    numbers = {
        "query": rng.normal(size=(2, length, 4, 8)),
        "key": rng.normal(size=(2, length, kv_heads, 8)),
        "value": rng.normal(size=(2, length, kv_heads, 8)),
        "alpha": rng.uniform(0.5, 1.5, adapted),
    }
    if position_bias:
        numbers["position_bias"] = rng.normal(size=(64, adapted))
    if sinks:
        numbers["sinks"] = rng.normal(size=4)
    ids = jnp.asarray(np.sort(rng.integers(0, 4, (2, length)), axis=1)) if segments else None
    positions = jnp.broadcast_to(jnp.arange(length), (2, length))
    valid = None if ids is None else ids > 0
    return numbers, Pattern.of_rows(positions, segment_ids=ids, key_valid=valid, **facts)


def formula(query, key, value, pattern, *, alpha, position_bias=None, **settings):
    daa = DAA(alpha, jnp.zeros(1), position_bias)
    return attention(query, key, value, pattern, daa=daa, **settings)


def by_kernel(run, query, key, value, pattern, *, alpha, scale, **settings):
    by_head = jnp.broadcast_to(scale * alpha, query.shape[2:3])
    return run(query, key, value, pattern, scale=by_head, interpret=True, **settings)


def pulled(run, numbers, pattern, dtype):
    """What a function gives tokens, and its gradients, in float64; α and the table are float32 at least."""
    wide = jnp.promote_types(dtype, jnp.float32)
    arrays = {name: jnp.asarray(x, dtype if x.ndim == 4 else wide) for name, x in numbers.items()}
    tokens = True if pattern.key_valid is None else pattern.key_valid[..., None, None]
    cotangent = np.random.default_rng(1).normal(size=numbers["query"].shape) * tokens

    @jax.jit
    def forward_and_back(arrays, cotangent):
        out, pull = jax.vjp(lambda arrays: run(pattern=pattern, **arrays), arrays)
        return {"out": out * tokens} | pull(cotangent)[0]

    found = forward_and_back(arrays, jnp.asarray(cotangent, dtype))
    return {name: np.asarray(x, np.float64) for name, x in found.items()}


@pytest.mark.parametrize(
    ("kernel", "case", "dtype"),
    [(kernel, case, "float32") for kernel in KERNELS for case in CASES]
    + [(kernel, "segments", "bfloat16") for kernel in KERNELS],
)
def test_a_kernel_and_its_gradients_equal_the_formula(kernel, case, dtype):
    run, block, biased = KERNELS[kernel]
    facts = dict(CASES[case])
    options = {"scale": 0.5, "soft_cap": facts.pop("soft_cap", None)}
    # Three blocks, the last not full.
    numbers, pattern = draw(5 * block // 2, position_bias=biased, **facts)
    numbers = {n: np.asarray(jnp.asarray(x, dtype if x.ndim == 4 else "float32")) for n, x in numbers.items()}
    with jax.enable_x64(True):
        exact = pulled(partial(formula, **options), numbers, pattern, "float64")
    plain = pulled(partial(formula, **options), numbers, pattern, dtype)
    got = pulled(partial(by_kernel, run, block=block, **options), numbers, pattern, dtype)
    for name, expected in exact.items():
        allowed = LAYER["float32"]
        if dtype == "bfloat16":
            loss = max(relative_error(plain[name], expected), UNIT_ROUNDOFF[dtype])
            allowed = loss * BFLOAT16["forward" if name == "out" else "gradient"]
        assert relative_error(got[name], expected) <= allowed, name


def test_sinks_are_those_of_gpt_oss():
    numbers, pattern = draw(30, sinks=True, window=20)
    alpha = numbers.pop("alpha")
    tensors = {name: torch.tensor(x, requires_grad=True) for name, x in numbers.items()}
    own = SimpleNamespace(sinks=tensors["sinks"], num_key_value_groups=2, training=False)
    query, key, value = (tensors[name].transpose(1, 2) for name in ("query", "key", "value"))
    hidden = torch.tensor(np.where(pattern.mask(), 0, np.finfo(np.float64).min))
    expected, _ = eager_attention_forward(
        own, query * torch.tensor(alpha)[:, None, None], key, value, hidden, 0.5
    )
    cotangent = np.random.default_rng(1).normal(size=expected.shape)
    gradients = torch.autograd.grad(expected, [*tensors.values()], torch.tensor(cotangent))
    with jax.enable_x64(True):
        run = partial(formula, scale=0.5, alpha=jnp.asarray(alpha))
        got = pulled(run, numbers, pattern, "float64")
    assert relative_error(got["out"], expected.detach().numpy()) <= 1e-10
    for name, gradient in zip(tensors, gradients, strict=True):
        assert relative_error(got[name], gradient.numpy()) <= 1e-10, name


def test_a_window_may_be_chosen_while_the_program_runs():
    numbers, pattern = draw(40, position_bias=True)
    numbers = {name: jnp.float32(x) for name, x in numbers.items()}

    def run(window):
        own = replace(pattern, window=window)
        return by_kernel(distance_attention, pattern=own, scale=0.5, block=16, **numbers)

    np.testing.assert_array_equal(jax.jit(run)(7), run(7))

    def by_splash(window):
        query = numbers["query"]
        return splash_attention(query, query, query, replace(pattern, window=window), scale=0.5)

    with pytest.raises(ConfigError, match="one window"):
        jax.jit(by_splash)(7)


@pytest.mark.parametrize(
    ("facts", "biased", "taken"),
    [
        ({}, False, "splash"),
        ({"window": jnp.int32(9)}, False, "distance"),
        ({"counted": True}, True, "distance"),
        ({"counted": False}, True, None),
        ({"own": False}, False, None),
    ],
)
def test_a_tpu_takes_the_kernel_that_serves(monkeypatch, facts, biased, taken):
    numbers, pattern = draw(128, position_bias=biased)
    pattern = replace(pattern, **facts)
    numbers = {name: jnp.float32(x) for name, x in numbers.items()}

    def traced():
        return str(jax.make_jaxpr(lambda numbers: formula(pattern=pattern, scale=0.5, **numbers))(numbers))

    assert "pallas_call" not in traced()
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    program = traced()
    assert ("pallas_call" in program) == (taken is not None)
    assert ("splash_mha_fwd" in program) == (taken == "splash")
