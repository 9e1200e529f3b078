"""DistilBERT."""

from hylorada_jax.models.families.family import Family, Flax

FAMILIES = [
    Family(
        model_type="distilbert",
        q="q_lin",
        k="k_lin",
        v="v_lin",
        o="out_lin",
        mlp_output="ffn.lin2",
        embedding="distilbert.embeddings.word_embeddings",
        heads=("vocab_projector", "classifier"),
        task=None,
        flax=Flax(),
    )
]
