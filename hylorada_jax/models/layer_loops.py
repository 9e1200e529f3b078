"""The layers of our decoder, under ``nn.scan``.

Their parameters, and the variables of adapters in the collection ``hylorada``, are stacked along a leading
axis, and the program has the size of one layer whatever the depth, or of the pattern in which layers of
several shapes follow each other (``models.stacks``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from hylorada_jax.errors import require_one_of
from hylorada_jax.math.remat import OUTPUT
from hylorada_jax.models.decoder_config import DecoderConfig
from hylorada_jax.models.decoder_layer import Cache, DecoderLayer, KeysValues, Own, Step, Stream
from hylorada_jax.models.stacks import Stack, parts_of, stacks_of
from hylorada_jax.trees import COLLECTION

# What the backward pass keeps of a layer's inside. 'dots' keeps by name what attention and linear layers
# give: a policy for products would keep of an adapted layer the base's and δ, in float32 too, and of experts
# none.
REMAT_POLICIES: dict[str, Callable[..., bool] | None] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names(OUTPUT),
}


def check_remat(remat: str) -> str:
    """The policy's name, where there is such a one; a ConfigError otherwise."""
    require_one_of("remat", remat, tuple(REMAT_POLICIES))
    return remat


class Carry(NamedTuple):
    """What passes from stack to stack: the residual stream and, when decoding, each one's keys and values.

    Where later layers share keys and values, ``shared`` has the last of the layers with a window (True) and
    of those without.
    """

    x: Float[Array, "batch query hidden"]
    caches: tuple[Cache | None, ...] | None
    shared: dict[bool, KeysValues] | None


def scan(module: type[nn.Module], length: int) -> Callable[..., nn.Module]:
    """A module whose calls follow each other, their parameters and adapters stacked along a first axis."""
    return nn.scan(
        module,
        variable_axes={"params": 0, COLLECTION: 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(0, nn.broadcast),
        length=length,
    )


def layers_of(stack: Stack, remat: str, name: str | None = None) -> nn.Module:
    """The layers of a stack that follow each other as one scanned, perhaps rematerialised, layer."""
    # prevent_cse: needed outside of scan only, and it costs.
    layer = (
        DecoderLayer
        if remat == "none"
        else nn.remat(DecoderLayer, policy=REMAT_POLICIES[remat], prevent_cse=False)
    )
    return scan(layer, stack.together)(stack.config, name=name)


def run(layers: nn.Module, stack: Stack, carry: Carry, steps: Sequence[Step], own: Own) -> Carry:
    """Applies those layers of a stack that follow each other, in one repeat of the pattern."""
    x, caches, shared = carry
    slides = stack.config.slides
    cache = None if caches is None else caches[stack.index]
    stream = Stream(x, cache, None if shared is None else shared[slides])
    stream, _ = layers(stream, own, steps[stack.index])
    if caches is not None and stream.cache is not None:
        caches = (*caches[: stack.index], stream.cache, *caches[stack.index + 1 :])
    if shared is not None and stream.shared is not None:
        shared = {**shared, slides: stream.shared}
    return Carry(stream.x, caches, shared)


def own_of(stack: Stack, per_layer: Float[Array, "layers batch query width"] | None, repeats: int = 1) -> Own:
    """What each layer of a stack has of its own, [repeats, together, …] or, of one repeat, [together, …]."""
    numbers = jnp.arange(len(stack.numbers), dtype=jnp.int32)
    own = Own(numbers, None if per_layer is None else per_layer[np.array(stack.numbers)])
    if repeats == 1:
        return own
    return jax.tree.map(lambda leaf: leaf.reshape(repeats, stack.together, *leaf.shape[1:]), own)


class Repeated(nn.Module):
    """The layers of one repeat of a part's pattern."""

    stacks: tuple[Stack, ...]
    remat: str

    @nn.compact
    def __call__(self, carry: Carry, owns: Sequence[Own], steps: Sequence[Step]) -> tuple[Carry, None]:
        """Applies them one after another."""
        for number, (stack, own) in enumerate(zip(self.stacks, owns, strict=True)):
            carry = run(layers_of(stack, self.remat, str(number)), stack, carry, steps, own)
        return carry, None


class Layers(nn.Module):
    """Layers of several shapes, part by part."""

    config: DecoderConfig
    remat: str

    @nn.compact
    def __call__(
        self,
        carry: Carry,
        per_layer: Float[Array, "layers batch query width"] | None,
        steps: Sequence[Step],
    ) -> Carry:
        """Applies all of them."""
        for number, (repeats, stacks) in enumerate(parts_of(self.config)):
            part: Any = Repeated
            if repeats > 1:
                part = _of_repeats(repeats, starting=self.is_initializing())
            if carry.shared is not None and stacks[0].config.shared_kv_layers:
                steps = _with_shared(steps, stacks_of(self.config), carry.shared)
                carry = carry._replace(shared=None)  # no layer adds to them from here on
            owns = [own_of(stack, per_layer, repeats) for stack in stacks]
            carry, _ = part(stacks, self.remat, name=str(number))(carry, owns, steps)
        return carry


def _with_shared(
    steps: Sequence[Step], stacks: Sequence[Stack], shared: dict[bool, KeysValues]
) -> list[Step]:
    """The steps of all stacks with the keys and values that those without their own take."""
    return [
        step._replace(shared=shared[stack.config.slides]) for step, stack in zip(steps, stacks, strict=True)
    ]


def _of_repeats(repeats: int, *, starting: bool) -> Callable[..., nn.Module]:
    """The repeats of a pattern as one loop over it, around those over the layers of its stacks.

    Outside of it a stack has its layers along one axis, [repeats · together, …].
    """

    def reshaped(axes: tuple[int, ...], taken: int) -> Callable[[Any], Any]:
        return lambda tree: jax.tree.map(lambda leaf: leaf.reshape(*axes, *leaf.shape[taken:]), tree)

    return nn.map_variables(
        scan(Repeated, repeats),
        ("params", COLLECTION),
        trans_in_fn=reshaped((repeats, -1), 1),
        trans_out_fn=reshaped((-1,), 2),
        init=starting,
    )


def room_to_share(
    config: DecoderConfig, x: Float[Array, "batch query hidden"], slots: Int[Array, " slots"]
) -> dict[bool, KeysValues] | None:
    """Room for the keys and values that later layers share; None where none do."""
    if not config.shared_kv_layers:
        return None
    room = {}
    for kind in config.kinds():
        if not kind.shared_kv_layers:
            zeros = jnp.zeros((len(x), len(slots), kind.num_key_value_heads, kind.head_dim), x.dtype)
            room[kind.slides] = zeros, zeros
    return room
