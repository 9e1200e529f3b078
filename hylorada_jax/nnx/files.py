"""The adapters of NNX models on disk: the two files that Linen models, torch and PEFT's export read."""

from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from flax import nnx

from hylorada_jax.errors import ConfigError
from hylorada_jax.models.decoder_config import DecoderConfig
from hylorada_jax.nnx.adapting import adaptation_of, adapters_of, attach, check_rngs, plan_on
from hylorada_jax.nnx.finding import find_modules
from hylorada_jax.placement.processes import is_first
from hylorada_jax.saved import adapter_files
from hylorada_jax.saved.base_identity import base_identity
from hylorada_jax.saved.saved_adapter import SavedAdapter, open_adapter
from hylorada_jax.structure.code import Domain
from hylorada_jax.surgery import layout
from hylorada_jax.surgery.modules import Modules

_Model = TypeVar("_Model", bound=nnx.Module)


def save_adapter(
    model: nnx.Module,
    directory: str | Path,
    *,
    name: str | None = None,
    base_config: Any = None,
    overwrite: bool = False,
    chat_template: str | None = None,
    structure: Domain | None = None,
) -> None:
    """Writes the adapter of a model: adapter_config.json and adapter_model.safetensors.

    The tensors are named by the model's paths. Where those are Hugging Face's, as in
    "model.layers.0.self_attn.q_proj", :class:`hylorada_jax.HyLoRADAModel` and the PyTorch reference take them
    for the same checkpoint, and so does the export to PEFT.

    Args:
        model: one that :func:`adapt` was called with.
        directory: made if it does not exist.
        name: of the base model, for people and as the default of commands.
        base_config: of the base, transformers' or our DecoderConfig, which says what the layers' shapes do
            not; ``model.config``, where that is one.
        overwrite: replace an adapter that is already there.
        chat_template: used in training, if not the base's own; by default that of the files it was loaded
            from.
        structure: what it was trained to read, "code"; likewise.

    Of several processes all must call it, and the first writes.

    Raises:
        ModelError: the model is not adapted, or its layers were stacked afterwards.
        ConfigError: ``base_config`` is none.
        CheckpointError: an adapter is already there, or cannot be written.

    Example:
        >>> import tempfile
        >>> from hylorada_jax import HyLoRADAConfig
        >>> from hylorada_jax.nnx import adapt
        >>> model = nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
        >>> model = adapt(model, HyLoRADAConfig(method="lora", target_modules="all-linear"), nnx.Rngs(1))
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     save_adapter(model, directory)
        ...     sorted(path.name for path in Path(directory).iterdir())
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    adaptation, found = adaptation_of(model)
    tensors = layout.flatten(adaptation.sites, adapters_of(model, adaptation, found))
    identity = _identity(model, adaptation.modules, name, base_config)
    if not is_first():
        return
    adapter_files.write_adapter(
        directory,
        tensors,
        adaptation.config,
        identity,
        overwrite=overwrite,
        chat_template=chat_template or adaptation.chat_template,
        structure=structure or adaptation.structure,
    )


def load_adapter(
    model: _Model,
    directory: str | Path | SavedAdapter,
    *,
    base_config: Any = None,
    rngs: nnx.Rngs | None = None,
) -> _Model:
    """Puts a saved adapter on a model, in place, bit for bit: as :func:`adapt`, with what was learnt.

    Args:
        model: of the layers that the adapter was trained on, by name and shape.
        directory: what :func:`save_adapter` or ``save_pretrained`` wrote.
        base_config: as of :func:`save_adapter`. Without any, the layers' names and shapes must agree, and no
            more is known.
        rngs: of dropout, where the adapter trains on. Without, its dropout is off until ``model.train()``.

    Returns:
        The same model.

    Raises:
        CheckpointError: the adapter is damaged, or does not fit the model, which is left as it was.
        ModelError, TargetError, ConfigError: as of :func:`adapt`.

    Example:
        >>> import tempfile
        >>> from hylorada_jax import HyLoRADAConfig
        >>> from hylorada_jax.nnx import adapt
        >>> model = nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
        >>> config = HyLoRADAConfig(method="lora", target_modules="all-linear")
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     save_adapter(adapt(nnx.clone(model), config, nnx.Rngs(1)), directory)
        ...     load_adapter(model, directory).hylorada.config == config
        True
    """
    saved = directory if isinstance(directory, SavedAdapter) else open_adapter(directory)
    modules, found = find_modules(model)
    saved = saved.on(modules.linear_names)
    adaptation = plan_on(model, saved.config, modules, found)
    given = _identity(model, adaptation.modules, None, base_config)
    if given["model_type"] is None:  # of a model that does not say, only the layers are compared
        given |= {key: saved.base[key] for key in ("model_type", "config_sha256")}
    adapter_files.check_base(saved.base, given)
    layout.check_keys(saved.shapes, layout.tensor_shapes(adaptation.sites))
    if rngs is not None:
        check_rngs(rngs, adaptation)
    adaptation = replace(adaptation, chat_template=saved.chat_template, structure=saved.structure)
    attach(model, adaptation, found, layout.unflatten(adaptation.sites, saved.tensors()), rngs)
    return model


def _identity(model: Any, modules: Modules, name: str | None, config: Any) -> dict[str, Any]:
    if config is None:
        own = getattr(model, "config", None)
        config = own if _is_config(own) else None
    elif not _is_config(config):
        rule = "A base_config is one of transformers, or our DecoderConfig."
        raise ConfigError(rule, type(config).__name__, "Give AutoConfig.from_pretrained(…), or leave it out.")
    linears = ((name, m.d_out, m.d_in) for m in modules.linears for name in m.names)
    return base_identity(name, config, linears)


def _is_config(given: Any) -> bool:
    return isinstance(given, DecoderConfig) or (hasattr(given, "model_type") and hasattr(given, "to_dict"))
