"""One optimizer step as one compiled program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, UInt

from hylorada_jax.models.scorable import Scorable
from hylorada_jax.models.scoring import model_inputs, score
from hylorada_jax.placement.placement import RULES, Placement, Rule
from hylorada_jax.placement.shards import cut_by
from hylorada_jax.training.config import TrainingConfig
from hylorada_jax.trees import Adapters, Frozen, Resolved

Metrics = dict[str, Array]


class TrainState(NamedTuple):
    """All that changes in training.

    Attributes:
        step: optimizer steps done, int32 scalar.
        seed: of dropout, uint32 scalar.
        adapters: the trainable tree.
        opt_state: the optimizer's state.
    """

    step: Int[Array, ""]
    seed: UInt[Array, ""]
    adapters: Adapters
    opt_state: Any


def init_state(
    adapters: Adapters,
    optimizer: optax.GradientTransformation,
    seed: int = 0,
    placement: Placement | None = None,
) -> TrainState:
    """The state before the first step; the adapters are copied, for the step consumes its argument.

    Args:
        adapters: the trainable tree.
        optimizer: of it.
        seed: of dropout.
        placement: where the adapters lie; None: on one device. The moments are made there: whole first, an
            embedding's could take more than the step.
    """

    def init(adapters: Adapters, seed: Array) -> TrainState:
        return TrainState(jnp.int32(0), seed, jax.tree.map(jnp.copy, adapters), optimizer.init(adapters))

    given = adapters, jnp.uint32(seed)
    places = None if placement is None else placement.shardings(jax.eval_shape(init, *given))
    # One program, not one for every shape of a leaf.
    return jax.jit(init, out_shardings=places)(*given)


def make_train_step(
    model: Scorable,
    optimizer: optax.GradientTransformation,
    config: TrainingConfig,
    rules: Sequence[Rule] = RULES,
) -> jax.stages.Wrapped:
    """A function that does one optimizer step.

        R = resolve(adapters);   g_R = Σ_microbatches ∂(Σ_t nll_t)/∂R;   g = (∂R/∂adapters)ᵀ g_R / tokens

    The column scales are resolved once, and the gradient of what they were resolved to is pulled back once,
    however many microbatches there are. Loss and gradient are means over all scored tokens of the step, and
    what dropout drops of a row depends on the seed, the step and the row's place in the batch: the number of
    microbatches changes neither, unless a call's longest text decides how all of it is rotated (LongRoPE,
    dynamic NTK), for a microbatch is a call.

    Args:
        model: what trains; its frozen tree is an argument of the step, not a constant of the program.
        optimizer: from :func:`make_optimizer`.
        config: microbatches are read, of which "auto" is one; the model has its own remat.
        rules: by which the state is cut over the mesh in use.

    Returns:
        ``step(state, frozen, batch) -> (state, metrics)``, jitted; ``state`` is donated. ``frozen`` is
        ``model.frozen``; ``batch`` has the arrays of :class:`Rows`, [batch, seq_len]. Metrics: ``loss`` (mean
        nll in nats), ``grad_norm`` (before clipping), ``adapter_norm`` (after the step), ``tokens``
        (scored).
    """

    def step(state: TrainState, frozen: Frozen, batch: Mapping[str, Array]) -> tuple[TrainState, Metrics]:
        def resolve(adapters: Adapters) -> Resolved:
            return cut_by(rules, model.resolve(adapters, frozen))

        resolved, pull = jax.vjp(resolve, state.adapters)
        rngs = {"dropout": jax.random.fold_in(jax.random.key(state.seed), state.step)}

        def loss_sum(resolved: Resolved, rows: Mapping[str, Array], numbers: Array) -> Array:
            inputs = model_inputs(model.base, rows)
            hidden = model.hidden(resolved, **inputs, frozen=frozen, train=True, rngs=rngs, rows=numbers)
            head, soft_cap = model.head(resolved, frozen), model.base.logit_soft_cap
            return score(hidden, head, rows["targets"], soft_cap).sum()

        def add_microbatch(total: Any, part: tuple[Mapping[str, Array], Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, jax.value_and_grad(loss_sum)(resolved, *part)), None

        numbered = dict(batch), jnp.arange(len(batch["targets"]))
        parts = jax.tree.map(lambda x: _microbatches(x, config.passes), numbered)
        loss_shape = jax.eval_shape(loss_sum, resolved, *jax.tree.map(lambda x: x[0], parts))
        zero = jnp.zeros((), loss_shape.dtype), jax.tree.map(jnp.zeros_like, resolved)
        (loss, cotangent), _ = jax.lax.scan(add_microbatch, zero, parts)

        tokens = jnp.sum(batch["targets"] >= 0)
        # A row always predicts something, but a user's own batch may not: 0/1 is a loss of 0, not NaN.
        mean = 1 / jnp.maximum(tokens, 1)
        (gradient,) = pull(jax.tree.map(lambda g: (g * mean).astype(g.dtype), cotangent))
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.adapters)
        adapters = optax.apply_updates(state.adapters, updates)
        metrics = {
            "loss": loss * mean,
            "grad_norm": optax.tree.norm(gradient),
            "adapter_norm": optax.tree.norm(adapters),
            "tokens": tokens,
        }
        # As the state was, so that the next step is the same program, in the same memory.
        return cut_by(rules, TrainState(state.step + 1, state.seed, adapters, opt_state)), metrics

    return jax.jit(step, donate_argnums=0)


def _microbatches(x: Array, count: int) -> Array:
    """[batch, ...] -> [count, batch / count, ...]: part i takes rows i, i + count, …

    Where the rows are sharded over devices, every part then has its share on each of them.
    """
    return x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)
