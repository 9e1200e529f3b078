"""What a run is, and what it merely ran on.

Part of its identity, so that a run which differs in it is another run and is not resumed: the base model
(its layers, its config, every bit of its weights and their dtype), the adapter's settings and where it
started, the training settings that decide numbers, both data sets: tokens, which of them are scored,
structure, order and shares (so the tokenizer too), a chat template that is not the base's own, and jax's own
settings of precision and random numbers.

Recorded beside it, with a warning where a resumed run differs: versions of the libraries, the devices,
``XLA_FLAGS``, rematerialisation and microbatches. They may change the last bits, and a run must be able to
move to another machine. The model's name is recorded too: the same weights under another path are the same
model. Neither: what decides only when something is evaluated, written, sent or shown, which of its adapters a
run ends with and when (eval_every, keep, patience, checkpoint_every, keep_checkpoints, log_every, report_to,
progress), and where it is kept.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
from collections.abc import Sequence
from typing import Any

import jax

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.data.document import TokenizedDocument, digest
from hylorada_jax.data.mixture import Mixture
from hylorada_jax.model import HyLoRADAModel
from hylorada_jax.training.config import TrainingConfig

_JAX_SETTINGS = (
    "jax_default_matmul_precision",
    "jax_enable_x64",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
    "jax_numpy_dtype_promotion",
)
_PACKAGES = ("hylorada", "jax", "jaxlib", "flax", "optax", "grain", "numpy")


def run_identity(
    model: HyLoRADAModel,
    config: TrainingConfig,
    *,
    train_data: Mixture,
    eval_data: Sequence[TokenizedDocument] | None,
) -> dict[str, Any]:
    """What decides the numbers that a run computes.

    Args:
        model: before the first step.
        config: the settings.
        train_data: of tokenized documents.
        eval_data: the held-out documents.

    Returns:
        Plain JSON types.
    """
    template = model.chat_template
    shares = [[len(documents), weight] for documents, weight in train_data.sources]
    base = {key: value for key, value in model.identity(weights=True).items() if key != "name"}
    return {
        "base": base,
        "adapter": model.config.to_dict(),
        "start": model.start,
        "training": config.fingerprint(),
        "chat_template": template and hashlib.sha256(template.encode()).hexdigest(),
        "train_data": digest(train_data.documents),
        "shares": shares if len(shares) > 1 else None,
        "eval_data": eval_data and digest(eval_data),
        "jax": {"dtype": str(model.base.dtype)} | {name: getattr(jax.config, name) for name in _JAX_SETTINGS},
    }


def defaults(adapter: HyLoRADAConfig) -> dict[str, Any]:
    """The settings of :func:`run_identity` that nobody has set: what a run did before it could be asked.

    Args:
        adapter: with the method, which decides some of them.

    Returns:
        Plain JSON types.
    """
    return {
        "adapter": HyLoRADAConfig(method=adapter.method).to_dict(),
        "training": TrainingConfig(output="").fingerprint(),
    }


def circumstances(model: HyLoRADAModel, config: TrainingConfig) -> dict[str, Any]:
    """What a run ran on: recorded, and free to differ.

    Args:
        model: what is trained.
        config: ``remat`` and ``microbatches`` are read.

    Returns:
        Plain JSON types.
    """
    device = jax.devices()[0]
    return {
        "model": model.base.name,
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "devices": f"{jax.device_count()} × {device.platform} ({device.device_kind})",
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        "remat": config.remat,
        "microbatches": config.microbatches,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from its source, uninstalled
        return None
