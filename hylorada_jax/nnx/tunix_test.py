"""tunix's models and trainer, and qwix's quantised modules, with our adapters. Oracle: our decoder."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix  # type: ignore[import-untyped]
from flax import nnx
from safetensors.numpy import save_file
from tunix.models.gemma3 import model as gemma3
from tunix.models.gemma3 import params_safetensors as gemma3_params
from tunix.models.llama3 import model as llama3
from tunix.models.llama3 import params as llama3_params
from tunix.models.qwen3 import model as qwen3
from tunix.models.qwen3 import params as qwen3_params
from tunix.sft import peft_trainer
from tunix.sft.utils import make_causal_attn_mask

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import ModelError
from hylorada_jax.model import HyLoRADAModel
from hylorada_jax.models.causal_lm import CausalLM
from hylorada_jax.models.decoder_config import DecoderConfig
from hylorada_jax.nnx import AdapterParam, adapt, load_adapter, make_optimizer, merge, save_adapter
from hylorada_jax.nnx.adapting import adaptation_of, adapters_of
from hylorada_jax.nnx.adapting_test import WRT, moved
from hylorada_jax.nnx.quantized import numbers, value_of
from hylorada_jax.surgery import modules as surgery
from hylorada_jax.surgery.layout import flatten, unflatten
from hylorada_jax.training.config import TrainingConfig
from hylorada_jax.training.optimizer import make_optimizer as optimizer_of_trees
from hylorada_jax.training.step import init_state, make_train_step

# tunix and qwix read variables in ways that flax has given up.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

VOCAB = 128  # texts are ASCII codes
HF: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True,
    "rope_theta": 1e6, "rms_norm_eps": 1e-6, "initializer_range": 0.3,
}  # fmt: skip
SIZES: dict[str, Any] = {"embed_dim": 16, "hidden_dim": 24, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
COMMON = SIZES | {"num_layers": 1, "vocab_size": VOCAB, "rope_theta": 1_000_000, "norm_eps": 1e-6}
OF_GEMMA = {
    "sliding_window": 4, "layer_types": ["sliding_attention"],
    "rope_local_base_freq": 1e4, "query_pre_attn_scalar": 8,
}  # fmt: skip
FAMILIES = {
    "llama": (HF, llama3.ModelConfig(**COMMON, weight_tying=True), llama3_params),
    "qwen3": (HF, qwen3.ModelConfig(**COMMON, use_tied_embedding=True), qwen3_params),
    "gemma3_text": (
        HF | OF_GEMMA,
        gemma3.ModelConfig(
            **SIZES, num_layers=1, num_embed=VOCAB, sliding_window_size=4, param_dtype=jnp.float32
        ),
        gemma3_params,
    ),
}
IDS = jax.random.randint(jax.random.key(1), (2, 9), 0, VOCAB)


class Pair(NamedTuple):
    """Our decoder, and tunix's model of its weights by tunix's own reader of checkpoints."""

    base: CausalLM
    model: nnx.Module
    logits: jax.Array


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return {family: pair_of(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


def pair_of(family, directory):
    hf, config, params = FAMILIES[family]
    base = CausalLM.from_config(DecoderConfig.from_hf(hf | {"model_type": family}), jax.random.key(0))
    found = surgery.modules_of(base)
    weights: dict[str, Any] = {}
    for linear in found.linears:
        weights |= {name: linear.weight(base.params, i) for i, name in enumerate(linear.names)}
    for module in (*found.embeddings, *found.norms):
        (leaf,) = surgery.subtree(base.params, module.path).values()
        weights |= dict(zip(module.names, leaf if module.stacked else [leaf], strict=True))
    tensors = {f"{name}.weight": np.ascontiguousarray(weight) for name, weight in weights.items()}
    save_file(tensors, directory / "model.safetensors")
    model = params.create_model_from_safe_tensors(str(directory), config, dtype=jnp.float32)
    return Pair(base, model, base(IDS).logits)


def logits_of(model):
    positions = jnp.broadcast_to(jnp.arange(IDS.shape[1]), IDS.shape)
    return model(IDS, positions, None, make_causal_attn_mask(jnp.ones(IDS.shape, bool)))[0]


def total(logits):
    return jnp.sum(jnp.sin(logits)), logits


run = nnx.jit(logits_of)


@nnx.jit
def with_gradient(model):
    return nnx.value_and_grad(lambda model: total(logits_of(model)), argnums=WRT, has_aux=True)(model)


def close(got, expected, tolerance=1e-5):
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * float(jnp.abs(expected).max()))


def config_of(method, **settings):
    return HyLoRADAConfig(method=method, lora_rank=2, **{"target_modules": "all-linear"} | settings)


def leaves_of(model):
    return flatten(model.hylorada.sites, adapters_of(model, *adaptation_of(model)))


UNIFIED = {"daa_enabled": False, "daa_position_bias": False}


@pytest.mark.parametrize(
    ("family", "method", "settings"),
    [
        ("qwen3", "lora", {}),
        ("qwen3", "dora", {"sparse_enabled": True, "sparse_adapter_dim": 4}),
        ("qwen3", "hylorada", UNIFIED),
        ("llama", "hylorada_v2", {"structure_dim": 4, "structure_seq_len": 9}),
    ],
)
def test_an_adapter_of_tunix_is_our_decoders_and_back(family, method, settings, pairs, tmp_path):
    base, plain, before = pairs[family]
    model = adapt(nnx.clone(plain), config_of(method, **settings), nnx.Rngs(2))
    differentiated = method == "hylorada"  # which has every leaf of the others but v2's
    compute = with_gradient if differentiated else lambda model: ((None, run(model)), None)
    close(compute(model)[0][1], before)
    (_, logits), gradient = compute(moved(model))
    assert float(jnp.abs(logits - before).max()) > 1e-2
    save_adapter(model, tmp_path / "tunix", base_config=base.config)
    linen = HyLoRADAModel.from_pretrained(base, tmp_path / "tunix")
    close(logits, linen(IDS).logits)
    linen.save_pretrained(tmp_path / "linen")
    back = load_adapter(nnx.clone(plain), tmp_path / "linen", base_config=base.config)
    same = jax.tree.map(jnp.array_equal, *(nnx.state(each, AdapterParam) for each in (back, model)))
    assert all(jax.tree.leaves(same))
    if differentiated:
        expected = jax.jit(jax.grad(lambda a: total(linen.apply(a, IDS).logits)[0]))(linen.adapters)
        nnx.update(model, gradient)
        got = leaves_of(model)
        for name, value in flatten(linen.sites, expected).items():
            assert np.any(value), name
            # tunix computes in float32. A scalar's gradient sums all tokens and outputs, and largely cancels.
            close(got[name], value, 1e-5 if value.ndim else 1e-4)


def test_gemma_3_has_names_of_its_own_for_its_keys_and_values_are_one_kernel(pairs):
    base, plain, before = pairs["gemma3_text"]
    model = adapt(nnx.clone(plain), config_of("hylorada_v1"), nnx.Rngs(2))
    start = leaves_of(model)
    (_, logits), gradient = with_gradient(model)
    close(logits, before)
    assert jnp.any(gradient["layers"][0]["attn"]["kv_einsum"]["lora_B"][...])
    moved(model)
    kv = model.layers[0].attn.kv_einsum  # as it was, for our decoder has no such adapter
    kv.lora_B.set_value(jnp.zeros_like(kv.lora_B[...]))
    kv.magnitude.set_value(jnp.linalg.norm(kv.w[...], axis=2).reshape(-1))
    (_, logits), _ = with_gradient(model)
    targets = ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    ours = HyLoRADAModel(base, config_of("hylorada_v1", target_modules=targets))
    tensors = {
        f"model.{name}".replace("attn.q_einsum", "self_attn.q_proj").replace(
            "attn.attn_vec_einsum", "self_attn.o_proj"
        ): tensor
        for name, tensor in leaves_of(model).items()
        if "kv_einsum" not in name
    }
    assert len(tensors) < len(start)
    ours.adapters = unflatten(ours.sites, tensors)
    close(logits, ours(IDS).logits)


@pytest.mark.parametrize(("method", "match"), [("lorada", "daa_enabled"), ("longlora", "s2_attn_enabled")])
def test_what_tunixs_attention_does_not_let_in_is_refused(method, match, pairs):
    with pytest.raises(ModelError, match=match):
        adapt(nnx.clone(pairs["llama"].model), config_of(method), nnx.Rngs(0))


TEXT = (Path(__file__).parent / "adapting.py").read_text(encoding="ascii", errors="ignore")
STEPS, LENGTH = 8, 48
BATCHES = np.array([*TEXT.encode()])[: STEPS * 2 * LENGTH].reshape(STEPS, 2, LENGTH) % VOCAB
LEARNING = HyLoRADAConfig(method="hylorada_v1", lora_rank=4, lora_plus_enabled=True)
TRAINING = TrainingConfig(output="unused", steps=STEPS, learning_rate=5e-3, warmup_steps=1)


def trained(model, steps, directory=None):
    """The losses of tunix's trainer, and how many steps it has done."""
    settings = peft_trainer.TrainingConfig(
        eval_every_n_steps=100, max_steps=steps, checkpoint_root_directory=directory, pbar_description=None
    )
    trainer = peft_trainer.PeftTrainer(model, make_optimizer(model, TRAINING), settings)
    trainer.with_gen_model_input_fn(
        lambda given: {
            "input_tokens": given.input_tokens,
            "input_mask": given.input_mask,
            "positions": jnp.broadcast_to(jnp.arange(LENGTH), given.input_tokens.shape),
            "attention_mask": make_causal_attn_mask(given.input_mask),
        }
    )
    mask = np.ones((2, LENGTH), bool)
    inputs = [peft_trainer.TrainingInput(input_tokens=ids, input_mask=mask) for ids in BATCHES]
    trainer.train(inputs)
    return [*map(float, trainer.metrics_logger.get_metric_history("", "loss", "train"))], trainer.train_steps


def test_tunixs_trainer_learns_a_text_as_ours_does_and_goes_on(pairs, tmp_path):
    base, plain, _ = pairs["llama"]
    whole, halves = (adapt(nnx.clone(plain), LEARNING, nnx.Rngs(2)) for _ in range(2))
    save_adapter(whole, tmp_path / "start", base_config=base.config)
    losses, _ = trained(whole, STEPS)
    assert losses[-1] < losses[0] - 0.3

    linen = HyLoRADAModel.from_pretrained(base, tmp_path / "start")
    optimizer = optimizer_of_trees(linen.adapters, TRAINING, LEARNING)
    step, state = make_train_step(linen, optimizer, TRAINING), init_state(linen.adapters, optimizer)
    ours = []
    for ids in BATCHES:
        targets = np.concatenate([ids[:, 1:], np.full((2, 1), -1)], axis=1)
        batch = {"input_ids": ids, "targets": targets, "segment_ids": np.ones_like(ids)}
        state, metrics = step(
            state, linen.frozen, {key: value.astype(np.int32) for key, value in batch.items()}
        )
        ours.append(float(metrics["loss"]))
    # Two programs in float32, over eight steps of Adam.
    np.testing.assert_allclose(losses, ours, rtol=1e-4)

    first, _ = trained(halves, STEPS // 2, str(tmp_path / "run"))
    fresh = adapt(nnx.clone(plain), LEARNING, nnx.Rngs(7))
    second, done = trained(fresh, STEPS, str(tmp_path / "run"))
    assert done == STEPS
    np.testing.assert_array_equal([*first, *second], losses)
    states = (nnx.state(model, AdapterParam) for model in (fresh, whole))
    jax.tree.map(np.testing.assert_array_equal, *states)


@pytest.mark.parametrize(("qtype", "tile"), [("int8", None), ("nf4", 8)])
def test_adapters_of_what_qwix_has_quantised_are_those_of_its_numbers(qtype, tile, pairs):
    rule = qwix.QuantizationRule(module_path=r"layers/.*_proj", weight_qtype=qtype, tile_size=tile)
    plain = nnx.clone(pairs["llama"].model)
    model = qwix.quantize_model(plain, qwix.PtqProvider([rule]), **plain.get_model_input())
    (layer,), (own,) = model.layers, plain.layers
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        getattr(own.attn, name).w.set_value(numbers(value_of(getattr(layer.attn, name).w)))
    for name in ("gate_proj", "up_proj", "down_proj"):
        getattr(own.mlp, name).kernel.set_value(numbers(value_of(getattr(layer.mlp, name).kernel)))
    assert (
        float(
            jnp.abs(
                own.mlp.up_proj.kernel[...] - pairs["llama"].model.layers[0].mlp.up_proj.kernel[...]
            ).max()
        )
        > 1e-4
    )
    for each in (model, plain):
        moved(adapt(each, config_of("hylorada_v1"), nnx.Rngs(2)))
    ((_, got), gradient), ((_, expected), wanted) = with_gradient(model), with_gradient(plain)
    close(got, expected)
    jax.tree.map(lambda a, b: close(a, b, 1e-4), gradient, wanted)
    with pytest.raises(ModelError, match="quantised by qwix"):
        merge(model)
