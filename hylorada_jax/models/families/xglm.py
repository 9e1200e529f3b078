"""XGLM."""

from hylorada_jax.models.families.family import Family, Flax

FAMILIES = [
    Family(
        model_type="xglm",
        o="out_proj",
        mlp_output="fc2",
        cross_attention="encoder_attn",
        tokenizer="XGLMTokenizer",
        flax=Flax(can=("loss",)),
    )
]
