"""One function of every batch of rows: what all measures of a model share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import jax
import numpy as np
from jax import Array
from tqdm import tqdm

from hylorada_jax.data.packing import Rows, batches, check_windows, spread
from hylorada_jax.errors import NonFiniteError
from hylorada_jax.models.batch import Batch
from hylorada_jax.models.generate import not_finite
from hylorada_jax.models.scorable import as_scorable
from hylorada_jax.models.scoring import model_inputs, score
from hylorada_jax.models.weights_digest import tree_digest
from hylorada_jax.placement.placement import mesh_of, rows_of
from hylorada_jax.placement.processes import agree, are_several, whole
from hylorada_jax.placement.shards import in_use, on_devices, own_rows, shard_rows
from hylorada_jax.terminal import bar_options
from hylorada_jax.trees import Adapters, Frozen, Resolved

_Item = TypeVar("_Item")


class Sweep:
    """A function of a model's hidden states on every batch of rows, compiled once.

    Args:
        model: as for :func:`as_scorable`.
        function: (hidden states [batch, seq, d], output embedding [vocab, d], the bound of the logits or
            None, the batch) → array.
    """

    def __init__(
        self, model: Any, function: Callable[[Array, Array, float | None, Mapping[str, Array]], Array]
    ) -> None:
        self.model = as_scorable(model)
        self._resolve = jax.jit(self.model.resolve)
        self._run = jax.jit(partial(self._of_batch, function))

    def _of_batch(
        self, function: Any, resolved: Resolved, frozen: Frozen, batch: Mapping[str, Array]
    ) -> Array:
        model = self.model
        hidden = model.hidden(resolved, **model_inputs(model.base, batch), frozen=frozen)
        return function(hidden, model.head(resolved, frozen), model.base.logit_soft_cap, batch)

    def __call__(
        self,
        rows: Rows | Sequence[Batch],
        batch_size: int,
        *,
        max_tokens: int | None = None,
        adapters: Adapters | None = None,
        frozen: Frozen | None = None,
        progress: str | None = None,
    ) -> Iterator[tuple[Batch, np.ndarray]]:
        """Goes over the rows once.

        Args:
            rows: of equal length.
            batch_size: rows at a time; rounded up to a multiple of the parts that rows are divided into,
                the last batch filled up with rows of padding.
            max_tokens: take rows of about this many tokens, spread evenly; None takes all.
            adapters: a tree like ``model.adapters``, or None for those the model has now.
            frozen: ``model.frozen`` where it already is on the devices, or None.
            progress: what the progress bar on stderr is called; None for no bar.

        Returns:
            Every batch and the function's value of it.

        Raises:
            ConfigError: a batch or ``max_tokens`` has nothing in it; or several processes have other rows.
            NonFiniteError: a value is NaN or infinite; it names the document, or the row.
        """
        check_windows(1, tokens=max_tokens, batch_size=batch_size)
        like = self.model.frozen
        frozen = on_devices(like, like=like) if frozen is None else frozen
        adapters = on_devices(self.model.adapters, like=like) if adapters is None else adapters
        with in_use(frozen):
            resolved = self._resolve(adapters, frozen)
        mesh = mesh_of(frozen)
        parts = 1 if mesh is None else rows_of(mesh.shape)
        batch_size = -(-batch_size // parts) * parts
        own = own_rows(mesh, batch_size)
        chosen = list(batches(rows if max_tokens is None else spread(rows, max_tokens), batch_size))
        if are_several():
            agree({"rows": tree_digest({str(number): batch for number, batch in enumerate(chosen)})})

        def begun(batch: Batch) -> tuple[Batch, Array]:
            with in_use(frozen):
                shards = shard_rows({name: values[own] for name, values in batch.items()})
                return batch, self._run(resolved, frozen, shards)

        shown = bar_options(shown=progress is not None)
        bar = tqdm(total=len(chosen), desc=progress, unit="batch", leave=False, **shown)
        with bar:
            for batch, computed in _one_ahead(map(begun, chosen)):
                with in_use(frozen):
                    values = whole(computed)
                if not np.isfinite(values).all():
                    raise _not_finite(batch, values)
                bar.update()
                yield batch, values


def _one_ahead(items: Iterator[_Item]) -> Iterator[_Item]:
    """Each item when the next has been made: a device has work while the host reads what it did before."""
    held = []
    for item in items:
        held.append(item)
        if len(held) > 1:
            yield held.pop(0)
    yield from held


def _not_finite(batch: Batch, values: np.ndarray) -> NonFiniteError:
    broken = ~np.isfinite(values)
    if "document_ids" in batch:
        # All of them: masked values are multiplied by 0, which leaves NaN, so that one spoils its whole row.
        numbers = np.unique(batch["document_ids"][broken] + 1).tolist()
        return not_finite(f"in document {', '.join(map(str, numbers[:8]))}{' …' if numbers[8:] else ''}")
    first = int(np.argmax(broken.any(axis=tuple(range(1, broken.ndim)))))
    return not_finite(f"in the text of the tokens {batch['input_ids'][first, :8].tolist()} …")


def loss_sweep(model: Any) -> Sweep:
    """The sweep for the losses of a model's targets, which several measures of it can share.

    Args:
        model: a model as for :class:`Sweep`; or a sweep that this function made, which is given back.
    """
    if isinstance(model, Sweep):
        return model
    return Sweep(model, lambda hidden, head, soft_cap, batch: score(hidden, head, batch["targets"], soft_cap))
