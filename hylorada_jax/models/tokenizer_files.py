"""A tokenizer as the files that transformers loads."""

from pathlib import Path
from typing import Any

from hylorada_jax.io.files import write_json
from hylorada_jax.models.tokenizer import Tokenizer


def write_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json, for a model that came without them, as a GGUF file.

    Where more than one token ends a text, generation_config.json names them.

    Args:
        tokenizer: from :func:`hylorada_jax.load_tokenizer`.
        directory: exists.

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
    if len(tokenizer.end_token_ids) > 1:
        write_json(directory / "generation_config.json", {"eos_token_id": [*tokenizer.end_token_ids]})
