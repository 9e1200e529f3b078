"""What cannot be trained, found before any work starts, and as far as it goes without the model's weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.data.document import TokenizedDocument, as_documents, check_predicted
from hylorada_jax.data.mixture import Mixture, as_mixture
from hylorada_jax.errors import ConfigError, DataError
from hylorada_jax.exact import fraction
from hylorada_jax.models.base_model import BaseModel, require_segments, vocab_size
from hylorada_jax.models.placed import fitted
from hylorada_jax.models.positions import check_range
from hylorada_jax.placement.axes import mesh_sizes
from hylorada_jax.placement.placement import Placement, parse_mesh, placement_of
from hylorada_jax.training.config import TrainingConfig
from hylorada_jax.training.wandb_run import require_wandb


def check_training(base: BaseModel, config: TrainingConfig) -> Placement:
    """Refuses settings that a model cannot be trained with, as far as its shapes and the devices tell.

    Args:
        base: the base model; its weights are not read, so
            :func:`hylorada_jax.models.loading.empty_model` does.
        config: the settings.

    Returns:
        Where it is trained: on the mesh that it lies on, or else on that of the settings.

    Raises:
        ConfigError: packing is asked for and the model knows no segments, the mesh does not fit the devices,
            the rows or the heads, or is not the one that the model lies on, wandb is asked for and not
            installed, or the model knows no rematerialisation.
        DataError: a row is longer than the model's table of positions.
        ModelError: the model has no output head that the built-in loss can read.
    """
    if config.report_to == "wandb":
        require_wandb()
    if config.remat not in ("auto", "none") and not hasattr(base.module, "remat"):
        raise ConfigError(
            "Rematerialisation is a feature of our decoder.",
            f"remat={config.remat!r} for model_type {base.config.model_type!r}",
            "Leave remat at 'auto'.",
        )
    vocab_size(base)  # asks for the head
    if config.packing:
        require_segments(base, f"packing=True for {base.name}")
    check_range((config.batch_size, config.seq_len), limit=base.position_limit)
    placement = placement_of(base.params) or fitted(Placement(parse_mesh(config.mesh)), base)
    if config.mesh and mesh_sizes(config.mesh, placement.mesh.size) != placement.mesh.shape:
        raise ConfigError(
            "A model is trained on the mesh that it lies on.",
            f"mesh={config.mesh!r}, a model on {placement}",
            "Leave mesh out, or load the model with this one.",
        )
    placement.check_rows(config.batch_size, config.passes)
    return placement


def check_groups(adapter: HyLoRADAConfig, seq_len: int) -> None:
    """Refuses groups of shifted sparse attention that are longer than a row: it would be padded to them.

    Args:
        adapter: what is trained.
        seq_len: tokens of a row.

    Raises:
        ConfigError: a group of ``s2_group_size``, or where that is None the least that ``s2_shift_ratio``
            allows, has more tokens than a row.
    """
    if not adapter.s2_attn_enabled or (size := adapter.s2_groups(seq_len)[0]) <= seq_len:
        return
    shift = fraction(adapter.s2_shift_ratio)
    raise ConfigError(
        "A group of shifted sparse attention must not be longer than a row.",
        f"groups of {size} tokens for rows of {seq_len}: s2_group_size={adapter.s2_group_size}, "
        f"s2_shift_ratio={shift}",
        f"Choose longer rows, or smaller groups: multiples of {shift.denominator}, with this s2_shift_ratio; "
        "without s2_group_size they are a quarter of the row.",
    )


def check_data(
    train_data: Sequence[Any] | Mixture,
    eval_data: Sequence[Any] | Mixture | None,
    vocab: int,
    adapter: HyLoRADAConfig,
    config: TrainingConfig,
) -> tuple[Mixture, list[TokenizedDocument] | None]:
    """Tokenized documents, checked as far as they can be without the model.

    Args:
        train_data: a :class:`TokenizedDocument` or a sequence of token ids per document, or a mixture.
        eval_data: the same of the held-out documents, or None.
        vocab: number of ids the model has.
        adapter: what is trained.
        config: ``seq_len`` is read.

    Returns:
        The training documents, of one source or of several, and the held-out ones.

    Raises:
        DataError: there is too little data, nothing in a source counts, none is held out where the settings
            need it, or :func:`as_documents` finds a fault.
        ConfigError: nothing in the adapter reads structure.
    """
    has_encoder = bool(adapter.use_hylorada_v2)
    if eval_data is None and config.eval_every is not None:
        raise DataError(
            "Evaluations on the way, as keeping the best and patience need them, are of held-out data.",
            f"eval_every={config.eval_every}, keep={config.keep}, patience={config.patience}, eval_data=None",
            "Give held-out documents too, or leave eval_every out.",
        )
    mixture = as_mixture(train_data)
    documents = as_documents(mixture.documents, vocab, "training", has_encoder=has_encoder)
    if (tokens := sum(map(len, documents))) <= config.seq_len:
        received = f"{tokens} tokens for a seq_len of {config.seq_len}"
        raise DataError(
            "The training data must fill a row.", received, "Give more text, or a smaller seq_len."
        )
    mixture = mixture.of(documents)
    for number, (source, _) in enumerate(mixture.sources, start=1):
        check_predicted(source, f"Source {number} of the training data")
    if eval_data is None:
        return mixture, None
    held_out = as_mixture(eval_data).documents  # of a mixture all count, whatever their shares
    return mixture, as_documents(held_out, vocab, "evaluation", has_encoder=has_encoder)
