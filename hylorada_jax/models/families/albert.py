"""ALBERT: BERT, with layers that share their weights."""

from dataclasses import replace

from hylorada_jax.models.families.bert import BERT, position_faults
from hylorada_jax.models.families.family import Flax

FAMILIES = [
    replace(
        BERT,
        model_type="albert",
        o="attention.dense",
        mlp_output="ffn_output",
        cross_attention=None,
        embedding="albert.embeddings.word_embeddings",
        heads=("predictions.decoder", "classifier"),
        tokenizer=None,
        flax=Flax(faults=position_faults, depths=("num_hidden_groups", "inner_group_num")),
    )
]
