"""The tokens at which a model's text ends."""

from msgspec import Struct

from hylorada_jax.errors import ModelError
from hylorada_jax.io.reading import checked
from hylorada_jax.models.bounds import Tokens
from hylorada_jax.models.generation_config import read_generation_config
from hylorada_jax.models.gguf import special_ids
from hylorada_jax.models.source import Source


class _Ends(Struct):
    eos_token_id: Tokens = None


def end_tokens(source: Source, vocabulary: int | None = None) -> tuple[int, ...]:
    """The tokens that end a text, as a model's files name them.

    Args:
        source: of a directory ``eos_token_id``, one or a list, in generation_config.json, or else in
            config.json; of a GGUF file the ends of a text, of a turn and of a message.
        vocabulary: all must be below it; None: any. transformers writes GPT-2's 50256 beside small ones too.

    Returns:
        Their ids in the order of the file; none where it names none.

    Raises:
        ModelError: the file is not JSON, or names what is not a token.
    """
    if source.gguf:
        special = special_ids(source.gguf)  # inside the vocabulary
        return tuple(dict.fromkeys(special[role] for role in ("eos", "eot", "eom") if role in special))
    named = read_generation_config(source).get("eos_token_id")
    named = source.config.get("eos_token_id") if named is None else named
    rule = "eos_token_id must be a token id or a list of them."
    remedy = "Correct it in generation_config.json or config.json."
    ends = checked({"eos_token_id": named}, _Ends, rule, ModelError, remedy, source.path).eos_token_id
    ids = [] if ends is None else ends if isinstance(ends, list) else [ends]
    if vocabulary is not None and (outside := [token for token in ids if token >= vocabulary]):
        raise ModelError(
            rule, f"{source.path}: eos_token_id {outside[0]} in a vocabulary of {vocabulary}", remedy
        )
    return tuple(dict.fromkeys(ids))
