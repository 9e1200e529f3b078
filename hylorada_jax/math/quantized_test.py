"""Oracles: qwix's own dequantisation, the formula in numpy, and the product with the numbers themselves."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hylorada_jax.errors import ConfigError, ModelError
from hylorada_jax.math.quantized import KINDS, as_array, dot_general, dtype_of, quantized

qwix = pytest.importorskip("qwix")
AXES = (((1,), (0,)), ((), ()))


def kernel(d_in=192, d_out=10):
    return jax.random.normal(jax.random.key(0), (d_in, d_out))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("base_dtype", KINDS)
def test_the_numbers_are_qwixs(base_dtype, dtype):
    codes = quantized(kernel(), base_dtype, dtype)
    np.testing.assert_array_equal(as_array(codes), qwix.dequantize(codes))
    assert as_array(codes).dtype == dtype
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), codes)
    np.testing.assert_array_equal(as_array(stacked)[1], as_array(codes))
    head = quantized(kernel().T, base_dtype, dtype, out_in=True)
    np.testing.assert_array_equal(as_array(head), as_array(codes).T)


def test_int8_is_the_nearest_of_the_numbers_of_an_outputs_scale():
    weights, codes = np.asarray(kernel(), np.float64), quantized(kernel(), "int8", "float32")
    scale = np.abs(weights).max(0) / 127.5
    np.testing.assert_allclose(codes.scale[0], scale, rtol=1e-6)
    assert (np.abs(as_array(codes) - weights) <= scale / 2 * (1 + 1e-4)).all()


@pytest.mark.parametrize(("d_in", "tile"), [(192, 64), (96, 32), (24, 8)])
def test_nf4_is_the_nearest_of_16_numbers_of_a_tiles_scale(d_in, tile):
    tiles = np.asarray(kernel(d_in), np.float64).reshape(-1, tile, 10)
    levels = qwix.dequantize(qwix.quantize(jnp.linspace(-1, 1, 4096), "nf4"))
    levels = np.unique(np.asarray(levels, np.float64))
    assert len(levels) == 16
    scaled = tiles / np.abs(tiles).max(1, keepdims=True)
    nearest = levels[np.abs(scaled[..., None] - levels).argmin(-1)]
    expected = (nearest * np.abs(tiles).max(1, keepdims=True)).reshape(d_in, 10)
    np.testing.assert_allclose(as_array(quantized(kernel(d_in), "nf4", "float32")), expected, rtol=1e-6)


@pytest.mark.parametrize("base_dtype", KINDS)
def test_a_product_and_its_gradient_are_those_of_the_numbers(base_dtype):
    codes, x = quantized(kernel(), base_dtype, "float32"), jax.random.normal(jax.random.key(1), (3, 192))
    square = lambda kernel: lambda x: jnp.sum(dot_general(x, kernel, AXES) ** 2)
    got, expected = (jax.value_and_grad(square(w))(x) for w in (codes, as_array(codes)))
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(got[1], expected[1], rtol=1e-5)


def test_the_backward_pass_keeps_no_kernel():
    """A CPU keeps a byte for each code."""

    def loss(x, layers):
        layer = lambda x, w: (jnp.tanh(dot_general(x, w, AXES)), None)
        return jnp.sum(jax.lax.scan(layer, x, layers)[0])

    def memory(depth):
        layers = jax.vmap(lambda _: quantized(kernel(64, 64), "nf4", "float32"))(jnp.arange(depth))
        compiled = jax.jit(jax.grad(loss)).lower(jnp.ones((1, 64)), layers).compile()
        return compiled.memory_analysis().temp_size_in_bytes  # type: ignore[union-attr]

    assert memory(32) - memory(16) < 2 * 16 * 64 * 64


def test_what_cannot_be_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match="multiple of 4"):
        quantized(kernel(10), "nf4", "float32")
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(ConfigError, match=r"hylorada\[quantized\]"):
        quantized(kernel(), "int8", "float32")
    for dtype in ("int8", "complex64"):
        with pytest.raises(ModelError, match=f"floating-point numbers(.|\n)*{dtype}"):
            dtype_of({"kernel": jnp.ones(2, dtype)})
