"""The families of models that are known here, one file each; what spans all of them is derived below.

A file of this package that has ``FAMILIES`` is found by itself. Imports neither jax nor torch.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any

from hylorada_jax.models.families.family import Capability, Decoder, Family, Flax

_FILES = [import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
FAMILIES: dict[str, Family] = {
    family.model_type: family for file in _FILES for family in getattr(file, "FAMILIES", ())
}
DECODERS: dict[str, Decoder] = {name: f.decoder for name, f in FAMILIES.items() if f.decoder}
TEXT_PARTS: dict[str, str] = {whole: name for name, d in DECODERS.items() for whole in d.text_of}
"""A multimodal model_type → the family that its text part is of."""
FLAX: dict[str, Flax] = {name: f.flax for name, f in FAMILIES.items() if f.flax}


def _every(names: Iterable[str | None]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for name in names if name))


_ALL = FAMILIES.values()
ROLES = {role: _every(getattr(family, role) for family in _ALL) for role in "qkvo"}
MLP_OUTPUTS = _every(family.mlp_output for family in _ALL)
CROSS_ATTENTIONS = _every(family.cross_attention for family in _ALL)
ROUTERS = _every(family.router for family in _ALL)
HEADS = _every(head for family in _ALL for head in family.heads)
TOKEN_EMBEDDINGS = _every(family.embedding.rpartition(".")[2] for family in _ALL)
RELATIVE_POSITIONS = _every(family.relative_positions for family in _ALL)


def family_of(model_type: object) -> Family:
    """A family by its name in config.json; for another name one with the usual names that can do nothing."""
    return FAMILIES.get(str(model_type)) or Family(model_type=str(model_type))


def flax_of(model_type: object) -> Flax:
    """How transformers' Flax classes of a family run here; the least of them for another name."""
    return FLAX.get(str(model_type), Flax())


def is_encoder_decoder(config: Mapping[str, Any]) -> bool:
    """Whether a model has an encoder, which reads a text, and a decoder, which answers it.

    Args:
        config: the content of config.json; BartForCausalLM, say, is BART's decoder alone.

    Example:
        >>> is_encoder_decoder({"model_type": "t5"}), is_encoder_decoder({"model_type": "gpt2"})
        (True, False)
    """
    named = config.get("architectures")  # a stranger's file may have anything there
    decoder_alone = isinstance(named, list) and str(*named[:1]).endswith("ForCausalLM")
    paired = family_of(config.get("model_type")).task == "SEQ_2_SEQ_LM" and not decoder_alone
    return paired and config.get("is_encoder_decoder") is not False


def that_can(capability: Capability) -> str:
    """The families whose models have a capability, as an error lists them.

    Args:
        capability: of :class:`Flax`; our decoder has all of them.
    """
    return either(name for name, family in FAMILIES.items() if family.can(capability))


def either(names: Iterable[str]) -> str:
    """Names as a choice.

    Example:
        >>> either(["llama", "mistral", "qwen2"])
        'llama, mistral or qwen2'
    """
    return " or ".join(", ".join(names).rsplit(", ", 1))
