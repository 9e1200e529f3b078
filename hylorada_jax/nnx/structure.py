"""The structure encoders as NNX modules: one per model feeds every HyLoRADAv2Linear (method.md §5)."""

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from hylorada_jax.math import structure
from hylorada_jax.math.position import NUM_BUCKETS
from hylorada_jax.modules.checks import check_encoder, check_periods, check_structure
from hylorada_jax.nnx.variables import AdapterParam


class StructureEncoder(nnx.Module):
    """One vector per token, from its place and its structure id, for all layers.

        e = bucket_embeddings[bucket] + [sin θ, cos θ]  (+ structure_embeddings[clip(structure_ids)])
        prior = σ(gate)·proj(LayerNorm(e)),   θ_i = position·|freq_scale_i|·10000^(−i/(D/2))

    Args, errors and source: :class:`hylorada_jax.StructureEncoder`.

    Example:
        >>> encoder = StructureEncoder(32, rngs=nnx.Rngs(0))
        >>> encoder(encoder.get_position_tensor(1, 3)).shape
        (1, 3, 32)
    """

    encoder_type = "default"

    def __init__(
        self,
        hidden_size: int = 32,
        encoding_dim: int = 32,
        num_buckets: int = NUM_BUCKETS,
        max_structure_types: int = 64,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        self._fill(hidden_size, encoding_dim, num_buckets, max_structure_types, rngs)

    def _fill(
        self,
        hidden_size: int,
        encoding_dim: int,
        num_buckets: int,
        max_structure_types: int,
        rngs: nnx.Rngs,
        **periods: int,
    ) -> None:
        self.hidden_size, self.encoding_dim, self.num_buckets = hidden_size, encoding_dim, num_buckets
        self.max_structure_types = max_structure_types
        check_encoder(self)
        leaves = structure.init_leaves(
            rngs.params(),
            hidden_size,
            self.encoder_type,
            encoding_dim=encoding_dim,
            num_buckets=num_buckets,
            max_structure_types=max_structure_types,
            **periods,
        )
        self.leaves = tuple(leaves)
        for name, leaf in leaves.items():
            setattr(self, name, AdapterParam(leaf, component="structure_encoder"))

    def __call__(
        self,
        positions: Int[Array, "batch seq"] | Float[Array, "batch seq"],
        structure_ids: Int[Array, "batch seq"] | None = None,
        seq_len: int | None = None,
    ) -> Float[Array, "batch seq hidden_size"]:
        """The prior, at least float32.

        ``seq_len`` is the length whose middle the buckets count from; None takes that of ``positions``.
        """
        positions = jnp.asarray(positions)
        if structure_ids is not None:
            structure_ids = jnp.asarray(structure_ids)
        check_structure(positions, structure_ids)
        leaves = {name: getattr(self, name)[...] for name in self.leaves}
        seq_len = positions.shape[1] if seq_len is None else seq_len
        return structure.structure_prior(leaves, positions, structure_ids, seq_len)

    def get_position_tensor(self, batch_size: int, seq_len: int) -> Int[Array, "batch seq"]:
        """The positions of rows that are counted from 0.

            position[b, i] = i

        Args:
            batch_size: rows.
            seq_len: tokens per row.

        Returns:
            int32 [batch_size, seq_len].

        Example:
            >>> StructureEncoder(32, rngs=nnx.Rngs(0)).get_position_tensor(2, 3).tolist()
            [[0, 1, 2], [0, 1, 2]]
        """
        return jnp.broadcast_to(jnp.arange(seq_len, dtype=jnp.int32), (batch_size, seq_len))


class TemporalStructureEncoder(StructureEncoder):
    """A structure encoder that knows periods: the time of day, of the week, of the month, of the year.

        e = … + period_proj([sin φ, cos φ]),   φ_j = 2π·position/|period_j|

    Args, errors and source: :class:`hylorada_jax.TemporalStructureEncoder`.

    Example:
        >>> encoder, hours = TemporalStructureEncoder(32, rngs=nnx.Rngs(0)), jnp.array([[0.5, 24.5]])
        >>> encoder(hours).shape
        (1, 2, 32)
    """

    encoder_type = "temporal"

    def __init__(
        self,
        hidden_size: int = 32,
        encoding_dim: int = 32,
        num_buckets: int = NUM_BUCKETS,
        max_structure_types: int = 64,
        num_periods: int = len(structure.PERIODS),
        *,
        rngs: nnx.Rngs,
    ) -> None:
        check_periods(num_periods)
        sizes = hidden_size, encoding_dim, num_buckets, max_structure_types
        self._fill(*sizes, rngs, num_periods=num_periods)
