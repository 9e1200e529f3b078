"""A trained adapter as two files: adapter_config.json and adapter_model.safetensors.

Tensors stand under the base model's HF module names, one layer each, at the layer's own rank:
``model.layers.3.self_attn.q_proj.lora_A`` is [r, d_in]. The config file carries the settings, what the
adapter was trained on, and checksums, so that a file that was cut or altered is never loaded.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from safetensors.numpy import save as dump_safetensors

from hylorada_jax import __version__
from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import CheckpointError
from hylorada_jax.io.bucket import is_in_bucket
from hylorada_jax.io.files import any_path, kind_of, make_directory, refuse_unusable, write_all
from hylorada_jax.models.chat_template import MAX_TEMPLATE
from hylorada_jax.models.inside import file_inside
from hylorada_jax.structure.code import DOMAINS
from hylorada_jax.text import short, shown, well_formed

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
IN_RUN = "adapter"
"""The directory of a run's adapter within that of the run."""
FORMAT_VERSION = 1
# What a base's identity says of its weights, where it was asked for; compared only where that is asked for.
WEIGHTS = ("dtype", "weights_sha256")


def write_adapter(
    directory: str | Path,
    tensors: Mapping[str, np.ndarray],
    config: HyLoRADAConfig,
    base: Mapping[str, Any],
    *,
    overwrite: bool = False,
    chat_template: str | None = None,
    structure: str | None = None,
) -> None:
    """Writes an adapter; a reader sees either the old one or the new one, or an error, never a mixture.

    Args:
        directory: made if it does not exist.
        tensors: {layer name + "." + leaf name: array}; narrow floats become float32, which changes no value.
        config: the adapter's settings.
        base: what identifies the base model; compared on reading.
        overwrite: replace an adapter that is already there.
        chat_template: with which it was trained, where that is not its base's own.
        structure: what it was trained to read of a text; None: of ids of the user's own, or of none.

    Raises:
        CheckpointError: an adapter is already there, a tensor is not finite, the template or the structure
            could not be read again, or the disk is full.
    """
    check_beside(chat_template, structure)
    directory = any_path(directory)
    if overwrite:
        refuse_unusable(directory, in_bucket=True)
    else:
        refuse_existing(directory, "; overwrite=True replaces the adapter")
    check_finite(tensors)
    tensors = {name: _widened(tensor) for name, tensor in tensors.items()}
    weights = _serialised(tensors)
    body = {
        "format": "hylorada",
        "format_version": FORMAT_VERSION,
        "hylorada_version": __version__,
        "base_model": dict(base),
        "config": config.to_dict(),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
    }
    if chat_template is not None:
        body["chat_template"] = chat_template
    if structure is not None:
        body["structure"] = structure
    write_files(directory, weights, render(body))


def write_files(
    directory: Path, weights: bytes, config: bytes, beside: Mapping[str, bytes] = MappingProxyType({})
) -> None:
    """Writes the content of an adapter's files, all or none; a CheckpointError where that fails."""
    files = {**beside, WEIGHTS_NAME: weights, CONFIG_NAME: config}
    try:
        make_directory(directory)
        write_all({directory / name: content for name, content in files.items()})
    except OSError as error:
        raise CheckpointError(
            "The adapter's directory must be writable.",
            f"{directory}: {error}",
            "Free some space, or choose another directory.",
        ) from error


def refuse_existing(directory: str | Path, more: str = "") -> None:
    """Raises a CheckpointError where an adapter is already, or none can be written; changes nothing.

    Args:
        directory: for an adapter.
        more: what the remedy adds.
    """
    directory = any_path(directory)
    refuse_unusable(directory, in_bucket=True)
    if any(kind_of(directory / name) for name in (CONFIG_NAME, WEIGHTS_NAME)):
        raise CheckpointError(
            "An existing adapter is not overwritten unless asked to.",
            directory,
            f"Choose another directory, or remove this one{more}.",
        )


def adapter_file(directory: Path, name: str) -> Path:
    """The place of an adapter's file, there or not; a CheckpointError where it lies outside the directory."""
    if not is_in_bucket(directory):  # where there are no links
        file_inside(directory, name, CheckpointError)
    return directory / name


def digest(tensors: Mapping[str, np.ndarray]) -> str:
    """A checksum of an adapter's tensors."""
    return hashlib.sha256(_serialised(tensors)).hexdigest()


def check_beside(chat_template: object, structure: object) -> None:
    """Raises a CheckpointError for a chat template or a structure that an adapter's file cannot hold."""
    if chat_template is not None:
        _check_template(chat_template)
    if structure is not None and structure not in DOMAINS:
        raise CheckpointError(
            "The structure that is saved with an adapter is one that is read off texts.",
            shown(structure),
            f"Give {' or '.join(DOMAINS)}, or None.",
        )


def _check_template(template: object) -> None:
    rule = f"A chat template must be text of at most {MAX_TEMPLATE:,} characters, all of which UTF-8 has."
    if not isinstance(template, str):
        raise CheckpointError(rule, shown(template), "Give one template as text: of several, take one.")
    if len(template) > MAX_TEMPLATE or well_formed(template) != template:
        received = f"{len(template):,} characters: {shown(template)}"
        raise CheckpointError(rule, received, "Correct it, or give another.")


def check_finite(tensors: Mapping[str, np.ndarray]) -> None:
    """Raises a CheckpointError that names the tensors with values not finite in float32, if there are any."""
    if broken := [name for name, tensor in tensors.items() if not _is_finite(tensor)]:
        rule = "Every tensor must be finite, in float32 too."
        raise CheckpointError(rule, short(broken), "Use an older checkpoint.")


def check_base(saved: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Compares what the adapter was trained on with the model at hand; name and weights may differ.

    Raises:
        CheckpointError: architecture or shapes differ; both sides are listed.
    """
    differing = [
        key for key in sorted({*saved, *given} - {"name", *WEIGHTS}) if saved.get(key) != given.get(key)
    ]
    if differing:
        raise CheckpointError(
            "An adapter fits only the base model it was trained on.",
            "; ".join(
                f"{key}: adapter {saved.get(key)!r}, model {given.get(key)!r}" for key in ("name", *differing)
            ),
            f"Load the base model {saved.get('name')!r}.",
        )


def check_weights(saved: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Compares the weights that the adapter was trained on with those at hand.

    Args:
        saved: the identity of the base, from the adapter's file.
        given: the identity of the model at hand, or its "dtype" alone, before its weights are read.

    Raises:
        CheckpointError: the adapter does not say, or the weights or their dtype differ; both are shown.
    """
    if not set(WEIGHTS) <= set(saved):
        raise CheckpointError(
            "Weights can be checked where the adapter says which it was trained on.",
            f"an adapter of {saved.get('name')!r} that does not",
            "Leave the check out. A run records its weights, and so does save_pretrained with weights=True.",
        )
    if differing := [key for key in WEIGHTS if key in given and saved[key] != given[key]]:
        raise CheckpointError(
            "The base's weights and their dtype must be those that the adapter was trained on.",
            "; ".join(f"{key}: adapter {saved[key]}, model {given[key]}" for key in differing),
            f"Load {saved.get('name')!r} in {saved['dtype']} and as it was then, or leave the check out.",
        )


def _is_finite(tensor: np.ndarray) -> bool:
    with np.errstate(over="ignore"):
        return bool(np.isfinite(tensor.astype(np.float32, copy=False)).all())


def _widened(tensor: np.ndarray) -> np.ndarray:
    return tensor.astype(np.float32) if tensor.dtype.name in ("bfloat16", "float16") else tensor


def _serialised(tensors: Mapping[str, np.ndarray]) -> bytes:
    return dump_safetensors({name: np.asarray(tensor, order="C") for name, tensor in tensors.items()})


def render(body: Mapping[str, Any]) -> bytes:
    """The config file of a body: its checksum added."""

    def text(body: Mapping[str, Any], **how: Any) -> bytes:
        # The base's path may have bytes that are not UTF-8: surrogates to Python, and escaped in JSON.
        return json.dumps(body, ensure_ascii=False, **how).encode(errors="backslashreplace")

    return text({**body, "sha256": hashlib.sha256(text(body, sort_keys=True)).hexdigest()}, indent=2)
