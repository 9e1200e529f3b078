"""A tokenizer as the files that transformers loads."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hylorada_jax.io.files import write_json
from hylorada_jax.models.generation_config import FILE
from hylorada_jax.models.tokenizer import Tokenizer


def write_tokenizer(
    tokenizer: Tokenizer, directory: Path, generation: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """Writes tokenizer.json and tokenizer_config.json, for a model that came without them, as a GGUF file.

    With settings of generation, or where more than one token ends a text, also generation_config.json.

    Args:
        tokenizer: from :func:`hylorada_jax.load_tokenizer`.
        directory: exists.
        generation: the settings.

    Example:
        >>> import tempfile
        >>> from hylorada_jax.models.tokenizer import load_tokenizer
        >>> with tempfile.TemporaryDirectory() as place:
        ...     write_tokenizer(load_tokenizer("smollm2-135m"), Path(place))
        ...     sorted(path.name for path in Path(place).iterdir())
        ['tokenizer.json', 'tokenizer_config.json']
    """
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # what tokenizer.json says, and nothing added to it
        "clean_up_tokenization_spaces": False,
        # Else transformers also makes token_type_ids, which generate() of a causal model refuses.
        "model_input_names": ["input_ids", "attention_mask"],
        **tokenizer.special_tokens,
    }
    template = tokenizer.chat_template
    if isinstance(template, str):
        settings["chat_template"] = template
    elif template is not None:
        settings["chat_template"] = [{"name": name, "template": text} for name, text in template.items()]
    # Not its own save, whose errors are no OSErrors.
    (directory / "tokenizer.json").write_text(tokenizer.backend.to_str(pretty=True), "utf-8")
    write_json(directory / "tokenizer_config.json", settings)
    ends = tokenizer.end_token_ids
    if generation or len(ends) > 1:
        # Where there is this file, transformers looks for the ends in no other.
        write_json(directory / FILE, {**generation, **({"eos_token_id": [*ends]} if ends else {})})
