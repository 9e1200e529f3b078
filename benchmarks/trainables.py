"""What a benchmark trains: adapters, all of the weights, or nothing."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from benchmarks.experiment import BASE
from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.model import HyLoRADAModel
from hylorada_jax.models.base_model import BaseModel
from hylorada_jax.saved.inspection import effective_rank, singular_values
from hylorada_jax.surgery.layout import flatten
from hylorada_jax.training.config import TrainingConfig
from hylorada_jax.training.optimizer import make_optimizer, schedule
from hylorada_jax.trees import Adapters, Frozen, Params


def trainable(base: Any, kind: str, config: HyLoRADAConfig | None) -> Adapted | Full | None:
    """What a row of the table trains on a base model; None for the base itself."""
    if config is not None:
        return Adapted(base, config)
    return None if kind == BASE else Full(base)


class Adapted:
    """An adapter on a base model."""

    def __init__(self, base: Any, config: HyLoRADAConfig) -> None:
        self.model = HyLoRADAModel(base, config)

    def start(self, seed: int) -> Adapters:
        """Fresh adapters."""
        return self.model.init_adapters(seed)

    def optimizer(self, adapters: Adapters, training: TrainingConfig) -> optax.GradientTransformation:
        """That of the library."""
        return make_optimizer(adapters, training, self.model.config)

    def trained(self, adapters: Adapters) -> HyLoRADAModel:
        """The model to evaluate."""
        self.model.adapters = adapters
        return self.model

    def effective_ranks(self, adapters: Adapters) -> dict[str, float]:
        """Those of A and of BA, each the mean over the layers that have them."""
        found: dict[str, list[float]] = {}
        for name, A in (tensors := flatten(self.model.sites, adapters)).items():
            if name.endswith("lora_A"):
                found.setdefault("A", []).append(effective_rank(singular_values(A)))
                product = singular_values(tensors[f"{name[:-1]}B"], A)
                found.setdefault("BA", []).append(effective_rank(product))
        return {of: statistics.fmean(ranks) for of, ranks in found.items()}


class Full:
    """All weights of a base model; also the :class:`Scorable` model that trains."""

    has_encoder, disabled = False, False

    def __init__(self, base: BaseModel) -> None:
        self.base, self.model = base, self
        self.adapters = base.params
        self.frozen: Frozen = {}
        self.num_trainable = sum(leaf.size for leaf in jax.tree.leaves(base.params))

    def start(self, seed: int) -> Params:
        """The pretrained weights, in float32."""
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), self.base.params)

    def optimizer(self, params: Params, training: TrainingConfig) -> optax.GradientTransformation:
        """AdamW with the clipping and the schedule that adapters have."""
        factor = schedule(training)

        @optax.inject_hyperparams
        def adamw(peak: Any, weight_decay: Any) -> optax.GradientTransformation:
            return optax.adamw(lambda step: peak * factor(step), weight_decay=weight_decay)

        return optax.chain(
            optax.clip_by_global_norm(training.max_grad_norm),
            adamw(peak=training.learning_rate, weight_decay=training.weight_decay),
        )

    def effective_ranks(self, params: Params) -> dict[str, float]:
        """None: there is no A."""
        return {}

    def trained(self, params: Params) -> Any:
        """The model to evaluate."""
        dtypes = jax.tree.map(lambda leaf: leaf.dtype, self.base.params)
        return self.base.with_params(jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), params, dtypes))

    def resolve(self, adapters: Params, frozen: Frozen) -> Params:
        """The weights in the base's dtype."""
        return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), adapters, self.base.params)

    def hidden(
        self,
        resolved: Params,
        input_ids: Array,
        *,
        frozen: Frozen,
        train: bool = False,
        rngs: Mapping[str, Array] | None = None,
        rows: Array | None = None,
        **inputs: Any,
    ) -> Array:
        """The states [batch, seq, d] that the output head reads."""
        return self.base.hidden({"params": resolved}, input_ids, **inputs)

    def head(self, resolved: Params, frozen: Frozen) -> Array:
        """The output embedding [vocab, d]."""
        return self.base.head({"params": resolved})
