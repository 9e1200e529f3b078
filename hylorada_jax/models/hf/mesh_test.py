"""Oracle of one of Hugging Face's Flax models on eight devices: the same on one, and as copies on each."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

transformers = pytest.importorskip("hylorada_jax.models.hf.loading", exc_type=ImportError).transformers

from hylorada_jax.config import HyLoRADAConfig  # noqa: E402
from hylorada_jax.evaluation.perplexity import evaluate_perplexity  # noqa: E402
from hylorada_jax.model import HyLoRADAModel  # noqa: E402
from hylorada_jax.placement.placement import Placement, parse_mesh  # noqa: E402
from hylorada_jax.training.config import TrainingConfig  # noqa: E402
from hylorada_jax.training.trainer import HyLoRADATrainer  # noqa: E402

MESH = "fsdp=4,tensor=2"


def facts(directory, placement=None):
    """What one placement makes of a model."""
    transformers.set_seed(0)
    config = transformers.GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    base = transformers.FlaxGPT2LMHeadModel(config, seed=1)
    adapter = HyLoRADAConfig(method="dora", lora_rank=2, target_modules=("c_attn", "c_fc"))
    model = HyLoRADAModel(base, adapter, placement=placement)
    rng = np.random.default_rng(1)
    model.adapters = jax.tree.map(
        lambda x: jax.device_put(np.asarray(x) + 0.1 * rng.normal(size=x.shape), x.sharding), model.adapters
    )
    documents = [rng.integers(0, 50, 30) for _ in range(16)]
    kernel = model.base.params["transformer"]["h"]["0"]["mlp"]["c_fc"]["kernel"]
    found = {
        "share": kernel.size // kernel.addressable_shards[0].data.size,
        "logits": np.asarray(model(jnp.array([[1, 2, 3, 4]])).logits).tolist(),
        "loss": evaluate_perplexity(model, documents, seq_len=16, batch_size=3, progress=False).loss,
        "tokens": model.generate([[1, 2, 3], [4, 5]], max_new_tokens=4),
    }
    training = TrainingConfig(
        output=directory, steps=3, batch_size=8, seq_len=16, packing=False, progress=False, learning_rate=1e-3
    )
    return found | {"losses": HyLoRADATrainer(model, documents, None, training).train().losses}


def measure(directory):
    """What is found on eight devices, as JSON on stdout."""
    placement = Placement(parse_mesh(MESH))
    print(json.dumps([facts(Path(directory) / "mesh", placement), facts(Path(directory) / "alone")]))


def test_a_model_on_a_mesh_computes_and_trains_as_on_one_device(tmp_path, run_on_devices):
    program = f"import sys\nfrom {__name__} import measure\nmeasure(sys.argv[1])"
    ours, alone = json.loads(run_on_devices(8, program, tmp_path))
    assert (ours["share"], alone["share"]) == (4, 1)  # by the rule for kernels of others, over fsdp alone
    # float32, and sums in another order.
    np.testing.assert_allclose(ours["logits"], alone["logits"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(ours["loss"], alone["loss"], rtol=1e-6)
    np.testing.assert_allclose(ours["losses"], alone["losses"], rtol=1e-5)
    assert ours["tokens"] == alone["tokens"]
