"""What is known of other libraries' classes, by their names: none of them is imported here."""

import re
from collections.abc import Callable

_TUNIX = "tunix.models.{}.model.{}"

EINSUMS = {_TUNIX.format(family, "Einsum") for family in ("gemma3", "llama3", "qwen3")}
"""Linear modules whose kernel is ``w``, and whose equation ``einsum_str``."""

# Gemma 3 is left out: it keeps keys and values in one kernel, as no checkpoint of Hugging Face's does.
_RENAMED = {_TUNIX.format("llama3", "Llama3"), _TUNIX.format("qwen3", "Qwen3")}


def qualified(cls: type) -> str:
    """The name that a class is known by here."""
    return f"{cls.__module__}.{cls.__qualname__}"


def names_of(model: object) -> Callable[[str], str]:
    """The function from a path in a model to the name of its module: Hugging Face's, where that is known."""
    if _RENAMED.isdisjoint(map(qualified, type(model).__mro__)):
        return lambda path: path
    return lambda path: re.sub(r"^layers\.(\d+)\.(attn\.)?", _hugging_faces, path)


def _hugging_faces(found: re.Match[str]) -> str:
    return f"model.layers.{found[1]}." + ("self_attn." if found[2] else "")
