"""The files beside a tokenizer.json, and the types of what they say."""

from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from hylorada_jax.errors import ModelError
from hylorada_jax.io.reading import checked, read_bounded, read_json
from hylorada_jax.models.inside import file_inside

RULE = "A tokenizer's files must be complete JSON, as transformers writes them, of one that works."
REMEDY = "Download them again, or take another model."
MAX_TOKEN = 2**12
"""Characters of a token, so many may each id of an answer become; Llama 3: 128."""

TokenText = Annotated[str, Meta(max_length=MAX_TOKEN)]


class Token(msgspec.Struct):
    """A token and how it is found in a text; what is absent depends on where it stands."""

    content: TokenText
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    special: bool = False


_Named = TokenText | Token


class Roles(msgspec.Struct):
    """The special tokens that every model may have, in the order in which new ones get their ids."""

    bos_token: _Named | None = None
    eos_token: _Named | None = None
    unk_token: _Named | None = None
    sep_token: _Named | None = None
    pad_token: _Named | None = None
    cls_token: _Named | None = None
    mask_token: _Named | None = None


class SpecialTokensMap(Roles):
    """special_tokens_map.json."""

    additional_special_tokens: list[_Named] | None = None


class _Template(msgspec.Struct):
    name: str
    template: str


class TokenizerConfig(SpecialTokensMap):
    """tokenizer_config.json, as far as it is heeded."""

    tokenizer_class: str | None = None
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    add_prefix_space: bool | None = None
    split_special_tokens: bool | None = None
    clean_up_tokenization_spaces: bool | None = None
    added_tokens_decoder: dict[Annotated[str, Meta(pattern="^[0-9]{1,10}$")], _Named] = {}
    extra_special_tokens: list[_Named] | dict[str, _Named] | None = None
    chat_template: str | list[_Template] | dict[str, str] | None = None


AddedTokens = dict[TokenText, Annotated[int, Meta(ge=0)]]
"""added_tokens.json: ids by text."""


def read_settings(directory: Path, name: str, kind: type[Any]) -> dict[str, Any]:
    """What a file beside tokenizer.json says.

    Args:
        directory: the model's.
        name: of the file, which need not be there.
        kind: the types of its values.

    Returns:
        Its content; nothing of a file that is not there.

    Raises:
        ModelError: it cannot be read, lies elsewhere, or has a value of another type.
    """
    if (file := file_inside(directory, name)) is None:
        return {}
    found = read_json(file, RULE, ModelError, REMEDY)
    # Besides those of every model, any name may be that of a token: image_token.
    tokens = {role: token for role, token in found.items() if names_token(role, token)}
    for value, types in ((found, kind), (tokens, dict[str, _Named])):
        checked(value, types, "The settings of a tokenizer must be of their types.", ModelError, REMEDY, file)
    return found


def names_token(role: str, token: Any) -> bool:
    """Whether an entry of the settings names a special token; "add_bos_token" does not."""
    return role.endswith("_token") and isinstance(token, str | dict)


def read_text(file: Path) -> str:
    """A text file in UTF-8.

    Args:
        file: is there.

    Raises:
        ModelError: it cannot be read, or is too large.
    """
    rule = "A chat template must be a text in UTF-8."
    try:
        return read_bounded(file, rule, ModelError, REMEDY).decode()
    except UnicodeDecodeError as error:
        raise ModelError(rule, f"{file}: {error}", REMEDY) from error
