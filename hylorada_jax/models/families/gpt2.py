"""GPT-2, whose q, k and v are one layer."""

from typing import Any

from hylorada_jax.models.families.family import Family, Flax


def _faults(config: Any) -> dict[str, bool]:
    return {
        "it ignores scale_attn_weights=False": not config.scale_attn_weights,
        "it ignores scale_attn_by_inverse_layer_idx": config.scale_attn_by_inverse_layer_idx,
    }


FAMILIES = [
    Family(
        model_type="gpt2",
        q="attn.c_attn",
        k="attn.c_attn",
        v="attn.c_attn",
        o="attn.c_proj",
        mlp_output="mlp.c_proj",
        cross_attention="crossattention",
        embedding="transformer.wte",
        tokenizer="GPT2Tokenizer",
        flax=Flax(can=("loss", "segments", "groups", "daa"), faults=_faults),
    )
]
