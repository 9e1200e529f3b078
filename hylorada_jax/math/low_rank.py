"""Low-rank adaptation of one linear layer: LoRA, DoRA, their gated blend and its conditioning (method.md §1).

With W [d_out, d_in] frozen, A [r, d_in], B [d_out, r] and ‖·‖ the L2 norm of each row:

    δ = s·(x Aᵀ) Bᵀ·p             p = a scale per token, 1 if absent
    n = ‖W + s·B A‖
    m = g·m' + (1−g)·m₀          g = σ(magnitude_gate), m₀ = ‖W‖
    c = (1−β)·m / n + β          β = σ(residual_weight)
    y = (base + δ)·c

LoRA is c = 1; DoRA is g = 1, β = 0. What depends on weights only (c, and s·B) is computed once per
optimizer step by the caller; :func:`low_rank_delta` and :func:`adapted_output` are all that runs per token.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.lax import Precision
from jax.tree_util import Partial
from jaxtyping import Bool, Float

from hylorada_jax.math.adapted_norm import adapted_norm_squared
from hylorada_jax.math.remat import named_output
from hylorada_jax.math.scaled_sum import rounded, scaled_sum

# n is kept above this so that a zero row of W gives a finite c and a finite gradient.
NORM_FLOOR = 1e-12


def orthogonal_init(key: Array, rank: int, d_in: int) -> Float[Array, "r d_in"]:
    """A matrix with orthonormal rows (orthonormal columns when rank > d_in).

        A Aᵀ = I_r  if r ≤ d_in,  else  Aᵀ A = I_d

    Args:
        key: a PRNG key.
        rank: r.
        d_in: input features.

    Returns:
        A, float32, uniformly distributed over such matrices.

    Example:
        >>> A = orthogonal_init(jax.random.key(0), 2, 5)
        >>> bool(jnp.allclose(A @ A.T, jnp.eye(2), atol=1e-6))
        True

    Source: Saxe et al. 2014, §3; HyLoRADA's initialisation of lora_A.
    """
    return jax.nn.initializers.orthogonal()(key, (rank, d_in), jnp.float32)


def kaiming_init(key: Array, rank: int, d_in: int) -> Float[Array, "r d_in"]:
    """Kaiming-uniform with a = √5, LoRA's initialisation of A.

        A ~ U(−1/√d_in, 1/√d_in)

    Args:
        key: a PRNG key.
        rank: r.
        d_in: input features.

    Returns:
        A, float32.

    Example:
        >>> bool(jnp.abs(kaiming_init(jax.random.key(0), 2, 4)).max() <= 0.5)
        True

    Source: He et al. 2015; Hu et al. 2021, §4.1.
    """
    bound = d_in**-0.5
    return jax.random.uniform(key, (rank, d_in), jnp.float32, -bound, bound)


def structure_scale(
    prior: Float[Array, "*tokens s"], scale_from_structure: Float[Array, "*own s"]
) -> Float[Array, "*tokens"]:
    """The scale that a structure prior gives each token's update (HyLoRADA v2).

        p = 0.5 + σ(prior · scale_from_structure)

    Args:
        prior: of :func:`hylorada_jax.math.structure.structure_prior`.
        scale_from_structure: the layer's own reading of it, or its token's expert's; zeros at the start.

    Returns:
        p in (0.5, 1.5), exactly 1 while scale_from_structure is 0; at least float32.

    Example:
        >>> structure_scale(jnp.ones((2, 3)), jnp.zeros(3)).tolist()
        [1.0, 1.0]

    Source: method.md §1.
    """
    dtype = jnp.promote_types(scale_from_structure.dtype, jnp.float32)
    score = jnp.sum(prior.astype(dtype) * scale_from_structure.astype(dtype), axis=-1)
    return 0.5 + jax.nn.sigmoid(score)


def position_scale(
    factor: Float[Array, "*tokens"], position_gate: Float[Array, "*own"]
) -> Float[Array, "*tokens"]:
    """The scale that its position gives each token's update (HyLoRADA Unified).

        p = 1 + g·t,  t = tanh(position_bias[bucket(position)])

    Args:
        factor: t, of :func:`hylorada_jax.math.position.position_factor`, one for the whole model.
        position_gate: g = σ(position_scale), the layer's own, or its token's expert's.

    Returns:
        p in (0, 2), exactly 1 while the position bias is 0.

    Example:
        >>> position_scale(jnp.array([0.0, -0.5]), jnp.array(0.5)).tolist()
        [1.0, 0.75]

    Source: method.md §1.
    """
    return 1 + position_gate * factor


def low_rank_delta(
    x: Float[Array, "*tokens_and_d_in"],
    lora_A: Float[Array, "r *d_in"],
    scaled_B: Float[Array, "*d_out r"],
    token_scale: Float[Array, "*tokens"] | None = None,
) -> Float[Array, "*tokens_and_d_out"]:
    """The low-rank update of a layer's output, whose input and output may have several axes each.

        δ = (x Aᵀ)(s·B)ᵀ·p

    Args:
        x: the layer's input (after dropout, in training).
        lora_A: A.
        scaled_B: s·B.
        token_scale: p, or None for p = 1, which costs nothing.

    Returns:
        δ in at least float32. The products take their operands in x's dtype and accumulate in float32.

    Example:
        >>> low_rank_delta(jnp.ones((2, 3)), jnp.ones((1, 3)), jnp.ones((4, 1)))[0, 0].item()
        3.0
        >>> low_rank_delta(jnp.ones((5, 2, 3)), jnp.ones((1, 2, 3)), jnp.ones((4, 2, 1))).shape
        (5, 4, 2)

    Source: Hu et al. 2021, §4.1.
    """
    accumulator = jnp.promote_types(x.dtype, jnp.float32)
    i, o = "ijkl"[: lora_A.ndim - 1], "opqs"[: scaled_B.ndim - 1]
    hidden = jnp.einsum(f"...{i},r{i}->...r", x, lora_A.astype(x.dtype), preferred_element_type=accumulator)
    if token_scale is not None:
        hidden = hidden * token_scale[..., None]  # here it costs r products per token, not d_out
    hidden, scaled_B = hidden.astype(x.dtype), scaled_B.astype(x.dtype)
    return jnp.einsum(f"...r,{o}r->...{o}", hidden, scaled_B, preferred_element_type=accumulator)


def adapted_output(
    base_output: Float[Array, "*tokens d_out"],
    delta: Float[Array, "*tokens d_out"],
    column_scale: Float[Array, "*own d_out"] | None = None,
    *,
    written: bool = True,
) -> Float[Array, "*tokens d_out"]:
    """The adapted layer's output.

        y = (base + δ)·c

    Args:
        base_output: what the frozen layer gave.
        delta: δ.
        column_scale: c of all tokens or of each, or None for c = 1 (LoRA), which costs nothing.
        written: y stands in memory in base_output's dtype, which takes least where layers are scanned over;
            else the compiler may join to it what follows, as where each layer has operations of its own.

    Returns:
        y in base_output's dtype; the sum and the product are taken in at least float32.

    Example:
        >>> adapted_output(jnp.ones((1, 2)), jnp.ones((1, 2)), jnp.array([1.0, 0.5])).tolist()
        [[2.0, 1.0]]

    Source: Liu et al. 2024 (DoRA), eq. 5; method.md §1.
    """
    if column_scale is not None:
        return scaled_sum(base_output, delta, column_scale.astype(delta.dtype), written)
    y, dtype = base_output.astype(delta.dtype) + delta, base_output.dtype
    return named_output(rounded(y, dtype) if written else y.astype(dtype))


def row_norm_squared(weight: Float[Array, "d_out d_in"]) -> Float[Array, " d_out"]:
    """‖W‖² of every row, the frozen part of n².

        n₀² = Σ_j W_ij²

    Args:
        weight: W.

    Returns:
        n₀² in at least float32.

    Example:
        >>> row_norm_squared(jnp.array([[3.0, 4.0]])).tolist()
        [25.0]
    """
    wide = weight.astype(jnp.promote_types(weight.dtype, jnp.float32))
    return jnp.sum(wide * wide, axis=-1)


def safe_sqrt(squared: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """√max(n², floor²): a norm that is finite and has a finite gradient at 0.

    Args:
        squared: n², which rounding may have made slightly negative.

    Returns:
        n ≥ ``NORM_FLOOR``; the gradient is zero where the floor is reached.

    Example:
        >>> safe_sqrt(jnp.array([4.0])).tolist()
        [2.0]
    """
    return jnp.sqrt(jnp.maximum(squared, NORM_FLOOR**2))


def adapted_norm(
    weight: Float[Array, "d_out d_in"] | Partial,
    norm_squared: Float[Array, " d_out"],
    lora_A: Float[Array, "r d_in"],
    scaled_B: Float[Array, "d_out r"],
) -> Float[Array, " d_out"]:
    """n = ‖W + s·B A‖ of every row, without forming B A unless a row all but vanishes.

        n² = n₀² + 2·Σ_r (W Aᵀ ⊙ sB) + Σ_r (sB (A Aᵀ) ⊙ sB)

    Args:
        weight: W, or what gives it, as of :func:`adapted_norm_squared`.
        norm_squared: n₀² = ‖W‖², from :func:`row_norm_squared`.
        lora_A: A.
        scaled_B: s·B.

    Returns:
        n in at least float32, never below ``NORM_FLOOR``, nor below the dtype's ε·‖W‖, where a row is
        nothing but the rounding of W + s·B A. Products run at the highest precision, because a TPU's default
        would round W to bfloat16.

    Example:
        >>> W, A, B = jnp.array([[3.0, 0.0]]), jnp.array([[0.0, 1.0]]), jnp.array([[4.0]])
        >>> adapted_norm(W, row_norm_squared(W), A, B).tolist()
        [5.0]

    Source: Liu et al. 2024 (DoRA), eq. 5, expanded.
    """
    dtype = jnp.promote_types(lora_A.dtype, jnp.float32)
    lora_A, scaled_B = lora_A.astype(dtype), scaled_B.astype(dtype)
    initial = norm_squared.astype(dtype)
    squared = adapted_norm_squared(weight, initial, lora_A, scaled_B)
    return safe_sqrt(jnp.maximum(squared, jnp.finfo(dtype).eps ** 2 * initial))


def vanishes(
    weight: Float[Array, "d_out d_in"] | Partial,
    norm_squared: Float[Array, " d_out"],
    lora_A: Float[Array, "r d_in"],
    scaled_B: Float[Array, "d_out r"],
) -> Bool[Array, " d_out"]:
    """Whether a row of W + s·B A is zero, or nothing but rounding: n is then kept above what it is.

        ‖W + s·B A‖ ≤ max(``NORM_FLOOR``, ε·‖W‖)

    Args:
        weight: W, or what gives it.
        norm_squared: n₀² = ‖W‖², from :func:`row_norm_squared`.
        lora_A: A.
        scaled_B: s·B.

    Example:
        >>> W, A, B = jnp.array([[0.0, 0.0], [3.0, 0.0]]), jnp.zeros((1, 2)), jnp.zeros((2, 1))
        >>> vanishes(W, row_norm_squared(W), A, B).tolist()
        [True, False]
    """
    n = adapted_norm(weight, norm_squared, lora_A, scaled_B)
    least = safe_sqrt(jnp.finfo(n.dtype).eps ** 2 * norm_squared.astype(n.dtype))
    return n <= 2 * least  # twice, for n and this are rounded


def _parts(gate: Float[Array, ""]) -> tuple[Array, Array]:
    """σ(x), and 1 − σ(x) as σ(−x): the difference would lose its digits to the 1, and be 0 from x = 17 on."""
    return jax.nn.sigmoid(gate), jax.nn.sigmoid(-gate)


def gated_magnitude(
    magnitude: Float[Array, " d_out"], initial: Float[Array, " d_out"], magnitude_gate: Float[Array, ""]
) -> Float[Array, " d_out"]:
    """The blend of the learned magnitude with the frozen one.

        m = g·m' + (1−g)·m₀,  g = σ(magnitude_gate)

    Args:
        magnitude: m', learned.
        initial: m₀ = ‖W‖.
        magnitude_gate: the gate before its sigmoid.

    Returns:
        m; exactly m' where g is 1, and exactly m₀ where it is 0.

    Example:
        >>> gated_magnitude(jnp.array([3.0]), jnp.array([1.0]), jnp.array(0.0)).tolist()
        [2.0]

    Source: method.md §1.
    """
    gate, rest = _parts(magnitude_gate)
    return gate * magnitude + rest * initial


def residual_blend(
    magnitude: Float[Array, " d_out"], norm: Float[Array, " d_out"], residual_weight: Float[Array, ""]
) -> Float[Array, " d_out"]:
    """The column scale between DoRA's and LoRA's.

        c = (1−β)·m/n + β,  β = σ(residual_weight)

    Args:
        magnitude: m.
        norm: n = ‖W + s·B A‖, positive.
        residual_weight: the blend before its sigmoid.

    Returns:
        c; exactly 1 (LoRA) where β is 1, and exactly m/n (DoRA) where it is 0.

    Example:
        >>> residual_blend(jnp.array([2.0]), jnp.array([1.0]), jnp.array(0.0)).tolist()
        [1.5]

    Source: method.md §1.
    """
    residual, rest = _parts(residual_weight)
    return rest * (magnitude / norm) + residual


def collapsed_magnitude(
    magnitude: Float[Array, " d_out"], norm: Float[Array, " d_out"], residual_weight: Float[Array, ""]
) -> Float[Array, " d_out"]:
    """The magnitude of the DoRA adapter that a trained HyLoRADA v1 adapter is, with the same A, B and s.

        c ⊙ n = (1−β)·m + β·n,  β = σ(residual_weight)

    Args:
        magnitude: m, the gated one.
        norm: n = ‖W + s·B A‖.
        residual_weight: the blend before its sigmoid.

    Returns:
        DoRA's magnitude.

    Example:
        >>> collapsed_magnitude(jnp.array([2.0]), jnp.array([1.0]), jnp.array(0.0)).tolist()
        [1.5]

    Source: method.md §1, Collapse.
    """
    residual, rest = _parts(residual_weight)
    return rest * magnitude + residual * norm


def expanded_magnitude(
    collapsed: Float[Array, " d_out"],
    norm: Float[Array, " d_out"],
    initial: Float[Array, " d_out"],
    magnitude_gate: Float[Array, ""],
    residual_weight: Float[Array, ""],
) -> Float[Array, " d_out"]:
    """The learned magnitude m' with which a HyLoRADA v1 layer computes what a DoRA layer does.

        m' = ((m_DoRA − β·n)/(1−β) − (1−g)·m₀) / g

    The inverse of :func:`gated_magnitude` and :func:`collapsed_magnitude`, at any gates: they need not be
    saturated, where they would no longer learn.

    Args:
        collapsed: m_DoRA.
        norm: n = ‖W + s·B A‖.
        initial: m₀ = ‖W‖.
        magnitude_gate: the gate before its sigmoid.
        residual_weight: the blend before its sigmoid.

    Returns:
        m'; not finite where 1−β or g is zero in its dtype (float32: beyond ±87), for there is none.

    Example:
        >>> one = jnp.ones(1)
        >>> expanded_magnitude(1.5 * one, one, one, jnp.array(0.0), jnp.array(0.0)).tolist()
        [3.0]

    Source: method.md §1, Collapse.
    """
    (gate, rest_of_gate), (residual, rest) = _parts(magnitude_gate), _parts(residual_weight)
    return ((collapsed - residual * norm) / rest - rest_of_gate * initial) / gate


def merged_weight(
    weight: Float[Array, "d_out d_in"],
    lora_A: Float[Array, "r d_in"],
    scaled_B: Float[Array, "d_out r"],
    column_scale: Float[Array, " d_out"] | None = None,
) -> Float[Array, "d_out d_in"]:
    """The one weight that does what the frozen weight and the adapter do together.

        W' = c ⊙ (W + s·B A)

    Args:
        weight: W.
        lora_A: A.
        scaled_B: s·B.
        column_scale: c, or None for c = 1.

    Returns:
        W' in W's dtype, computed in at least float32 and rounded once.

    Example:
        >>> merged_weight(jnp.ones((1, 1)), jnp.ones((1, 1)), jnp.ones((1, 1)), jnp.array([2.0])).tolist()
        [[4.0]]

    Source: Hu et al. 2021, §4.1; method.md §1, Merging.
    """
    dtype = jnp.promote_types(weight.dtype, jnp.float32)
    update = jnp.matmul(scaled_B.astype(dtype), lora_A.astype(dtype), precision=Precision.HIGHEST)
    merged = weight.astype(dtype) + update
    if column_scale is not None:
        merged = merged * column_scale.astype(dtype)[:, None]
    return merged.astype(weight.dtype)
