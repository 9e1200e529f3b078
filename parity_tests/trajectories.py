"""A fine-tuning run on both sides of a pair, from the pair's adapters and on the same batches."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
import optax

import hylorada_torch
from hylorada_jax.surgery import layout
from hylorada_jax.training.config import TrainingConfig
from hylorada_jax.training.optimizer import make_optimizer
from parity_tests.families import all_in_float64
from parity_tests.models import Pair, torch_inputs, torch_loss

Batches = Iterable[Mapping[str, np.ndarray]]
Run = tuple[list[float], dict[str, np.ndarray]]


def train_torch(pair: Pair, training: TrainingConfig, batches: Batches) -> Run:
    """The losses and the adapters after the last step, of the reference; its adapters are changed.

    Args:
        pair: the model.
        training: rates, schedule, decay and clipping.
        batches: one for each step, like the pair's inputs.
    """
    model, adapters = pair.reference.train(pair.train), pair.reference.adapters()
    optimizer, scheduler = hylorada_torch.make_optimizer(adapters, training, pair.model.config)
    losses = []
    for batch in batches:
        inputs = torch_inputs(batch)
        labels = inputs.pop("labels")
        optimizer.zero_grad()
        with all_in_float64():
            loss = torch_loss(model(**inputs).logits, labels)
            loss.backward()
        hylorada_torch.clip_by_global_norm(adapters.values(), training.max_grad_norm)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses, {name: value.detach().numpy().copy() for name, value in adapters.items()}


def train_jax(pair: Pair, training: TrainingConfig, batches: Batches) -> Run:
    """The same in JAX."""
    adapters: Any = pair.adapters
    optimizer = make_optimizer(adapters, training, pair.model.config)

    @jax.jit
    def update(adapters: Any, state: Any, gradients: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(gradients, state, adapters)
        return optax.apply_updates(adapters, updates), state

    state, losses = optimizer.init(adapters), []
    for batch in batches:
        (loss, _), gradients = pair.program(adapters, pair.model.frozen, batch)
        adapters, state = update(adapters, state, gradients)
        losses.append(float(loss))
    return losses, layout.flatten(pair.model.sites, adapters)
