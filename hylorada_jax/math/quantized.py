"""Frozen kernels in int8 and nf4: qwix's arrays, made numbers again where they are read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from hylorada_jax.errors import ConfigError, ModelError
from hylorada_jax.math.remat import computed_again
from hylorada_jax.trees import is_quantized

if TYPE_CHECKING:
    from qwix import QArray  # type: ignore[import-untyped]

Kernel: TypeAlias = Any
"""Numbers, or qwix's codes and scales of them."""

KINDS = ("int8", "nf4")
"""What frozen weights may be kept in: 8 bits, a scale per output; 4 bits, a scale per 64 inputs."""
HEAD = "+head"
BASE_DTYPES = (*KINDS, *(kind + HEAD for kind in KINDS))
"""What a base may be kept in: its kernels, or with "+head" its output head too."""

_TILE, _LEAST_TILE = 64, 4  # where 16-bit scales take no more than the codes


def quantized(kernel: Array, base_dtype: str, dtype: DTypeLike, *, out_in: bool = False) -> QArray:
    """A kernel in int8 or nf4, by the largest magnitude that shares a scale.

        int8: W ≈ s_j · q_ij, s_j = max_i |W_ij| / 127.5
        nf4:  W ≈ s_bj · v[q_ij], v the 16 quantiles of a normal distribution in [−1, 1], b = ⌊i / 64⌋

    Args:
        kernel: [d_in, d_out], in float32 at least.
        base_dtype: one of :data:`KINDS`.
        dtype: of the scales, and of what :func:`as_array` makes of it.
        out_in: it is [d_out, d_in], as an output head, and so are codes and scales.

    Returns:
        qwix's array: qvalue [d_in, d_out] in int8 or uint4, scale [1 or d_in / 64, d_out]. Where 64 does not
        divide d_in, the tile is the largest power of 2 that does.

    Raises:
        ConfigError: qwix is not installed, or not even 4 divides d_in.

    Source: Dettmers et al. 2023, arXiv:2305.14314, §3 and appendix E.
    """
    try:
        import qwix
    except ImportError as error:
        raise ConfigError(
            "A base in int8 or nf4 needs qwix.",
            f"base_dtype={base_dtype!r}, and no qwix",
            'Install it: `pip install "hylorada[quantized]"`.',
        ) from error
    inputs, outputs = (1, 0) if out_in else (0, 1)
    if base_dtype == "int8":
        return qwix.quantize(kernel, "int8", channelwise_axes=(outputs,), scale_dtype=dtype)
    tile = math.gcd(kernel.shape[inputs], _TILE)
    if tile < _LEAST_TILE:
        raise ConfigError(
            f"nf4 needs linear layers whose inputs are a multiple of {_LEAST_TILE}.",
            f"{kernel.shape[inputs]} inputs",
            "Choose base_dtype='int8'.",
        )
    tiles = {inputs: tile}
    return qwix.quantize(kernel, "nf4", channelwise_axes=(outputs,), tiled_axes=tiles, scale_dtype=dtype)


def as_array(kernel: Kernel) -> Array:
    """The numbers of a kernel, or of stacked ones, which may be quantised, in the dtype of the scales.

    Rows of an output head, any of them, serve too.
    """
    if not is_quantized(kernel):
        return jnp.asarray(kernel)
    codes, scale = kernel.qvalue, kernel.scale
    values = _nf4(codes, scale.dtype) if kernel.qtype == "nf4" else codes.astype(scale.dtype)
    if codes.shape[-1] != scale.shape[-1]:  # [d_out, d_in]: the scales of an output lie side by side
        return (values.reshape(*scale.shape, -1) * scale[..., None]).reshape(codes.shape)
    *tiles, d_out = scale.shape
    return (values.reshape(*tiles, -1, d_out) * scale[..., None, :]).reshape(codes.shape)


def plain(params: Any) -> Any:
    """A parameter tree with numbers in the place of quantised kernels; other leaves are shared."""
    return jax.tree.map(
        lambda leaf: _numbers(leaf) if is_quantized(leaf) else leaf, params, is_leaf=is_quantized
    )


def _numbers(leaf: QArray) -> Array:
    if isinstance(leaf.qvalue, jax.core.Tracer):
        return as_array(leaf)
    # Left to itself the compiler may put all of them on every device of a mesh.
    return jax.jit(as_array, out_shardings=leaf.qvalue.sharding)(leaf)


def size_of(params: Any) -> int:
    """How many numbers a parameter tree stands for."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params, is_leaf=is_quantized))


def bits_of(dtype: Any) -> int:
    """What one number takes on a device: TPUs lay two of nf4's codes in a byte.

    Example:
        >>> bits_of(jnp.dtype("bfloat16"))
        16
    """
    return 4 if dtype == "uint4" else 8 * dtype.itemsize


def dtype_name(params: Mapping[str, Any]) -> str:
    """The dtype of a parameter tree: "bfloat16", of one with quantised kernels "bfloat16+nf4".

    Where the head is quantised too, it is "bfloat16+nf4+head".
    """
    leaves = jax.tree.leaves(params, is_leaf=is_quantized)
    dtypes = {jnp.dtype(leaf.dtype).name for leaf in leaves}
    base_dtypes = {leaf.qtype for leaf in leaves if is_quantized(leaf)}
    head = is_quantized(params.get("lm_head", {}).get("embedding"))
    return "+".join(["/".join(sorted(dtypes)), *base_dtypes]) + (HEAD if head else "")


def float_dtype(dtype: Any) -> jnp.dtype:
    """The dtype that weights may have, as numpy's.

    Args:
        dtype: float16, bfloat16, float32 or float64, by its name or as an object of numpy's or jax's.

    Raises:
        ModelError: it is another one, or none that jax knows.

    Example:
        >>> float_dtype("bfloat16").name
        'bfloat16'
    """
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found not in (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64):
        raise ModelError("Weights are floating-point numbers.", f"dtype {dtype}", "Use float32 or bfloat16.")
    return found


def split_name(name: str) -> tuple[Any, str | None]:
    """The dtype and the base_dtype that :func:`dtype_name` names."""
    dtype, _, base_dtype = name.partition("+")
    return jnp.dtype(dtype), base_dtype or None


def dtype_of(params: Any) -> Any:
    """What a model of these parameters computes in: codes are no numbers. Of no parameters it is float32.

    Raises:
        ModelError: there are parameters, and none of them is a floating-point number.

    Example:
        >>> dtype_of({"codes": jnp.ones(2, jnp.int8), "scale": jnp.ones(2, jnp.bfloat16)}).name
        'bfloat16'
    """
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(params)]
    if floating := [dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating)]:
        return floating[0]
    return float_dtype(dtypes[0] if dtypes else jnp.float32)


def _nf4(codes: Array, dtype: DTypeLike) -> Array:
    """v[codes], chosen bit by bit.

    On a TPU, qwix's lookup moves three times the bytes, because it lays the codes in a row.
    """
    bits = [codes.astype(jnp.uint8) >> place & 1 > 0 for place in range(4)]

    def choose(values: Sequence[float], bits: Sequence[Array]) -> Array | float:
        if not bits:
            return values[0]
        half = len(values) // 2
        return jnp.where(bits[-1], choose(values[half:], bits[:-1]), choose(values[:half], bits[:-1]))

    return jnp.asarray(choose(_nf4_values(), bits)).astype(dtype)


@lru_cache
def _nf4_values() -> list[float]:
    """v, as literals: arrays would be broadcast to the shape of the codes, and kept."""
    import qwix

    with jax.ensure_compile_time_eval():
        codes = qwix.QArray(jnp.arange(16, dtype=jnp.uint4)[:, None], jnp.ones((16, 1)), None, "nf4")
        return qwix.dequantize(codes)[:, 0].tolist()


def dot_general(x: Array, kernel: Kernel, dimensions: Any, **settings: Any) -> Array:
    """``lax.dot_general`` of x and a kernel, which may be quantised.

    The backward pass makes its numbers anew: of a model's kernels it would keep all.
    """

    @computed_again
    def product(x: Array, kernel: Kernel) -> Array:
        return lax.dot_general(x, as_array(kernel), dimensions, **settings)

    if is_quantized(kernel):
        return product(x, kernel)
    return lax.dot_general(x, kernel, dimensions, **settings)
