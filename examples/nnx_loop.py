"""A small transformer of your own in Flax NNX: adapted by one call, trained by a loop of its own.

    python examples/nnx_loop.py

All that the transformer knows of adapters is its ``Attention``, which is plain attention until direct
adaptation or shifted groups are asked for; for hylorada_v1, as here, any other would do. Its paths and its
arithmetic are Llama's, so that the adapter that is saved fits the same weights in Linen and in PyTorch too.
"""

import jax.numpy as jnp
import optax
from flax import nnx

from hylorada_jax import HyLoRADAConfig, TrainingConfig
from hylorada_jax.nnx import AdapterParam, Attention, adapt, make_optimizer, save_adapter


def rotated(x):
    """Rotary positions of x [batch, seq, heads, width] (Su et al. 2021)."""
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1])[:, None, None] * 10_000.0 ** (-jnp.arange(half) / half)
    left, right = jnp.split(x, 2, axis=-1)
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


class SelfAttention(nnx.Module):
    """Causal self-attention."""

    def __init__(self, width, heads, *, rngs):
        self.heads = heads
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nnx.Linear(width, width, use_bias=False, rngs=rngs))
        self.attention = Attention(heads)

    def __call__(self, x):
        """The attended x [batch, seq, width]."""
        heads = lambda project: project(x).reshape(*x.shape[:2], self.heads, -1)
        query, key, value = heads(self.q_proj), heads(self.k_proj), heads(self.v_proj)
        y = self.attention(rotated(query), rotated(key), value)
        return self.o_proj(y.reshape(x.shape))


class MLP(nnx.Module):
    """A gated MLP."""

    def __init__(self, width, hidden, *, rngs):
        self.gate_proj = nnx.Linear(width, hidden, use_bias=False, rngs=rngs)
        self.up_proj = nnx.Linear(width, hidden, use_bias=False, rngs=rngs)
        self.down_proj = nnx.Linear(hidden, width, use_bias=False, rngs=rngs)

    def __call__(self, x):
        """Of x [batch, seq, width]."""
        return self.down_proj(nnx.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
    """Attention and MLP, each beside the stream."""

    def __init__(self, width, heads, hidden, *, rngs):
        self.input_layernorm = nnx.RMSNorm(width, rngs=rngs)
        self.self_attn = SelfAttention(width, heads, rngs=rngs)
        self.post_attention_layernorm = nnx.RMSNorm(width, rngs=rngs)
        self.mlp = MLP(width, hidden, rngs=rngs)

    def __call__(self, x):
        """Of x [batch, seq, width]."""
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nnx.Module):
    """Tokens to the states that the head reads."""

    def __init__(self, vocab, width, heads, hidden, depth, *, rngs):
        self.embed_tokens = nnx.Embed(vocab, width, rngs=rngs)
        self.layers = nnx.List([Block(width, heads, hidden, rngs=rngs) for _ in range(depth)])
        self.norm = nnx.RMSNorm(width, rngs=rngs)


class Transformer(nnx.Module):
    """A causal language model whose head is its embedding."""

    def __init__(self, vocab, width, heads, hidden, depth, *, rngs):
        self.model = Decoder(vocab, width, heads, hidden, depth, rngs=rngs)

    def __call__(self, ids):
        """Logits [batch, seq, vocab] of ids [batch, seq]."""
        x = self.model.embed_tokens(ids)
        for block in self.model.layers:
            x = block(x)
        return self.model.embed_tokens.attend(self.model.norm(x))


def train(model, ids, directory, steps=20):
    """Trains an adapter of a model on one batch, int [batch, seq], and saves it; the loss of every step."""
    adapt(model, HyLoRADAConfig.preset("recommended", lora_rank=4), nnx.Rngs(0))
    training = TrainingConfig(output=directory, steps=steps)
    optimizer = nnx.Optimizer(model, make_optimizer(model, training), wrt=AdapterParam)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            logits = model(ids)[:, :-1]
            return optax.losses.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

        value, gradient = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, AdapterParam))(model)
        optimizer.update(model, gradient)
        return value

    losses = [float(step(model, optimizer)) for _ in range(steps)]
    save_adapter(model, directory, overwrite=True)
    return losses


if __name__ == "__main__":
    text = "Adapters are small: two matrices of low rank beside each frozen one."
    model = Transformer(vocab=256, width=64, heads=4, hidden=128, depth=2, rngs=nnx.Rngs(0))
    print(train(model, jnp.array([[*text.encode()]]), "runs/nnx_loop"))
