"""Checkpoints that others have quantised: most are refused by the name of the method, before weights are
looked for.

Imports neither jax nor torch.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from hylorada_jax.errors import ModelError
from hylorada_jax.text import shown

_ORIGINAL = (
    "Load the checkpoint that it was quantised from; --base-dtype nf4 or int8 (base_dtype= of load_model) "
    "keeps its weights in 4 or 8 bits. GGUF files are read too."
)
_THEN = "AutoModelForCausalLM.from_pretrained(name{}){}.save_pretrained(directory)"
# What makes ordinary weights of a checkpoint in transformers, where something does.
_IN_TRANSFORMERS = {
    "bitsandbytes": _THEN.format("", ".dequantize()"),
    "mxfp4": _THEN.format(", quantization_config=Mxfp4Config(dequantize=True)", ""),
    "compressed-tensors": _THEN.format(
        ", quantization_config=CompressedTensorsConfig(run_compressed=False)", ""
    ),
}


def quant_method(hf: Mapping[str, Any]) -> Any:
    """What config.json says of how a checkpoint's weights became codes; None where it names no method."""
    said = hf.get("quantization_config")
    if not isinstance(said, Mapping):
        return None
    method = said.get("quant_method")
    if method is None and {"load_in_4bit", "load_in_8bit"} & said.keys():
        return "bitsandbytes"  # whose first files do not name it
    return method


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
    way = _IN_TRANSFORMERS.get(method) if isinstance(method, str) else None
    raise ModelError(
        "Of checkpoints that are quantised already, only gpt-oss's in MXFP4 are read.",
        f"quantization_config of quant_method {shown(method)}"
        if method
        else f"quantization_config={shown(said)}",
        f"{_ORIGINAL} Or, in transformers, {way}." if way else _ORIGINAL,
    )
