"""The call of a whole adapted model."""

from typing import Any

from flax import nnx
from jax import Array

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.math import structure
from hylorada_jax.math.position import position_factor
from hylorada_jax.modules.checks import check_structure
from hylorada_jax.nnx.adapted import Adapted
from hylorada_jax.nnx.tokens import Pass, Tokens, called, tokens_of


class AdaptedModel(Adapted):
    """A whole model, whose call says what its layers need to know of the tokens."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """What the model gives."""
        given, counted = tokens_of(self.hylorada_inner.__call__, arguments, options)
        now = Pass(given.position_ids, counted)
        if given.position_ids is not None:
            config: HyLoRADAConfig = self.hylorada.config
            if config.position_bias_enabled:
                now = now._replace(position=position_factor(self.position_bias[...], given.position_ids))
            if config.use_hylorada_v2:
                now = now._replace(prior=self._prior(self.structure_encoder, given))
        with called(now):
            return self.hylorada_inner.__call__(self, *arguments, **options)

    def _prior(self, encoder: Any, given: Tokens) -> Array:
        places = given.position_ids if given.structure_positions is None else given.structure_positions
        assert places is not None
        check_structure(places, given.structure_ids)
        leaves = {name: leaf[...] for name, leaf in vars(encoder).items() if isinstance(leaf, nnx.Variable)}
        length = self.hylorada.config.structure_seq_len
        return structure.structure_prior(leaves, places, given.structure_ids, length)
