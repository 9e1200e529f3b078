"""Training in JAX against the reference: 20 AdamW steps with LoRA+ on the same data, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch.nn.functional as F

import hylorada_torch
from hylorada_jax.config import METHODS, HyLoRADAConfig
from hylorada_jax.model import HyLoRADAModel
from hylorada_jax.surgery import layout
from hylorada_jax.training.config import TrainingConfig
from hylorada_jax.training.optimizer import make_optimizer
from parity_tests.conftest import VOCAB
from parity_tests.tolerances import TRAJECTORY

# Rates that move the adapters far in 20 steps, a gradient norm that clips some steps and not others.
TRAINING = TrainingConfig(
    output_dir="unused", steps=20, learning_rate=5e-3, warmup_ratio=0.1, weight_decay=0.1, max_grad_norm=0.5
)


def train_torch(model, config, batches, told):
    model.train(bool(config.s2_attn_enabled))
    adapters = model.adapters()
    optimizer, scheduler = hylorada_torch.make_optimizer(adapters, TRAINING, config)
    losses = []
    for batch in torch.from_numpy(batches):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch[:, :-1], **told).logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        hylorada_torch.clip_by_global_norm(adapters.values(), TRAINING.max_grad_norm)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses, {name: value.detach().numpy() for name, value in adapters.items()}


def train_jax(model, adapters, config, batches, told):
    optimizer = make_optimizer(adapters, TRAINING, config)

    @jax.jit
    def step(adapters, state, batch):
        def mean_loss(adapters):
            logits = model.apply(adapters, batch[:, :-1], train=bool(config.s2_attn_enabled), **told).logits
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

        loss, gradients = jax.value_and_grad(mean_loss)(adapters)
        updates, state = optimizer.update(gradients, state, adapters)
        return optax.apply_updates(adapters, updates), state, loss

    state, losses = optimizer.init(adapters), []
    for batch in batches:
        adapters, state, loss = step(adapters, state, jnp.asarray(batch))
        losses.append(float(loss))
    return losses, layout.flatten(model.sites, adapters)


CONFIGS = {
    method: HyLoRADAConfig(
        method=method,
        lora_rank=3,
        lora_plus_ratio=10.0,
        sparse_enabled=True if method in ("sparse", "hylorada") else None,
        sparse_adapter_dim=7,
        sparse_topk_ratio=0.5,
        s2_group_size=4,
        structure_dim=5,
        structure_seq_len=12,
    )
    for method in METHODS
}
CASES = [
    *(("gpt2", method) for method in ("lora", "dora", "longlora", "hylorada_v1", "hylorada")),
    *(("llama", method) for method in ("dora", "sparse", "hylorada_v2")),
    *(("qwen2", method) for method in ("lorada", "longlora", "hylorada_v1", "hylorada_v2", "hylorada")),
]


@pytest.mark.parametrize(("family", "method"), CASES)
def test_twenty_steps(base_models, family, method):
    config = CONFIGS[method]
    # Two batches in turn, ten times each: they are learnt by heart, so that the loss must fall.
    batches = np.tile(np.random.default_rng(3).integers(VOCAB, size=(2, 2, 9)), (10, 1, 1))
    ids = np.random.default_rng(4).integers(6, size=(2, 8))
    told = {"structure_ids": ids} if config.use_hylorada_v2 else {}
    with jax.enable_x64(True):
        torch_base, jax_base = base_models(family, "float64")
        reference, model = hylorada_torch.HyLoRADAModel(torch_base, config), HyLoRADAModel(jax_base, config)
        start = {name: value.detach().numpy().copy() for name, value in reference.adapters().items()}
        of_torch = {name: torch.from_numpy(value) for name, value in told.items()}
        expected_losses, expected = train_torch(reference, config, batches, of_torch)
        of_jax = {name: jnp.asarray(value) for name, value in told.items()}
        losses, got = train_jax(model, layout.unflatten(model.sites, start), config, batches, of_jax)
    assert sum(expected_losses[-2:]) < sum(expected_losses[:2])
    # DAA's β has no gradient: the softmax does not see it.
    moved = {name: np.abs(expected[name] - start[name]).max() for name in start if not name.endswith(".beta")}
    assert min(moved.values()) > 1000 * TRAJECTORY, moved
    np.testing.assert_allclose(losses, expected_losses, rtol=0, atol=TRAJECTORY)
    assert set(got) == set(expected)
    errors = {name: np.abs(got[name] - expected[name]).max() for name in expected}
    assert max(errors.values()) <= TRAJECTORY, errors
