"""The text part of a multimodal checkpoint: its config, and the names of its tensors and modules.

Transformers has written two layouts of a checkpoint's names, ``language_model.model.…`` and
``model.language_model.…``. The second is also that of its modules, which PEFT goes by.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from msgspec import Struct
from msgspec.structs import fields

from hylorada_jax.errors import ModelError
from hylorada_jax.io.reading import checked
from hylorada_jax.models.bounds import REMEDY, RULE
from hylorada_jax.models.families import DECODERS, FAMILIES, TEXT_PARTS, either

INSIDE = "model.language_model"
"""transformers' name of the module in a multimodal model that ``model`` is in one of text."""

_BODY = re.compile(r"(language_model\.model|model\.language_model)\.")
_HEAD = re.compile(r"(language_model\.)?lm_head\.")
_OTHER_PARTS = re.compile(
    r"(model\.)?((vision|audio)_tower|embed_(vision|audio)|vision_embedder|multi_modal_projector)\."
)
# Keys whose value tells of a part of a multimodal model.
_PARTS = ("text_config", "vision_config", "audio_config")
_TIED = "tie_word_embeddings"
# What a config says once for all of its parts, and of text the whole decides.
_OF_THE_WHOLE = (
    "bos_token_id", "eos_token_id", "pad_token_id", _TIED, "dtype", "torch_dtype", "quantization_config",
    "transformers_version",
)  # fmt: skip


class _Whole(Struct):
    text_config: dict[str, Any]


def text_config(
    whole: Mapping[str, Any], where: object, has_head: Callable[[], bool]
) -> dict[str, Any] | None:
    """The config of the text part of a multimodal model.

    Args:
        whole: the content of config.json.
        where: its directory, for the error.
        has_head: whether the weights have an output head. It decides where the config contradicts itself: of
            ``tie_word_embeddings`` transformers 4 obeys text_config, and 5 the whole. Each then writes a head
            unless it is tied, whatever the other key says.

    Returns:
        What config.json would hold of a model of text alone; None where it is one.

    Raises:
        ModelError: the text part of this model is not one that our decoder reads.
    """
    family = whole.get("model_type")
    if not isinstance(family, str) or family not in TEXT_PARTS:
        parts = [key for key in _PARTS if isinstance(whole.get(key), Mapping)]
        if parts and family not in FAMILIES:
            raise ModelError(
                f"Of multimodal checkpoints the text part is read of {', '.join(TEXT_PARTS)}.",
                f"{where}: model_type {family!r}, with {' and '.join(parts)}",
                f"Take a model of text alone, of type {either(DECODERS)}.",
            )
        return None
    said = checked(dict(whole), _Whole, RULE, ModelError, REMEDY, where).text_config
    own = TEXT_PARTS[family]
    if (named := said.get("model_type", own)) != own:
        raise ModelError(
            f"The text part of a {family} checkpoint is read where it is of type {own}.",
            f"{where}: text_config.model_type {named!r}",
            f"Take a model of text alone, of type {either(DECODERS)}.",
        )
    if not DECODERS[own].whole_caps_logits and said.get("final_logit_softcapping") is not None:
        raise ModelError(
            f"A {family} model bounds no logits (transformers ignores final_logit_softcapping there).",
            f"{where}: final_logit_softcapping={said['final_logit_softcapping']!r}",
            "Set it to null in text_config.",
        )
    above = {key: whole[key] for key in _OF_THE_WHOLE if whole.get(key) is not None}
    of_text = _default(own, _TIED) if said.get(_TIED) is None else said[_TIED]
    of_whole = above.get(_TIED, of_text)
    if isinstance(of_text, bool) and isinstance(of_whole, bool) and of_text != of_whole:
        above[_TIED] = not has_head()
    return {**said, **above, "model_type": own, "architectures": [DECODERS[own].causal_lm]}


def _default(family: str, key: str) -> Any:
    """What a key of config.json is where it is absent."""
    return next(field.default for field in fields(DECODERS[family].keys) if field.name == key)


def text_name(name: str) -> str | None:
    """The name in a model of text of what has this name in a multimodal checkpoint; None: another part's.

    Example:
        >>> text_name("language_model.model.norm.weight"), text_name("language_model.lm_head.weight")
        ('model.norm.weight', 'lm_head.weight')
        >>> text_name("vision_tower.post_layernorm.weight") is None
        True
    """
    if _OTHER_PARTS.match(name):
        return None
    return _HEAD.sub("lm_head.", _BODY.sub("model.", name, count=1), count=1)


def names_in_peft(inside: bool) -> Callable[[str], str]:
    """What PEFT calls a module or a tensor of our decoder.

    Args:
        inside: the base model is the text part of a multimodal one, which PEFT has as a whole.

    Example:
        >>> names_in_peft(True)("model.norm"), names_in_peft(True)("lm_head")
        ('model.language_model.norm', 'lm_head')
    """
    return lambda name: re.sub(r"^model\.", f"{INSIDE}.", name) if inside else name
