"""Every public layer, registered once: both classes, and a call of them drawn from a few facts.

A layer's draw gives float64 numbers, far from the initial values but well conditioned, so that a difference
between the frameworks is one of the formulas and not of terms that cancel; the cotangent goes along with the
output for the same reason. Where a draw cancels on purpose, it says how ill conditioned it is.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx, traverse_util

import hylorada_jax
import hylorada_jax.nnx
import hylorada_torch
from hylorada_jax.math.attention import attention
from hylorada_jax.math.pattern import Pattern

STRUCTURE_DIM = 6


@dataclasses.dataclass(frozen=True)
class Draw:
    """The facts that a call is drawn from; every layer uses those that concern it.

    Args:
        seed: of all numbers.
        batch: rows; 0 is a legal batch.
        seq: tokens in a row.
        d_in: features going into a linear layer.
        d_out: features coming out, at least 2.
        rank: of its adapter; may exceed d_in and d_out.
        alpha: α.
        use_rslora: s = α/√r.
        detach_norm: no gradient through ‖W + s·B A‖.
        zero_row: a row of W is zero.
        cancelling: a row of s·B A all but cancels W's.
        input_exponent: the inputs have the magnitude 10**input_exponent.
        weight_exponent: W has the magnitude 10**weight_exponent.
    """

    seed: int = 0
    batch: int = 2
    seq: int = 3
    d_in: int = 6
    d_out: int = 5
    rank: int = 3
    alpha: float = 8.0
    use_rslora: bool = False
    detach_norm: bool = False
    zero_row: bool = False
    cancelling: bool = False
    input_exponent: int = 0
    weight_exponent: int = 0


# Those that are always tried, and that `hylorada parity` measures.
LINEAR_EDGES = {
    "plain": Draw(),
    "wide rank": Draw(seed=1, d_in=5, d_out=9, rank=12, seq=1, alpha=16.0, use_rslora=True),
    "rank one": Draw(seed=2, d_in=16, d_out=8, rank=1, alpha=1.0, detach_norm=True),
    "one feature": Draw(seed=3, d_in=1, d_out=4, rank=1, alpha=0.5),
    "zero row": Draw(seed=4, d_in=7, d_out=3, rank=9, zero_row=True),
    "cancelling row": Draw(seed=5, d_in=12, d_out=7, rank=4, cancelling=True),
    "empty batch": Draw(seed=6, batch=0),
    "large": Draw(seed=7, input_exponent=6, weight_exponent=4),
    "tiny": Draw(seed=8, input_exponent=-6, weight_exponent=-4),
    "SmolLM2's q": Draw(seed=9, seq=64, d_in=576, d_out=576, rank=8, alpha=16.0),
}
OTHER_EDGES = {
    "plain": Draw(),
    "one token": Draw(seed=1, seq=1),
    "empty batch": Draw(seed=2, batch=0),
    # At this seed freq_scale's gradient, a sum over the tokens of terms that cancel, is well conditioned.
    "long": Draw(seed=13, batch=1, seq=70),
    "large": Draw(seed=4, input_exponent=6),
    "tiny": Draw(seed=5, input_exponent=-6),
}


@dataclasses.dataclass
class Case:
    """One call of a layer in both frameworks.

    Args:
        reference: the torch module, with its initial values.
        module: the Linen module, or an NNX one as such.
        leaves: the parameters of both, by name.
        inputs: what the layer is called with, by name; floats are differentiated, but for those in `frozen`.
        frozen: the inputs that are never differentiated: the base weight, positions.
        keep: multiplies the output, 0 where it means nothing (a query that sees no key).
        condition: how much larger a relative error of the weights may become in the exact result.
        dense: (inputs) → what the base model computes in the layer's place, in JAX; None for nothing.
    """

    reference: torch.nn.Module
    module: Any
    leaves: dict[str, np.ndarray]
    inputs: dict[str, Any]
    frozen: tuple[str, ...] = ()
    keep: Any = 1.0
    condition: float = 1.0
    dense: Callable[[dict[str, Any]], Any] | None = None

    @property
    def differentiated(self) -> tuple[str, ...]:
        """The names of the inputs that have a gradient."""
        return tuple(
            name
            for name, value in self.inputs.items()
            if name not in self.frozen and np.asarray(value).dtype.kind == "f"
        )


class AsLinen:
    """An NNX module in a Linen one's place: made when its leaves are, called with them as an argument.

    Args:
        make: rngs → the module.
    """

    def __init__(self, make: Callable[[nnx.Rngs], nnx.Module]) -> None:
        self.make = make

    def init(self, key: jax.Array, /, **inputs: Any) -> dict[str, Any]:
        """The variables after a first call, in which a magnitude meets its weight."""
        module = self.make(nnx.Rngs(key))
        module(**inputs)
        return {"params": nnx.to_pure_dict(nnx.state(module, hylorada_jax.nnx.AdapterParam))}

    def apply(self, variables: dict[str, Any], /, **inputs: Any) -> Any:
        """The output with other leaves."""
        module = self.make(nnx.Rngs(0))
        for path, leaf in traverse_util.flatten_dict(variables["params"]).items():
            functools.reduce(getattr, path, module).set_value(jnp.asarray(leaf))
        return module(**inputs)


class Layer(NamedTuple):
    """A public layer: its class in both packages, how a call of it is drawn, and what is always tried."""

    jax: type[nn.Module] | type[nnx.Module]
    torch: type[torch.nn.Module]
    draw: Callable[["Layer", Draw, np.random.Generator], Case]
    edges: dict[str, Draw]

    @property
    def in_nnx(self) -> bool:
        """It is a layer for NNX."""
        return issubclass(self.jax, nnx.Module)

    def make(self, *args: Any, **options: Any) -> Any:
        """The Flax module, or an NNX one in its place."""
        if not self.in_nnx:
            return self.jax(*args, **options)
        # A module that is shared is made anew too: within a trace only what is made there can be changed.
        own = lambda value: nnx.clone(value) if isinstance(value, nnx.Module) else value
        return AsLinen(
            lambda rngs: self.jax(*args, rngs=rngs, **{name: own(value) for name, value in options.items()})
        )

    def case(self, draw: Draw) -> Case:
        """The call that the facts describe: the same for the same facts."""
        with torch.random.fork_rng():
            torch.manual_seed(draw.seed)  # of the initial values that the leaves start from
            return self.draw(self, draw, np.random.default_rng(draw.seed))


# Linear adapters


def linear(layer: Layer, draw: Draw, rng: np.random.Generator) -> Case:
    """(base + δ·p)·c over a frozen weight; every leaf that the torch module has is drawn."""
    weight, lora_A, lora_B, scale = _weights(draw, rng)
    size = 10.0**draw.input_exponent
    inputs: dict[str, Any] = {
        "x": size * rng.normal(size=(draw.batch, draw.seq, draw.d_in)),
        "base_output": size
        * 10.0**draw.weight_exponent
        * rng.normal(size=(draw.batch, draw.seq, draw.d_out)),
        "base_weight": weight,
    }
    options: dict[str, Any] = {"in_features": draw.d_in, "out_features": draw.d_out}
    options |= {"rank": draw.rank, "alpha": draw.alpha, "use_rslora": draw.use_rslora}
    of_jax: dict[str, Any] = {}
    of_torch: dict[str, Any] = {}
    if layer.torch is not hylorada_torch.LoRALinear:
        options["detach_norm"] = draw.detach_norm
    if layer.torch is hylorada_torch.HyLoRADAv2Linear:
        options["structure_dim"] = STRUCTURE_DIM
        inputs["structure_prior"] = rng.uniform(0.1, 1, (draw.batch, draw.seq, STRUCTURE_DIM))
    if layer.torch is hylorada_torch.HyLoRADAUnified:
        package = hylorada_jax.nnx if layer.in_nnx else hylorada_jax
        of_jax["position_bias"], of_torch["position_bias"] = (
            package.PositionBias(),
            hylorada_torch.PositionBias(),
        )
        inputs["positions"] = rng.integers(40_000, size=(draw.batch, draw.seq))
    reference = layer.torch(dtype=torch.float64, **options, **of_torch)
    if isinstance(reference, hylorada_torch.DoRALinear):
        reference.init_magnitude(torch.tensor(weight))
    row, update, updated = (
        np.linalg.norm(matrix, axis=1)
        for matrix in (weight, scale * lora_B @ lora_A, weight + scale * lora_B @ lora_A)
    )
    # n is the length of a sum of vectors as long as ‖W‖ + ‖s·B·A‖; LoRA has no n.
    has_norm = "magnitude" in dict(reference.named_parameters())
    condition = float(np.max((row + update) / updated)) if has_norm else 1.0
    leaves = {
        "lora_A": lora_A,
        "lora_B": lora_B,
        "magnitude": rng.uniform(2, 3, draw.d_out) * np.where(row > 0, row, 10.0**draw.weight_exponent),
        "magnitude_gate": rng.uniform(0.5, 3),
        "residual_weight": rng.normal(),
        "scale_from_structure": rng.normal(size=STRUCTURE_DIM),
        "position_scale": rng.normal(),
        "position_bias.position_bias": rng.uniform(0.5, 2, 64),
    }
    return Case(
        reference,
        layer.make(**options, **of_jax),
        {name: np.asarray(leaves[name]) for name, _ in reference.named_parameters()},
        inputs,
        frozen=("base_weight", "positions"),
        condition=condition,
        dense=lambda inputs: jnp.einsum("bsi,oi->bso", inputs["x"], inputs["base_weight"]),
    )


def _weights(draw: Draw, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """(W, A, B, s). The update has 0.3 of W's length in every row, and no part of B is lost in B·A."""
    scale = draw.alpha / (np.sqrt(draw.rank) if draw.use_rslora else draw.rank)
    weight = 10.0**draw.weight_exponent * rng.normal(size=(draw.d_out, draw.d_in)) / np.sqrt(draw.d_in)
    length = np.linalg.norm(weight, axis=1, keepdims=True)
    if draw.zero_row:
        weight[-1] = 0
    lora_A = rng.normal(size=(draw.rank, draw.d_in)) / np.sqrt(draw.d_in)
    lora_B = rng.normal(size=(draw.d_out, draw.d_in)) @ lora_A.T
    lora_B *= 0.3 * length / (scale * np.linalg.norm(lora_B @ lora_A, axis=1, keepdims=True))
    if draw.cancelling:
        # A row in A's row space, and an update that leaves a thousandth of it.
        lora_B[0] *= -0.999 / 0.3
        weight[0] = scale * lora_B[0] @ lora_A / -0.999
    return weight, lora_A, lora_B, float(scale)


# The other components


def _moved(
    layer: Layer,
    rng: np.random.Generator,
    inputs: dict[str, Any],
    *args: Any,
    of_torch: tuple[Any, ...] = (),
    **options: Any,
) -> Case:
    """A case of a layer built alike in both frameworks, its leaves half a unit off their start."""
    reference = layer.torch(*of_torch, *args, **options)
    leaves = {
        name: value.detach().numpy().astype(np.float64) + 0.5 * rng.normal(size=value.shape)
        for name, value in reference.named_parameters()
    }
    return Case(reference, layer.make(*(of_torch if layer.in_nnx else ()), *args, **options), leaves, inputs)


def position_bias(layer: Layer, draw: Draw, rng: np.random.Generator) -> Case:
    """Over positions beyond the last bucket's start too, in few buckets and in many."""
    positions = rng.integers(40_000, size=(draw.batch, draw.seq))
    return _moved(layer, rng, {"positions": positions}, int(rng.integers(2, 400)))


def _scores(draw: Draw, rng: np.random.Generator) -> np.ndarray:
    """[batch, heads, q, k] away from 0, so that no gradient is a sum of terms which cancel."""
    shape = (draw.batch, rng.integers(1, 5), draw.seq, draw.seq + rng.integers(3))
    return 10.0**draw.input_exponent * (2 + rng.normal(size=shape))


def direct_attention(layer: Layer, draw: Draw, rng: np.random.Generator) -> Case:
    """A scale and a shift for each head, or for all."""
    scores = _scores(draw, rng)
    return _moved(layer, rng, {"scores": scores}, scores.shape[1], bool(rng.integers(2)))


def positional_attention(layer: Layer, draw: Draw, rng: np.random.Generator) -> Case:
    """Keys before and after the queries, near and far."""
    scores = _scores(draw, rng)
    q, k = (rng.integers(40_000, size=(draw.batch, length)) for length in scores.shape[2:])
    inputs = {"scores": scores, "query_positions": q, "key_positions": k}
    return _moved(layer, rng, inputs, scores.shape[1], bool(rng.integers(2)))


def topk_gate(layer: Layer, draw: Draw, rng: np.random.Generator) -> Case:
    """From one unit on to all of them."""
    options: dict[str, Any] = {"adapter_dim": int(rng.integers(1, 20)), "topk_ratio": rng.uniform(0.01, 1)}
    return _moved(layer, rng, {}, temperature=rng.uniform(0.5, 2), **options)


def sparse_adapter(layer: Layer, draw: Draw, rng: np.random.Generator) -> Case:
    """Both sides of gelu."""
    options: dict[str, Any] = {"adapter_dim": int(rng.integers(1, 20)), "topk_ratio": rng.uniform(0.01, 1)}
    hidden = int(rng.integers(1, 9))
    inputs = {"h": 10.0**draw.input_exponent * rng.normal(size=(draw.batch, draw.seq, hidden))}
    return _moved(layer, rng, inputs, of_torch=(hidden,), **options)  # Linen reads the width from h


def structure_encoder(layer: Layer, draw: Draw, rng: np.random.Generator, **options: Any) -> Case:
    """With and without structure ids, over token counts and over hours."""
    options |= {
        "hidden_size": int(rng.integers(1, 9)),
        "encoding_dim": 2 * int(rng.integers(3, 9)),  # a LayerNorm of two features has no gradient
        "num_buckets": int(rng.integers(2, 70)),
        "max_structure_types": int(rng.integers(1, 9)),
    }
    shape = (draw.batch, draw.seq)
    # Small, for the sine of a large angle has no digits left in float32.
    positions = rng.uniform(0, 10, shape)
    inputs: dict[str, Any] = {"positions": positions if rng.integers(2) else positions.astype(int)}
    if rng.integers(2):
        inputs["structure_ids"] = rng.integers(-2, 12, shape)
    if rng.integers(2):
        inputs["seq_len"] = int(rng.integers(1, 5000))
    return dataclasses.replace(_moved(layer, rng, inputs, **options), frozen=("positions",))


def temporal_encoder(layer: Layer, draw: Draw, rng: np.random.Generator) -> Case:
    """One to four periods."""
    return structure_encoder(layer, draw, rng, num_periods=int(rng.integers(1, 5)))


def shifted_sparse_attention(layer: Layer, draw: Draw, rng: np.random.Generator) -> Case:
    """Grouped heads, groups cut by the row's ends, documents, padding."""
    kv_heads, repeats = rng.integers(1, 4, size=2)
    heads = max(kv_heads * repeats, 2 * kv_heads)
    tokens = (draw.batch, draw.seq)
    arguments = [(2, 0.5), (4, 0.5), (4, 0.25), (6, 1 / 3)][rng.integers(4)]
    inputs: dict[str, Any] = {
        name: rng.normal(size=(*tokens, number, 4))
        for name, number in (("query", heads), ("key", kv_heads), ("value", kv_heads))
    }
    inputs["value"] *= 10.0**draw.input_exponent  # of the others the softmax would leave one key
    keep: Any = 1.0
    if rng.integers(2):
        inputs["segment_ids"] = np.sort(rng.integers(1, 4, tokens), axis=1)
    if rng.integers(2):
        inputs["key_valid"] = rng.integers(4, size=tokens) > 0
        keep = inputs["key_valid"][..., None, None].astype(float)  # padding may see no key at all
    case = _moved(layer, rng, inputs, *arguments)
    causal = Pattern.of_rows(jnp.zeros(tokens, int))
    dense = lambda inputs: attention(inputs["query"], inputs["key"], inputs["value"], causal)
    return dataclasses.replace(case, keep=keep, dense=dense)


LAYERS = {
    "lora": Layer(hylorada_jax.LoRALinear, hylorada_torch.LoRALinear, linear, LINEAR_EDGES),
    "dora": Layer(hylorada_jax.DoRALinear, hylorada_torch.DoRALinear, linear, LINEAR_EDGES),
    "hylorada_v1": Layer(hylorada_jax.HyLoRADALinear, hylorada_torch.HyLoRADALinear, linear, LINEAR_EDGES),
    "hylorada_v2": Layer(
        hylorada_jax.HyLoRADAv2Linear, hylorada_torch.HyLoRADAv2Linear, linear, LINEAR_EDGES
    ),
    "hylorada": Layer(hylorada_jax.HyLoRADAUnified, hylorada_torch.HyLoRADAUnified, linear, LINEAR_EDGES),
    **{
        draw.__name__: Layer(getattr(hylorada_jax, name), getattr(hylorada_torch, name), draw, OTHER_EDGES)
        for draw, name in (
            (position_bias, "PositionBias"),
            (direct_attention, "DirectAttentionAdapter"),
            (positional_attention, "PositionalDAA"),
            (topk_gate, "TopKGate"),
            (sparse_adapter, "SparseAdapter"),
            (structure_encoder, "StructureEncoder"),
            (temporal_encoder, "TemporalStructureEncoder"),
            (shifted_sparse_attention, "ShiftedSparseAttention"),
        )
    },
}

# Over the same mathematics, so that what is always tried is a call and its gradients.
LAYERS |= {
    f"nnx {name}": layer._replace(jax=getattr(hylorada_jax.nnx, layer.jax.__name__), edges={"plain": Draw()})
    for name, layer in LAYERS.items()
}
