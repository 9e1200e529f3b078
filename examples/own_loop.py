"""A training loop of your own around an adapted model, in jax and optax alone.

    python examples/own_loop.py

It trains SmolLM2-135M on its own prompt for a few steps and writes the adapter to runs/own_loop. What
HyLoRADATrainer adds to this: data, microbatches, evaluation, checkpoints, resuming, a log.
"""

import jax
import jax.numpy as jnp
import optax

from hylorada_jax import HyLoRADAConfig, HyLoRADAModel, load_model, load_tokenizer


def train(base, ids, directory, steps=8):
    """Trains an adapter of a causal language model on one batch, and saves it.

    Args:
        base: from ``load_model``.
        ids: int [batch, seq].
        directory: where the adapter is saved.
        steps: optimizer steps.

    Returns:
        The loss of every step.
    """
    model = HyLoRADAModel(base, HyLoRADAConfig.preset("recommended", lora_dropout=0.05))

    def loss(adapters, frozen, key):
        logits = model.apply(adapters, ids, train=True, rngs={"dropout": key}, frozen=frozen).logits
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:]).mean()

    # AdamW decays the two matrices alone: magnitudes and gates are no weights that should shrink.
    def group(path, _):
        return "matrices" if path[-1].key in ("lora_A", "lora_B") else "rest"

    labels = jax.tree_util.tree_map_with_path(group, model.adapters)
    rates = {"matrices": optax.adamw(4e-3, weight_decay=0.01), "rest": optax.adam(4e-3)}
    optimizer = optax.multi_transform(rates, labels)

    # The frozen weights are an argument: as a constant they would be copied into the compiled program.
    @jax.jit
    def step(adapters, state, frozen, key):
        value, gradient = jax.value_and_grad(loss)(adapters, frozen, key)
        updates, state = optimizer.update(gradient, state, adapters)
        return optax.apply_updates(adapters, updates), state, value

    state, losses = optimizer.init(model.adapters), []
    for key in jax.random.split(jax.random.key(0), steps):
        model.adapters, state, value = step(model.adapters, state, model.frozen, key)
        losses.append(float(value))
        print(f"loss {losses[-1]:.3f}")
    model.save_pretrained(directory, overwrite=True)
    return losses


if __name__ == "__main__":
    tokenizer = load_tokenizer("smollm2-135m")
    text = "Adapters are small: two matrices of low rank beside each frozen one."
    train(load_model("smollm2-135m"), jnp.array([tokenizer.encode(text)]), "runs/own_loop")
