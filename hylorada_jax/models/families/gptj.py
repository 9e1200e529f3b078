"""GPT-J, whose head has a bias."""

from hylorada_jax.models.families.family import Family, Flax

FAMILIES = [
    Family(
        model_type="gptj",
        o="out_proj",
        mlp_output="mlp.fc_out",
        embedding="transformer.wte",
        flax=Flax(
            faults=lambda config: {"it cannot tie its head, which has a bias": config.tie_word_embeddings}
        ),
    )
]
