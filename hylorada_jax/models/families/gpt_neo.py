"""GPT-Neo."""

from hylorada_jax.models.families.family import Family, Flax

FAMILIES = [
    Family(
        model_type="gpt_neo",
        o="out_proj",
        mlp_output="mlp.c_proj",
        embedding="transformer.wte",
        tokenizer="GPT2Tokenizer",
        flax=Flax(can=("loss",)),
    )
]
