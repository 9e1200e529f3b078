"""The structure encoders as Linen modules: one per model feeds every HyLoRADAv2Linear (method.md §5)."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from hylorada_jax.math import structure
from hylorada_jax.math.position import NUM_BUCKETS
from hylorada_jax.modules.checks import check_encoder, check_periods, check_structure


class StructureEncoder(nn.Module):
    """One vector per token, from its place and its structure id, for all layers.

        e = bucket_embeddings[bucket] + [sin θ, cos θ]  (+ structure_embeddings[clip(structure_ids)])
        prior = σ(gate)·proj(LayerNorm(e)),   θ_i = position·|freq_scale_i|·10000^(−i/(D/2))

    Attributes:
        hidden_size: width of the prior, structure_dim of the layers.
        encoding_dim: D, even.
        num_buckets: buckets on either side of the sequence's middle, ≥ 2.
        max_structure_types: distinct structure ids; greater ones count as the last.

    Parameters: bucket_embeddings [2·num_buckets + 1, D] and structure_embeddings [max_structure_types, D]
    ~ N(0, 0.02²), freq_scale [D/2] ones, norm_weight and norm_bias [D], proj_weight [hidden_size, D]
    Kaiming-uniform(a=√5), gate 0; float32: 7,281 numbers at the defaults.

    Raises:
        ConfigError: a setting is out of range.
        DataError: positions are not [batch, seq] or are negative integers, or structure_ids are not integers
            of that shape.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> prior, params = StructureEncoder(32).init_with_output(jax.random.key(0), jnp.array([[0, 1, 2]]))
        >>> prior.shape
        (1, 3, 32)

    Source: method.md §5.
    """

    hidden_size: int = 32
    encoding_dim: int = 32
    num_buckets: int = NUM_BUCKETS
    max_structure_types: int = 64

    @nn.compact
    def __call__(
        self,
        positions: Int[Array, "batch seq"] | Float[Array, "batch seq"],
        structure_ids: Int[Array, "batch seq"] | None = None,
        seq_len: int | None = None,
    ) -> Float[Array, "batch seq hidden_size"]:
        """The prior, at least float32.

        ``seq_len`` is the length whose middle the buckets count from. None takes that of ``positions``, so
        the middle moves as a row grows: fix it if rows of several lengths must agree.
        """
        return self._encode(positions, structure_ids, seq_len, "default")

    @nn.nowrap
    def get_position_tensor(self, batch_size: int, seq_len: int) -> Int[Array, "batch seq"]:
        """The positions of rows that are counted from 0.

            position[b, i] = i

        Args:
            batch_size: rows.
            seq_len: tokens per row.

        Returns:
            int32 [batch_size, seq_len].

        Example:
            >>> StructureEncoder(32).get_position_tensor(2, 3).tolist()
            [[0, 1, 2], [0, 1, 2]]
        """
        return jnp.broadcast_to(jnp.arange(seq_len, dtype=jnp.int32), (batch_size, seq_len))

    def _encode(
        self, positions: Any, structure_ids: Any, seq_len: int | None, encoder_type: str, **sizes: int
    ) -> Array:
        check_encoder(self)
        positions = jnp.asarray(positions)
        if structure_ids is not None:
            structure_ids = jnp.asarray(structure_ids)
        check_structure(positions, structure_ids)
        sizes |= {
            "encoding_dim": self.encoding_dim,
            "num_buckets": self.num_buckets,
            "max_structure_types": self.max_structure_types,
        }

        def fresh(key: Array, name: str) -> Array:
            return structure.init_leaves(key, self.hidden_size, encoder_type, **sizes)[name]

        leaves = {
            name: jnp.asarray(self.param(name, fresh, name))
            for name in structure.leaf_shapes(self.hidden_size, encoder_type, **sizes)
        }
        seq_len = positions.shape[1] if seq_len is None else seq_len
        return structure.structure_prior(leaves, positions, structure_ids, seq_len)


class TemporalStructureEncoder(StructureEncoder):
    """A structure encoder that knows periods: the time of day, of the week, of the month, of the year.

        e = … + period_proj([sin φ, cos φ]),   φ_j = 2π·position/|period_j|

    Positions are steps, or hours as floats, so that the periods start at calendar ones.

    Attributes: StructureEncoder's, and
        num_periods: how many of the periods 24, 168, 720 and 8760, from the first.

    Parameters: StructureEncoder's, and periods [num_periods], period_weight [D, 2·num_periods]
    Kaiming-uniform(a=√5).

    Raises:
        ConfigError: num_periods is not 1 … 4; and as StructureEncoder.
        DataError: as StructureEncoder.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> encoder, hours = TemporalStructureEncoder(32), jnp.array([[0.5, 24.5]])
        >>> encoder.init_with_output(jax.random.key(0), hours)[0].shape
        (1, 2, 32)

    Source: method.md §5.
    """

    num_periods: int = len(structure.PERIODS)

    @nn.compact
    def __call__(
        self,
        positions: Int[Array, "batch seq"] | Float[Array, "batch seq"],
        structure_ids: Int[Array, "batch seq"] | None = None,
        seq_len: int | None = None,
    ) -> Float[Array, "batch seq hidden_size"]:
        """The prior, at least float32; ``seq_len`` as in :class:`StructureEncoder`."""
        check_periods(self.num_periods)
        return self._encode(positions, structure_ids, seq_len, "temporal", num_periods=self.num_periods)
