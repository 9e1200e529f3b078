"""The tables of docs/models.md, from the code: ``python -m parity_tests.tables`` prints them."""

from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp

from hylorada_jax.models.causal_lm import param_shapes
from hylorada_jax.models.decoder_config import DecoderConfig
from hylorada_jax.models.families import FAMILIES
from hylorada_jax.models.families.family import Family
from hylorada_jax.models.quantize import shapes_kept
from hylorada_jax.planning.shapes import SHAPES

_SHAPES = {
    "Llama 3.2 1B": "llama-1b",
    "Llama 3.1 8B": "llama-8b",
    "Qwen2.5 32B": "llama-32b",
    "Llama 3.1 70B": "llama-70b",
}


def families() -> str:
    """What each family's models can do; those that can do the same share a row."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for name, family in FAMILIES.items():
        rows.setdefault(_abilities(family), []).append(name)
    head = (
        "`model_type`",
        "runs in",
        "adapters",
        "loss, trainer",
        "DAA",
        "S²-Attn",
        "packing",
        "GGUF",
        "int8, nf4",
    )
    return _table(head, ((", ".join(names), *abilities) for abilities, names in rows.items()))


def _abilities(family: Family) -> tuple[str, ...]:
    decoder = family.decoder
    linear = "linear" if family.mlp_output is None else "linear, sparse"
    can = [family.can(what) for what in ("loss", "daa", "groups", "segments")]
    reads = [decoder is not None and decoder.gguf is not None, decoder is not None]
    return (
        "our decoder" if decoder else "HF's Flax",
        linear,
        *("yes" if able else "no" for able in can + reads),
    )


def weights() -> str:
    """What the frozen weights take, in GiB, by the dtype of linear layers."""
    head = "weights, GiB", "bfloat16", "int8", "nf4"
    return _table(head, ((name, *_sizes(shape)) for name, shape in _SHAPES.items()))


def _sizes(shape: str) -> list[str]:
    params = param_shapes(DecoderConfig.from_hf(SHAPES[shape]), jnp.bfloat16)
    kept = (shapes_kept(params, base_dtype) for base_dtype in (None, "int8", "nf4"))
    return [f"{sum(map(_bytes, jax.tree.leaves(tree))) / 2**30:.1f}" for tree in kept]


def _bytes(leaf: jax.ShapeDtypeStruct) -> float:
    return leaf.size * (0.5 if leaf.dtype == jnp.uint4 else leaf.dtype.itemsize)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


if __name__ == "__main__":
    print(families(), weights(), sep="\n\n")
