"""BART and its kin, an encoder and a decoder: mBART, Blenderbot, Pegasus, Marian."""

from typing import Any

from hylorada_jax.models.families.family import Family, Flax


def _table_faults(config: Any) -> dict[str, bool]:
    apart = not getattr(config, "share_encoder_decoder_embeddings", True)
    return {"it ignores share_encoder_decoder_embeddings=False": apart}


_DEPTHS = ("encoder_layers", "decoder_layers")
_HEADS = ("num_attention_heads", "decoder_attention_heads")
_TRAINED = Flax(depths=_DEPTHS, divisors=_HEADS)
# Their positions are sines, which a loop of Python's makes.
_SINES = Flax(depths=_DEPTHS, divisors=_HEADS, faults=_table_faults, largest_table=2**21)

FAMILIES = [
    Family(
        model_type=model_type,
        o="out_proj",
        mlp_output="fc2",
        cross_attention="encoder_attn",
        embedding="model.shared",
        task="SEQ_2_SEQ_LM",
        tokenizer=tokenizer,
        flax=flax,
    )
    for model_type, tokenizer, flax in (
        ("bart", "BartTokenizer", _TRAINED),
        ("mbart", None, _TRAINED),
        ("blenderbot", None, _TRAINED),
        ("blenderbot-small", None, _TRAINED),
        ("pegasus", None, _SINES),
        ("marian", None, _SINES),
    )
]
