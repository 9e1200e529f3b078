"""Bloom, whose q, k and v are one layer, and whose attention decays with the distance instead of a table."""

from typing import Any

from hylorada_jax.models.families.family import Family, Flax


def _faults(config: Any) -> dict[str, bool]:
    heads = config.n_head
    odd = f"for {heads} heads, not a power of two, it calls jnp.cat, which jax does not have"
    return {
        "it ignores slow_but_exact": config.slow_but_exact and config.pretraining_tp > 1,
        odd: bool(heads & (heads - 1)),
    }


FAMILIES = [
    Family(
        model_type="bloom",
        q="query_key_value",
        k="query_key_value",
        v="query_key_value",
        o="self_attention.dense",
        mlp_output="mlp.dense_4h_to_h",
        embedding="transformer.word_embeddings",
        tokenizer="BloomTokenizer",
        flax=Flax(can=("loss",), faults=_faults, positions=None),
    )
]
