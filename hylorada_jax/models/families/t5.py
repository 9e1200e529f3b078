"""T5, and mT5, whose logits are never scaled."""

from dataclasses import replace
from functools import partial
from typing import Any

from hylorada_jax.models.families.family import Family, Flax


def _settings(said: dict[str, Any], *, scaled: bool) -> dict[str, Any]:
    """A head of its own where the logits are not scaled, for that is what transformers 4 reads untied as.

    transformers 5 writes tie_word_embeddings for every T5, and apart from it whether the logits are scaled,
    which it leaves out for mT5.
    """
    return said if said.get("scale_decoder_outputs", scaled) else said | {"tie_word_embeddings": False}


_FLAX = Flax(
    can=("daa",), positions=None, divisors=(), repaired=True, settings=partial(_settings, scaled=True)
)
_T5 = Family(
    model_type="t5",
    q="q",
    k="k",
    v="v",
    o="o",
    mlp_output="DenseReluDense.wo",
    cross_attention="EncDecAttention",
    embedding="shared",
    heads=("lm_head", "classifier"),
    relative_positions="relative_attention_bias",
    task="SEQ_2_SEQ_LM",
    tokenizer="T5Tokenizer",
    flax=_FLAX,
)
_OF_MT5 = replace(_FLAX, settings=partial(_settings, scaled=False))

FAMILIES = [
    _T5,
    replace(_T5, model_type="mt5", tokenizer=None, flax=_OF_MT5),
]
