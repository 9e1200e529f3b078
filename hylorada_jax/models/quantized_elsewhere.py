"""Checkpoints that others have quantised: which are read, and that the others are refused by the name of the
method, before weights are looked for.

Imports neither jax nor torch.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from hylorada_jax.errors import ModelError
from hylorada_jax.text import shown

MXFP4 = "mxfp4"
"""What ``models.mxfp4`` reads, of the families that say so."""
BITSANDBYTES_4BIT = "bitsandbytes_4bit"
"""What ``models.bitsandbytes`` reads, of each family that our decoder does."""

# Refused: a layer in 8 bits rounds what it reads too, so that it computes no product with its weights.
_BITSANDBYTES_8BIT = "bitsandbytes_8bit"
_ORIGINAL = (
    "Load the checkpoint that it was quantised from; --base-dtype nf4 or int8 (base_dtype= of load_model) "
    "keeps its weights in 4 or 8 bits. GGUF files are read too."
)
_THEN = "AutoModelForCausalLM.from_pretrained(name{}){}.save_pretrained(directory)"
# What makes ordinary weights of a checkpoint in transformers, where something does.
_IN_TRANSFORMERS = {
    _BITSANDBYTES_8BIT: _THEN.format("", ".dequantize()"),
    BITSANDBYTES_4BIT: _THEN.format("", ".dequantize()"),
    MXFP4: _THEN.format(", quantization_config=Mxfp4Config(dequantize=True)", ""),
    "compressed-tensors": _THEN.format(
        ", quantization_config=CompressedTensorsConfig(run_compressed=False)", ""
    ),
}


def quant_method(hf: Mapping[str, Any]) -> str | None:
    """What config.json says of how a checkpoint's weights became codes; None where it names no method.

    Example:
        >>> quant_method({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}})
        'bitsandbytes_4bit'
    """
    said = hf.get("quantization_config")
    if not isinstance(said, Mapping):
        return None
    method = said.get("quant_method")
    # The first files of bitsandbytes do not name it; none names which of its two methods it is.
    if method == "bitsandbytes" or (method is None and {"load_in_4bit", "load_in_8bit"} & said.keys()):
        return BITSANDBYTES_4BIT if said.get("load_in_4bit") is True else _BITSANDBYTES_8BIT
    return method if method is None or isinstance(method, str) else shown(method)


def refuse_quantized(hf: Mapping[str, Any], reads: Sequence[str] = ()) -> None:
    """Refuses a checkpoint whose weights are codes.

    Args:
        hf: the content of config.json.
        reads: the methods whose codes are read.

    Raises:
        ModelError: it has a ``quantization_config`` of another method, which is named.
    """
    said, method = hf.get("quantization_config"), quant_method(hf)
    if said is None or method in reads:
        return
    way = method and _IN_TRANSFORMERS.get(method)
    raise ModelError(
        "Of checkpoints that are quantised already, our decoder reads those of bitsandbytes in 4 bits, and "
        "gpt-oss's in MXFP4.",
        f"quantization_config of quant_method {shown(method)}"
        if method
        else f"quantization_config={shown(said)}",
        f"{_ORIGINAL} Or, in transformers, {way}." if way else _ORIGINAL,
    )
