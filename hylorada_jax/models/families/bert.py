"""BERT."""

from typing import Any

from hylorada_jax.models.families.family import Family, Flax


def position_faults(config: Any) -> dict[str, bool]:
    """Those of BERT's Flax class and of its copies."""
    kind = getattr(config, "position_embedding_type", "absolute")
    return {f"it ignores position_embedding_type={kind}": kind != "absolute"}


BERT = Family(
    model_type="bert",
    q="query",
    k="key",
    v="value",
    o="attention.output.dense",
    mlp_output="output.dense",
    cross_attention="crossattention",
    embedding="bert.embeddings.word_embeddings",
    heads=("cls.predictions.decoder", "classifier"),
    task=None,
    tokenizer="BertTokenizer",
    flax=Flax(can=("segments", "daa"), faults=position_faults),
)
FAMILIES = [BERT]
