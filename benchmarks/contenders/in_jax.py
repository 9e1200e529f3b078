"""Contenders that JAX compiles: ours, and qwix."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import itertools
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from benchmarks.contenders.setting import RATE, Contender, Setting
from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.model import HyLoRADAModel
from hylorada_jax.models.batch import Batch
from hylorada_jax.models.causal_lm import CausalLM
from hylorada_jax.models.loading import load_model
from hylorada_jax.models.scoring import score
from hylorada_jax.training.memory import needed_bytes
from hylorada_jax.training.optimizer import make_optimizer, schedule
from hylorada_jax.training.step import init_state, make_train_step


def load_base(setting: Setting) -> CausalLM:
    """The base model of JAX's contenders."""
    remat = "full" if setting.remat else "none"
    return load_model(setting.model, dtype=jnp.dtype(setting.dtype), remat=remat)


def ours(method: str, setting: Setting, batches: Sequence[Batch], base: CausalLM) -> Contender:
    """One of our methods, with the library's own step, on one batch after the other."""
    config = HyLoRADAConfig(
        method=method, lora_rank=setting.rank, lora_alpha=setting.alpha, target_modules=setting.adapted
    )
    model = HyLoRADAModel(base, config)
    optimizer = make_optimizer(model.adapters, setting.training, config)
    state = init_state(model.adapters, optimizer)
    step = make_train_step(model, optimizer, setting.training)
    return _compiled(step, state, model.frozen, batches, model.num_trainable)


def qwix_lora(setting: Setting, batches: Sequence[Batch], base: CausalLM) -> Contender:
    """Qwix's LoRA in our decoder: it adds A and B to the parameters of the layers that its rule names."""
    qwix: Any = importlib.import_module("qwix")  # no dependency of this project
    path = f".*/({'|'.join(setting.adapted)})"
    rule = qwix.LoraRule(module_path=path, rank=setting.rank, alpha=setting.alpha)
    module = qwix.apply_lora_to_model(base.module, qwix.LoraProvider([rule]), methods=("__call__", "hidden"))
    model, training = dataclasses.replace(base, module=module), setting.training

    @jax.jit  # which leaves out the base's own random weights
    def fresh(key: jax.Array) -> dict[tuple[str, ...], jax.Array]:
        leaves = flatten_dict(model.init_params(key))
        return {path: leaf.astype(setting.dtype) for path, leaf in leaves.items() if "_lora_" in path[-1]}

    adapters = fresh(jax.random.key(0))
    factor = schedule(training)
    optimizer = optax.chain(
        optax.clip_by_global_norm(training.max_grad_norm),
        optax.adamw(lambda step: RATE * factor(step), weight_decay=training.weight_decay),
    )

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: Any, frozen: Any, batch: Any) -> Any:
        def loss(adapters: Any) -> jax.Array:
            variables = {"params": unflatten_dict(flatten_dict(frozen) | adapters)}
            hidden = model.hidden(variables, batch["input_ids"])
            return score(hidden, model.head(variables), batch["targets"]).mean()

        adapters, opt_state = state
        value, gradient = jax.value_and_grad(loss)(adapters)
        updates, opt_state = optimizer.update(gradient, opt_state, adapters)
        return (optax.apply_updates(adapters, updates), opt_state), {"loss": value}

    trainable = sum(leaf.size for leaf in adapters.values())
    return _compiled(step, (adapters, optimizer.init(adapters)), base.params, batches, trainable)


def _compiled(step: Any, state: Any, frozen: Any, batches: Sequence[Batch], trainable: int) -> Contender:
    """The contender of a jitted (state, frozen, batch) → (state, metrics)."""
    rows = itertools.cycle(on_device := jax.device_put(list(batches)))
    start = time.perf_counter()
    program = step.lower(state, frozen, on_device[0]).compile()
    seconds = time.perf_counter() - start

    def run() -> float:
        nonlocal state
        state, metrics = jax.block_until_ready(program(state, frozen, next(rows)))
        return float(metrics["loss"])

    return Contender(run, trainable, seconds, needed_bytes(program))
