"""What several commands do with their options."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import ConfigError
from hylorada_jax.training.corpus import Document

if TYPE_CHECKING:
    from hylorada_jax.models.tokenizer import Tokenizer
    from hylorada_jax.surgery.plan import Site


PACKAGED_MODEL = "smollm2-135m"
Dtype = Literal["float32", "bfloat16"]
Structure = Literal["code"]


def planned(init: Callable[[Any], Any], config: HyLoRADAConfig) -> "tuple[Site, ...]":
    """What the config trains in the model of an initialisation, from shapes alone."""
    from hylorada_jax.surgery.modules import find_modules
    from hylorada_jax.surgery.plan import plan

    return plan(find_modules(init), config)


def require_encoder(config: HyLoRADAConfig | None, structure: str) -> None:
    """Refuses structure for what cannot read it: a base model, or another method than hylorada_v2."""
    if config is None or not config.use_hylorada_v2:
        raise ConfigError(
            "Structure is read by the structure encoder, which only method hylorada_v2 has",
            f"--structure {structure} for " + ("no adapter" if config is None else f"method {config.method}"),
            "Choose hylorada_v2, or leave --structure out.",
        )


def check_adapter(adapter: Path | None, structure: str | None) -> None:
    """Reports a damaged adapter, and structure that it cannot read, before the model is loaded."""
    from hylorada_jax.io.adapter_files import read_adapter

    config = None if adapter is None else read_adapter(adapter)[1]
    if structure:
        require_encoder(config, structure)


def tokens_of(
    texts: list[Document], tokenizer: "Tokenizer", structure: Structure | None
) -> tuple[list[Any], list[Any] | None]:
    """The token ids of each document, and their structure ids where these are asked for."""
    from hylorada_jax.training.data import tokenize, tokenize_with_structure

    if structure is None:
        return tokenize(texts, tokenizer), None
    found = tokenize_with_structure(texts, tokenizer, structure)
    told = f"structure: {len(found.unparsed)} of {len(texts)} documents do not parse: depth by indentation"
    print(", ".join([told, *found.unparsed[:3]]), file=sys.stderr)
    return found.tokens, found.structure_ids


def prompt_of(
    text: str, tokenizer: "Tokenizer", structure: Structure | None, *, chat: bool = False
) -> tuple[list[int], dict[str, list[list[int]]]]:
    """The token ids of a prompt, and what generation is told beside them; a chat brings its bos token."""
    ids, offsets = tokenizer.encode_with_offsets(text) if chat else tokenizer.encode_prompt(text)
    if structure is None:
        return ids, {}

    from hylorada_jax.structure.code import token_depths

    return ids, {"structure_ids": [token_depths(text, offsets)[0].tolist()]}


def loaded(model: str, adapter: Path | None, dtype: str) -> Any:
    """The model, with the adapter where one is named; without, behind the face that all base models show."""
    import jax.numpy as jnp

    from hylorada_jax.model import HyLoRADAModel
    from hylorada_jax.models.face import as_base
    from hylorada_jax.models.loading import load_model

    base = as_base(load_model(model, dtype=jnp.dtype(dtype)))
    return base if adapter is None else HyLoRADAModel.from_pretrained(base, adapter)


def print_result(result: dict[str, Any], as_json: bool, text: str) -> None:
    """Prints a command's result: one JSON object, or the text."""
    print(json.dumps(result) if as_json else text)
