"""RoBERTa and XLM-RoBERTa: BERT, with positions that begin after the padding token's."""

from dataclasses import replace

from hylorada_jax.models.families.bert import BERT, position_faults
from hylorada_jax.models.families.family import Flax

_ROBERTA = replace(
    BERT,
    model_type="roberta",
    embedding="roberta.embeddings.word_embeddings",
    heads=("lm_head.decoder", "classifier"),
    tokenizer="RobertaTokenizer",
    flax=Flax(faults=position_faults, positions="after padding"),
)
FAMILIES = [_ROBERTA, replace(_ROBERTA, model_type="xlm-roberta", tokenizer=None)]
