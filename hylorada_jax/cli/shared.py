"""What several commands do with their options."""

import contextlib
import dataclasses
import functools
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hylorada_jax.config import READS_STRUCTURE, HyLoRADAConfig
from hylorada_jax.errors import CheckpointError, ConfigError, ModelError
from hylorada_jax.io import hub
from hylorada_jax.io.files import kind_of, refuse_unusable, user_path
from hylorada_jax.models.packaged import PACKAGED_MODEL
from hylorada_jax.structure.code import Domain
from hylorada_jax.terminal import one_line, remark, show
from hylorada_jax.text import parse_json, shown, to_json

if TYPE_CHECKING:
    from hylorada_jax.models.base_model import BaseModel
    from hylorada_jax.models.tokenizer import Tokenizer
    from hylorada_jax.placement.placement import Placement
    from hylorada_jax.saved.saved_adapter import SavedAdapter


Dtype = Literal["float32", "bfloat16"]
BaseDtype = Literal["int8", "nf4", "int8+head", "nf4+head"]
GivenStructure = Domain | Literal["none"]


def weights_in(dtype: str, base_dtype: str | None) -> str:
    """How a model is kept, in the name that an adapter's file has for it."""
    return f"{dtype}+{base_dtype}" if base_dtype else dtype


def puts_offline(command: Callable[..., None]) -> Callable[..., None]:
    """The command, with its option ``offline`` in effect for all that it does."""

    @functools.wraps(command)
    def run(**options: Any) -> None:
        with hub.offline() if options.get("offline") else contextlib.nullcontext():
            command(**options)

    return run


def output_file(output: Path, *, overwrite: bool = False, remedy: str = "Choose another name.") -> Path:
    """The file to write; reports one that cannot be written, or is there already, before anything is read.

    Args:
        output: as the user typed it.
        overwrite: one that is there is replaced.
        remedy: for the error about one that is there.
    """
    output = user_path(output)
    refuse_unusable(output.parent)
    try:
        if not output.parent.is_dir():
            rule = "An output file is written into a directory that exists."
            raise CheckpointError(rule, output.parent, f"Make it: `mkdir -p {output.parent}`.")
        if output.exists() and not output.is_file():
            raise CheckpointError("An output must be a file.", f"{output}, which is none", remedy)
        if kind_of(output) and not overwrite:
            raise CheckpointError("An output file is not overwritten.", output, remedy)
    except OSError as error:
        raise CheckpointError("An output must be a file that can be written.", error, remedy) from error
    return output


def base_of(adapter: "Path | SavedAdapter | None", given: str | None) -> str:
    """A base model's name: the user's own; else the adapter's, which is announced; else the packaged one's.

    An adapter may be a stranger's. So its user reads where its base comes from before anything is contacted.
    The base of an adapter from elsewhere may be missing here; then no spelling is to be checked.
    """
    if given is not None or adapter is None:
        return given or PACKAGED_MODEL
    from hylorada_jax.saved.saved_adapter import base_name

    name = base_name(adapter)
    place = ", from the Hugging Face Hub" if hub.is_hub_name(name) else ""
    remark(f"base model from the adapter: {one_line(name)}{place}")
    if not place and name != PACKAGED_MODEL and not os.path.exists(user_path(name)):
        raise ModelError(
            "The base model that an adapter names must be here, or another one be given.",
            f"{shown(name)}: no such directory or file",
            "Give the base model by --model.",
        )
    return name


def unloaded(model: str, dtype: str = "float32") -> "BaseModel":
    """The model from its config alone: what a setting cannot do with it is reported before it is loaded.

    Args:
        model: as a user names it.
        dtype: from :func:`weights_in`.
    """
    from hylorada_jax.math.quantized import split_name
    from hylorada_jax.models.loading import empty_model
    from hylorada_jax.models.wrapped import as_base

    of_computation, base_dtype = split_name(dtype)
    return as_base(empty_model(model, dtype=of_computation, base_dtype=base_dtype))


def placement_for(base: "BaseModel", mesh: str) -> "Placement | None":
    """Where a model shall be loaded; None: on one device.

    Args:
        base: perhaps without its weights.
        mesh: as a user writes it; where that is "", a model is cut that is too large for one device, which is
            announced.
    """
    from hylorada_jax.models.placed import default_mesh, fitted
    from hylorada_jax.placement.placement import Placement, parse_mesh
    from hylorada_jax.training.memory import device_memory

    if not mesh:
        mesh, why = default_mesh(base, device_memory())
        if mesh:
            remark(f"mesh {why}")
    return fitted(Placement(parse_mesh(mesh)), base) if mesh else None


def structure_of(
    given: GivenStructure | None, saved: "SavedAdapter | None", config: HyLoRADAConfig | None
) -> Domain | None:
    """The structure to read: the user's, or else that of an adapter, if any.

    Args:
        given: "none" for no structure, whatever the adapter's.
        saved: the adapter, if one is saved.
        config: of what shall read it; None for a base model.

    Raises:
        ConfigError: one is given to what cannot read it: a base model, or another method than hylorada_v2.
    """
    if given is None:
        return None if saved is None else saved.structure
    if given == "none":
        return None
    if config is None or not config.use_hylorada_v2:
        raise ConfigError(
            READS_STRUCTURE,
            f"--structure {given} for " + ("no adapter" if config is None else f"method {config.method}"),
            "Choose hylorada_v2, or leave --structure out.",
        )
    return given


def check_adapter(
    adapter: Path | None, structure: GivenStructure | None, *, weights: str | None = None
) -> "tuple[SavedAdapter | None, Domain | None]":
    """The adapter; reports damage to it, and what it cannot be asked for, before the model is loaded.

    Args:
        adapter: its directory, or None for the base model alone.
        structure: as of :func:`structure_of`.
        weights: the dtype in which its base's weights shall be checked, or None.

    Returns:
        The adapter, and the structure to read.
    """
    from hylorada_jax.saved.adapter_files import check_weights
    from hylorada_jax.saved.saved_adapter import open_adapter

    saved = None if adapter is None else open_adapter(adapter)
    found = structure_of(structure, saved, None if saved is None else saved.config)
    if weights and saved is None:
        rule = "Weights are checked against those that an adapter was trained on."
        raise ConfigError(rule, "--check-weights for no adapter", "Give --adapter, or leave it out.")
    if weights and saved is not None:
        check_weights(saved.base, {"dtype": weights})
    return saved, found


def check_whole(adapter: "Path | SavedAdapter", base: "BaseModel") -> None:
    """Reports an adapter that is damaged or does not fit its base, which may be without its weights."""
    from hylorada_jax.saved.opening import open_on

    open_on(base, adapter).saved.tensors()


def generating(model: str, dtype: str, saved: "SavedAdapter | None") -> "BaseModel":
    """As :func:`unloaded`; reports a model that generates nothing, and an adapter that does not fit it."""
    from hylorada_jax.models.base_model import require_generation

    base = unloaded(model, dtype)
    require_generation(base)
    if saved is not None:
        check_whole(saved, base)
    return base


def template_of(chat_template: Path | None, saved: "SavedAdapter | None" = None) -> str | None:
    """The chat template in the place of the model's: the user's, or else that of an adapter, if any."""
    from hylorada_jax.models.chat_template import read_template

    if chat_template is not None:
        return read_template(chat_template)
    return None if saved is None else saved.chat_template


def tokenizer_of(model: str, template: str | None) -> "Tokenizer":
    """The model's tokenizer, with another chat template where one is given."""
    from hylorada_jax.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model)
    return tokenizer if template is None else dataclasses.replace(tokenizer, chat_template=template)


def variables_of(chat_template_kwargs: str | None) -> dict[str, Any]:
    """What a chat template is given beside the messages.

    Raises:
        ConfigError: it is not a JSON object, or has what a template gets with the messages themselves.
    """
    from hylorada_jax.models.chat_template import OF_THE_CONVERSATION, not_beside

    rule = "--chat-template-kwargs must be a JSON object."
    remedy = """For example --chat-template-kwargs '{"enable_thinking": false}'."""
    try:
        found = {} if chat_template_kwargs is None else parse_json(chat_template_kwargs)
    except ValueError as error:
        raise ConfigError(rule, f"{shown(chat_template_kwargs)}: {error}", remedy) from error
    if not isinstance(found, dict):
        raise ConfigError(rule, shown(chat_template_kwargs), remedy)
    if names := not_beside(found):
        raise ConfigError(
            f"--chat-template-kwargs must not name {', '.join(OF_THE_CONVERSATION)}, which a chat has.",
            names,
            "Leave them out; rows with a column tools are answered by generate --messages.",
        )
    return found


def loaded(
    model: str,
    saved: "SavedAdapter | None",
    dtype: str,
    placement: "Placement | None",
    *,
    check_weights: bool = False,
    verbose: bool = False,
) -> Any:
    """The model with the adapter, or the base model where none is named; as :func:`unloaded` reads it."""
    from hylorada_jax.math.quantized import split_name
    from hylorada_jax.model import HyLoRADAModel
    from hylorada_jax.models.loading import load_model
    from hylorada_jax.models.wrapped import as_base

    of_computation, base_dtype = split_name(dtype)
    base = as_base(load_model(model, dtype=of_computation, base_dtype=base_dtype, placement=placement))
    found: Any = base
    if saved is not None:
        found = HyLoRADAModel.from_pretrained(base, saved, check_weights=check_weights)
    if verbose and placement is not None:
        tell_undivided(placement, found)
    return found


def context_of(base: "BaseModel") -> int | None:
    """The tokens of a model's longest text: of its table of positions, or what it has seen; None: any."""
    limit: int | None = base.position_limit
    return limit or getattr(base.config, "max_position_embeddings", None)


def warn_of_length(base: "BaseModel", longest: int) -> None:
    """Warns of texts longer than any that the model was trained on, where it can read them at all."""
    seen = getattr(base.config, "max_position_embeddings", None)
    if base.position_limit is None and seen is not None and longest > seen:
        warnings.warn(f"the model has seen up to {seen:,} tokens, and may get {longest:,}", stacklevel=1)


def tell_undivided(placement: "Placement", model: Any) -> None:
    """Reports the leaves of a model that its mesh does not divide.

    Args:
        placement: where the model lies, fitted to its heads.
        model: the base model, or one with adapters.
    """
    from hylorada_jax.model import HyLoRADAModel

    trees = (model.base.params, model.adapters) if isinstance(model, HyLoRADAModel) else (model.params,)
    lines = [line for tree in trees for line in placement.undivided(tree)]
    remark(f"mesh {placement}: leaves that it does not divide: {len(lines)}")
    for line in lines:
        remark(f"  {line}")


def method_of(settings: HyLoRADAConfig) -> str:
    """The method, with the rank where it has one."""
    return f"{settings.method}, rank {settings.lora_rank}" if settings.linear else str(settings.method)


def print_result(result: dict[str, Any], as_json: bool, text: str) -> None:
    """Prints a command's result: one JSON object, or the text."""
    show(to_json(result) if as_json else text)
