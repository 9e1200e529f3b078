"""OPT."""

from typing import Any

from hylorada_jax.models.families.family import Family, Flax


def _faults(config: Any) -> dict[str, bool]:
    return {
        "it ignores enable_bias=False": not config.enable_bias,
        "it ignores layer_norm_elementwise_affine=False": not config.layer_norm_elementwise_affine,
    }


FAMILIES = [
    Family(
        model_type="opt",
        o="out_proj",
        mlp_output="fc2",
        embedding="model.decoder.embed_tokens",
        tokenizer="GPT2Tokenizer",
        flax=Flax(can=("loss",), faults=_faults),
    )
]
