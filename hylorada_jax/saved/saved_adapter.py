"""Reading an adapter from its two files: first what tells its size, then, on demand, its tensors.

An adapter may be a stranger's. Its checksums tell damage from what was written, and not who wrote it: every
value has its type and its bound.
"""

import dataclasses
import hashlib
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors

from hylorada_jax import __version__
from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import CheckpointError, HyLoRADAError
from hylorada_jax.io.files import any_path, kind_of
from hylorada_jax.io.hub import fetched_first
from hylorada_jax.io.reading import as_object, checked, read_bounded
from hylorada_jax.io.safetensors_header import read_header
from hylorada_jax.saved.adapter_files import (
    CONFIG_NAME,
    FORMAT_VERSION,
    IN_RUN,
    WEIGHTS_NAME,
    adapter_file,
    check_beside,
    check_finite,
    render,
)
from hylorada_jax.structure.code import Domain
from hylorada_jax.surgery.targets import with_saved_ranks
from hylorada_jax.text import short, shown

MAX_CONFIG_BYTES = 2**21
"""Of an adapter's config, ours or PEFT's: more than ten thousand layers named one by one, and a template."""
_FLOATS = ("F32", "F64")
_RULE = f"An adapter directory holds two files, whole: {CONFIG_NAME} and {WEIGHTS_NAME}."
_REMEDY = "Check the path; train with `hylorada finetune`, or save with save_pretrained."

_Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
# No path is longer.
_Name = Annotated[str, msgspec.Meta(max_length=4096)]


class _Base(msgspec.Struct, forbid_unknown_fields=True):
    """What a config file says of the base model."""

    name: _Name | None
    model_type: _Name | None
    layers_sha256: _Sha256
    config_sha256: _Sha256
    dtype: _Name | msgspec.UnsetType = msgspec.UNSET
    weights_sha256: _Name | msgspec.UnsetType = msgspec.UNSET


class _Body(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A config file."""

    format: Literal["hylorada"]
    format_version: int
    hylorada_version: _Name | msgspec.UnsetType = msgspec.UNSET  # files of the first days have none
    base_model: _Base
    config: dict[str, Any]
    weights_sha256: _Sha256
    sha256: _Sha256
    chat_template: str | msgspec.UnsetType = msgspec.UNSET
    structure: Domain | msgspec.UnsetType = msgspec.UNSET


@dataclasses.dataclass(frozen=True)
class SavedAdapter:
    """An adapter on disk, of which only the config and the header of the weights have been read.

    Attributes:
        directory: where it is.
        config: its settings.
        base: what identifies the base model.
        shapes: of its tensors, by name.
        weights_sha256: the checksum of the file that holds them.
        chat_template: with which it was trained, where that is not its base's own.
        structure: what it was trained to read of a text, if anything.
    """

    directory: Path
    config: HyLoRADAConfig
    base: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    weights_sha256: str
    chat_template: str | None
    structure: Domain | None

    def on(self, names: Sequence[str]) -> "SavedAdapter":
        """The adapter as one of a model with these linear layers: its config has the ranks of its tensors.

        Raises:
            TargetError: a pattern of its ranks matches no layer.
        """
        layers = ((name, f"{name}.lora_A") for name in names)
        ranks = {name: self.shapes[A][0] for name, A in layers if self.shapes.get(A)}
        return dataclasses.replace(self, config=with_saved_ranks(self.config, ranks, names))

    def tensors(self) -> dict[str, np.ndarray]:
        """Reads the tensors: after ``shapes`` have been compared with what is needed, for they take memory.

        Raises:
            CheckpointError: the file is cut, altered, or holds non-finite values.
        """
        path = self.directory / WEIGHTS_NAME
        raw = read_bounded(path, _RULE, CheckpointError, _REMEDY, limit=sys.maxsize)
        if hashlib.sha256(raw).hexdigest() != self.weights_sha256:
            raise CheckpointError(
                f"{WEIGHTS_NAME} must be the file that {CONFIG_NAME} describes.",
                f"{path}, {len(raw)} bytes, whose checksum differs",
                "The file was cut or altered: copy it again, or use an older checkpoint.",
            )
        try:
            tensors = load_safetensors(raw)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                "An adapter must be a safetensors file.", f"{path}: {error}", "Save it again."
            ) from error
        check_finite(tensors)
        return tensors


def open_adapter(directory: str | Path) -> SavedAdapter:
    """Opens an adapter that :func:`write_adapter` wrote, as far as its config and the header of its weights.

    Args:
        directory: holds the two files.

    Raises:
        CheckpointError: a file is missing, cut, altered, of another format version or of other types, or it
            lies outside the directory.
        ConfigError: a setting is unknown or refused. Where a newer version of this library may have meant
            something by it, the remedy names both versions.
    """
    directory = any_path(directory)
    body, config = _read_config(adapter_file(directory, CONFIG_NAME))
    header = read_header(adapter_file(directory, WEIGHTS_NAME), _RULE, CheckpointError, _REMEDY)
    if alien := [f"{name} {dtype}" for name, (dtype, _) in header.items() if dtype not in _FLOATS]:
        raise CheckpointError(
            "An adapter holds float32 or float64 tensors.", short(alien), "Save it with save_pretrained."
        )
    shapes = {name: shape for name, (_, shape) in header.items()}
    beside = body.get("chat_template"), body.get("structure")
    return SavedAdapter(directory, config, body["base_model"], shapes, body["weights_sha256"], *beside)


def base_name(adapter: str | Path | SavedAdapter) -> str:
    """The name of the base model that an adapter belongs to.

    Args:
        adapter: its directory, or what :func:`open_adapter` gives of it.

    Raises:
        CheckpointError: the adapter is damaged, or names no model.
    """
    saved = adapter if isinstance(adapter, SavedAdapter) else open_adapter(adapter)
    if not (name := saved.base["name"]):
        raise CheckpointError(
            "An adapter or the user must name the base model.",
            f"{saved.directory} names none",
            "Give --model.",
        )
    return name


def _read_config(path: Path) -> tuple[dict[str, Any], HyLoRADAConfig]:
    try:
        remedy = fetched_first(path.parent, _REMEDY)
        content = read_bounded(path, _RULE, CheckpointError, remedy, limit=MAX_CONFIG_BYTES)
        body = as_object(content, path, _RULE, CheckpointError, _REMEDY)
    except CheckpointError as unread:
        if not (own := _adapter_of_run(path.parent)):
            raise
        remedy = f"This is the directory of a run: give that of its adapter, {own}."
        raise CheckpointError(unread.rule, unread.received, remedy) from unread
    rule = f"{CONFIG_NAME} must be what save_pretrained wrote."
    if "format" not in body and "peft_type" in body:
        remedy = "Read it with `hylorada import-peft`, or import_peft."
        raise CheckpointError(rule, f"{path}, which PEFT wrote", remedy)
    if (version := body.get("format_version", FORMAT_VERSION)) != FORMAT_VERSION:
        error = CheckpointError(
            f"The adapter must be of format version {FORMAT_VERSION}.",
            f"{path}: {shown(version)}",
            "Load it with the version of hylorada that wrote it.",
        )
        raise _with_versions(error, body)
    if not _is_intact(content, body):  # before its keys: what a damaged file says, no version has said
        raise CheckpointError(
            rule, f"{path}, whose checksum differs", "It was cut or altered: copy it again."
        )
    try:
        checked(body, _Body, rule, CheckpointError, "Copy it again.", path)
        check_beside(body.get("chat_template"), body.get("structure"))
        return body, HyLoRADAConfig.from_dict(body["config"])
    except HyLoRADAError as error:
        raise _with_versions(error, body) from error


def _adapter_of_run(directory: Path) -> Path | None:
    """The adapter's directory within that of a run; None where an adapter is here itself, or in neither."""
    own = directory / IN_RUN
    try:
        return own if kind_of(own / CONFIG_NAME) and not kind_of(directory / CONFIG_NAME) else None
    except OSError:
        return None


def _is_intact(content: bytes, body: Mapping[str, Any]) -> bool:
    """Whether a config file is, byte for byte, what is written of its values, so that nothing is altered."""
    rest = {key: value for key, value in body.items() if key != "sha256"}
    try:
        return render(rest) == content
    except RecursionError:  # nested as deeply as can just be read
        return False


def _with_versions(error: HyLoRADAError, body: Mapping[str, Any]) -> HyLoRADAError:
    """The error about what this version does not take, with the version that wrote it and the way out."""
    theirs, form = body.get("hylorada_version"), body.get("format_version")
    writer = "one that it does not name" if theirs is None else shown(theirs)
    versions = f"{writer} wrote it, and this is {__version__!r}"
    if _numbers(theirs) > _numbers(__version__) or (isinstance(form, int) and form > FORMAT_VERSION):
        remedy = f"Upgrade hylorada, for it was written by a newer version: {versions}."
    else:
        remedy = f"{error.remedy} If a newer version wrote it, upgrade hylorada: {versions}."
    return type(error)(error.rule, error.received, remedy)


def _numbers(version: object) -> tuple[int, ...]:
    """(0, 1, 0) of "0.1.0"; () of what is not a version, which is before all that are."""
    found = re.match(r"\d{1,9}(\.\d{1,9}){0,2}", version, re.ASCII) if isinstance(version, str) else None
    return tuple(map(int, found[0].split("."))) if found else ()
