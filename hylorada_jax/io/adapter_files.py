"""A trained adapter as two files: adapter_config.json and adapter_model.safetensors.

Tensors stand under the base model's HF module names, one layer each, at the layer's own rank:
``model.layers.3.self_attn.q_proj.lora_A`` is [r, d_in]. The config file carries the settings, what the
adapter was trained on, and checksums, so that a file that was cut or altered is never loaded.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as dump_safetensors

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import CheckpointError
from hylorada_jax.io.files import write_whole

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
FORMAT_VERSION = 1


def write_adapter(
    directory: str | Path,
    tensors: Mapping[str, np.ndarray],
    config: HyLoRADAConfig,
    base: Mapping[str, Any],
    *,
    overwrite: bool = False,
) -> None:
    """Writes an adapter; a reader sees either the old one or the new one, or an error, never a mixture.

    Args:
        directory: made if it does not exist.
        tensors: {layer name + "." + leaf name: array}.
        config: the adapter's settings.
        base: what identifies the base model; compared on reading.
        overwrite: replace an adapter that is already there.

    Raises:
        CheckpointError: an adapter is already there, a tensor is not finite, or the disk is full.
    """
    directory = Path(directory)
    if not overwrite and any((directory / name).exists() for name in (CONFIG_NAME, WEIGHTS_NAME)):
        raise CheckpointError(
            "An adapter is not overwritten unasked",
            directory,
            "Choose another directory, or pass overwrite=True.",
        )
    if broken := [name for name, tensor in tensors.items() if not np.isfinite(tensor).all()]:
        raise CheckpointError(
            "Every saved tensor must be finite", _short(broken), "Go back to an earlier checkpoint."
        )
    weights = dump_safetensors({name: np.asarray(tensor, order="C") for name, tensor in tensors.items()})
    body = {
        "format": "hylorada",
        "format_version": FORMAT_VERSION,
        "base_model": dict(base),
        "config": config.to_dict(),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
    }
    text = json.dumps({**body, "sha256": _digest(body)}, indent=2, ensure_ascii=False)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_whole(directory / WEIGHTS_NAME, weights)
        write_whole(directory / CONFIG_NAME, text.encode())
    except OSError as error:
        raise CheckpointError(
            "The adapter's directory must be writable",
            f"{directory}: {error}",
            "Free some space, or choose another directory.",
        ) from error


def read_adapter(directory: str | Path) -> tuple[dict[str, np.ndarray], HyLoRADAConfig, dict[str, Any]]:
    """Reads an adapter that :func:`write_adapter` wrote, whole or not at all.

    Args:
        directory: holds the two files.

    Returns:
        The tensors, the settings, and what identifies the base model.

    Raises:
        CheckpointError: a file is missing, cut, altered, of another version, or holds non-finite values.
    """
    directory = Path(directory)
    body = _read_config(directory / CONFIG_NAME)
    raw = _read(directory / WEIGHTS_NAME)
    if hashlib.sha256(raw).hexdigest() != body["weights_sha256"]:
        raise CheckpointError(
            f"{WEIGHTS_NAME} must be the file that {CONFIG_NAME} describes",
            f"{directory / WEIGHTS_NAME}, {len(raw)} bytes, whose checksum differs",
            "The file was cut or altered: copy it again, or use an older checkpoint.",
        )
    try:
        tensors = load_safetensors(raw)
    except SafetensorError as error:
        raise CheckpointError(
            "An adapter must be a safetensors file", f"{directory}: {error}", "Save it again."
        ) from error
    if broken := [name for name, tensor in tensors.items() if not np.isfinite(tensor).all()]:
        raise CheckpointError("Every tensor must be finite", _short(broken), "Use an older checkpoint.")
    return tensors, HyLoRADAConfig.from_dict(body["config"]), body["base_model"]


def check_keys(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Compares the tensors of a file with those the model needs, by name and shape.

    Raises:
        CheckpointError: they differ; both sides are listed.
    """
    missing, extra = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    shapes = [
        f"{n} {found[n]} for {wanted[n]}" for n in sorted(set(found) & set(wanted)) if found[n] != wanted[n]
    ]
    if missing or extra or shapes:
        raise CheckpointError(
            "The adapter's tensors must be those that the model and the config call for",
            f"missing {_short(missing)}; unexpected {_short(extra)}; of another shape {_short(shapes)}",
            "Load it on the base model it was trained on.",
        )


def check_base(saved: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Compares what the adapter was trained on with the model at hand; the name alone may differ.

    Raises:
        CheckpointError: architecture or shapes differ; both sides are listed.
    """
    differing = [key for key in sorted({*saved, *given} - {"name"}) if saved.get(key) != given.get(key)]
    if differing:
        raise CheckpointError(
            "An adapter fits only the base model it was trained on",
            "; ".join(
                f"{key}: adapter {saved.get(key)!r}, model {given.get(key)!r}" for key in ("name", *differing)
            ),
            f"Load the base model {saved.get('name')!r}.",
        )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        body = json.loads(_read(path))
        digest = body.pop("sha256")
        intact = digest == _digest(body)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{CONFIG_NAME} must be what save_pretrained wrote", f"{path}: {error!r}", "Copy it again."
        ) from error
    if body.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"The adapter must be of format version {FORMAT_VERSION}",
            f"{path}: {body.get('format_version')!r}",
            "Load it with the version of hylorada that wrote it.",
        )
    if not intact:
        raise CheckpointError(
            f"{CONFIG_NAME} must be what save_pretrained wrote",
            f"{path}, whose checksum differs",
            "It was cut or altered: copy it again.",
        )
    return body


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            "An adapter directory holds two files",
            f"{path}: {error.strerror}",
            "Check the path; train with `hylorada finetune`, or save with save_pretrained.",
        ) from error


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _short(names: Sequence[str]) -> str:
    return (", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")) or "none"
