"""The tokens at which a model's text ends."""

import json
from typing import Any

from hylorada_jax.errors import ModelError
from hylorada_jax.models.gguf import special_ids
from hylorada_jax.models.source import Source


def end_tokens(source: Source) -> tuple[int, ...]:
    """The tokens that end a text, as a model's files name them.

    Args:
        source: of a directory ``eos_token_id``, one or a list, in generation_config.json, or else in
            config.json; of a GGUF file the ends of a text, of a turn and of a message.

    Returns:
        Their ids in the order of the file; none where it names none.

    Raises:
        ModelError: the file is not JSON, or names what is not a token.
    """
    if source.gguf:
        ids = special_ids(source.gguf)
        return tuple(dict.fromkeys(ids[role] for role in ("eos", "eot", "eom") if role in ids))
    file = source.path / "generation_config.json"
    try:
        named = json.loads(file.read_text("utf-8")).get("eos_token_id") if file.is_file() else None
    except (ValueError, AttributeError) as error:
        raise ModelError(
            "generation_config.json must be a JSON object.", f"{file}: {error}", "Download it again."
        ) from error
    return _ids(source.config.get("eos_token_id") if named is None else named, source)


def _ids(named: Any, source: Source) -> tuple[int, ...]:
    ids = () if named is None else tuple(named) if isinstance(named, list) else (named,)
    if not all(isinstance(token, int) for token in ids):
        raise ModelError(
            "eos_token_id must be a token id or a list of them.",
            f"{source.path}: {named!r}",
            "Correct it in generation_config.json or config.json.",
        )
    return tuple(dict.fromkeys(ids))
