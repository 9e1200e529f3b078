"""The variables that train."""

from flax import nnx


class AdapterParam(nnx.LoRAParam):
    """A leaf of an adapter: what trains, and nothing else of a model does.

    ``nnx.DiffState(0, AdapterParam)``, ``nnx.Optimizer(model, tx, wrt=AdapterParam)`` and
    ``nnx.state(model, AdapterParam)`` see adapters alone; so do libraries that look for ``nnx.LoRAParam``.
    The metadata ``component`` says which of :mod:`hylorada_jax.leaves` it is of.

    Example:
        >>> from hylorada_jax.nnx import LoRALinear
        >>> layer = LoRALinear(3, 4, rank=2, rngs=nnx.Rngs(0))
        >>> sorted(nnx.state(layer, AdapterParam))
        ['lora_A', 'lora_B']
    """
