"""What gpt-oss alone has, against transformers' torch code of it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import GptOssConfig, GptOssForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import ModelError, TargetError
from hylorada_jax.exchange.merged import write_merged
from hylorada_jax.math.quantized import plain
from hylorada_jax.model import HyLoRADAModel
from hylorada_jax.models.decoder_config import DecoderConfig
from hylorada_jax.models.families.family import Mixture
from hylorada_jax.models.fused_experts import FusedMixtureBlock
from hylorada_jax.models.loading import load_model, open_weights
from hylorada_jax.models.mxfp4 import numbers
from hylorada_jax.models.quantize import quantize
from hylorada_jax.models.source import find_source
from hylorada_jax.models.weights_digest import files_digest, tree_digest
from parity_tests.tolerances import relative_error


def test_experts_equal_transformers_beyond_their_bounds_too():
    rng = np.random.default_rng(0)
    config = GptOssConfig(hidden_size=6, intermediate_size=5, num_local_experts=4, num_experts_per_tok=2)
    theirs = GptOssMLP(config).double()
    for parameter in theirs.parameters():
        parameter.data = torch.tensor(rng.normal(size=parameter.shape) * 3)
    x = torch.tensor(rng.normal(size=(2, 7, 6)), requires_grad=True)
    expected, _ = theirs(x)
    cotangent = rng.normal(size=expected.shape)
    expected.backward(torch.tensor(cotangent))
    # Either of the two is bounded, by both signs of its bound or by the one that it has.
    gate_up = x @ theirs.experts.gate_up_proj[0] + theirs.experts.gate_up_proj_bias[0]
    assert (gate_up[..., ::2] > 7).any()
    assert (gate_up[..., ::2] < -7).any()
    assert (gate_up[..., 1::2].abs() > 7).any()

    numbers = {name: value.detach().numpy() for name, value in theirs.state_dict().items()}
    experts = {name.removeprefix("experts."): value for name, value in numbers.items() if "experts." in name}
    router = {"kernel": numbers["router.weight"].T, "bias": numbers["router.bias"]}
    block = FusedMixtureBlock(Mixture(experts=4, chosen=2, width=5, router="router"), 7.0)
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, {"router": router, "experts": experts})
        run = jax.jit(lambda x: block.apply({"params": params}, x))
        got, pull = jax.vjp(run, jnp.asarray(x.detach().numpy()))
        assert relative_error(np.asarray(got), expected.detach().numpy()) <= 1e-14
        assert x.grad is not None
        assert relative_error(np.asarray(pull(jnp.asarray(cotangent))[0]), x.grad.numpy()) <= 1e-14


def test_mxfp4_is_that_of_transformers_bit_for_bit():
    """Every byte under every scale but 255, which is no number; and in a formula."""
    blocks = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(16, 16), (1, 255, 16, 16))
    scales = np.repeat(np.arange(255, dtype=np.uint8), 16).reshape(1, 255, 16)
    theirs = convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales))
    ours = numbers(blocks, scales).swapaxes(1, 2)
    np.testing.assert_array_equal(ours.view(np.uint16), theirs.view(torch.uint16).numpy())

    codes = np.stack([np.arange(256) % 16, np.arange(256) // 16], axis=-1).reshape(512, 1)
    sign, exponent, mantissa = codes >> 3, (codes >> 1) & 3, codes & 1
    size = np.where(exponent, (1 + mantissa / 2) * 2.0 ** (exponent - 1), mantissa / 2)
    expected = (1 - 2 * sign) * size * 2.0 ** (np.arange(255) - 127)
    # Beyond bfloat16's last number, which no weight has, there is infinity.
    expected = np.where(np.abs(expected) < 2.0**128, expected, np.copysign(np.inf, expected))
    np.testing.assert_array_equal(ours[0].astype(np.float64), expected)


EXPERTS = [
    f"model.layers.{layer}.mlp.experts.{name}" for layer in range(2) for name in ("gate_up_proj", "down_proj")
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A random model as numbers, and the same in MXFP4."""
    whole, packed = (tmp_path_factory.mktemp(name) for name in ("whole", "packed"))
    config = GptOssConfig(
        vocab_size=40, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=3, num_experts_per_tok=2, dtype="bfloat16",
    )  # fmt: skip
    GptOssForCausalLM(config).bfloat16().save_pretrained(whole)
    tensors, rng = load_file(whole / "model.safetensors"), np.random.default_rng(0)
    codes: dict[str, np.ndarray] = {}
    for name in EXPERTS:
        experts, inputs, outputs = tensors[name].shape
        parts = {
            "blocks": rng.integers(256, size=(experts, outputs, inputs // 32, 16), dtype=np.uint8),
            "scales": rng.integers(117, 125, size=(experts, outputs, inputs // 32), dtype=np.uint8),
        }
        values = convert_moe_packed_tensors(*map(torch.tensor, parts.values()))
        tensors[name] = values.view(torch.uint16).numpy().view(jnp.bfloat16)
        codes |= {f"{name}_{part}": values for part, values in parts.items()}
    save_file(tensors, whole / "model.safetensors")
    rest = {name: tensor for name, tensor in tensors.items() if name not in EXPERTS}
    save_file(rest | codes, packed / "model.safetensors")
    said = json.loads((whole / "config.json").read_text())
    said["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (packed / "config.json").write_text(json.dumps(said))
    return whole, packed


@pytest.fixture(scope="module")
def base(checkpoints):
    """The model that is in MXFP4."""
    return load_model(checkpoints[1])


@pytest.mark.parametrize(
    ("key", "value"), [("swiglu_limit", 5.0), ("swiglu_alpha", 1.0), ("hidden_act", "gelu")]
)
def test_another_gate_is_refused(key, value):
    """Version 5 of transformers computes it by these, and 4.57 does not read them."""
    with pytest.raises(ModelError, match=key):
        DecoderConfig.from_hf({"model_type": "gpt_oss", key: value})


@pytest.mark.parametrize("target", ["gate_up_proj", "down_proj", "router"])
def test_what_is_no_linear_layer_is_no_target(target, base):
    config = HyLoRADAConfig(method="lora", target_modules=(target,))
    with pytest.raises(TargetError, match=rf"'{target}'\n.*self_attn\.k_proj"):
        HyLoRADAModel(base, config)


def equal(ours, expected):
    jax.tree.map(np.testing.assert_array_equal, ours, expected)


def test_a_checkpoint_in_mxfp4_is_the_numbers_that_it_stands_for(checkpoints, base):
    whole, packed = checkpoints
    expected = load_model(whole).params
    equal(base.params, expected)
    assert files_digest(find_source(packed), "float32") == tree_digest(expected)
    weights, tensor = open_weights(find_source(packed)), open_weights(find_source(whole)).read(EXPERTS[0])
    part = slice(1, 3), slice(3, 40), slice(0, 5)  # as a device on a mesh reads it
    np.testing.assert_array_equal(weights.read(EXPERTS[0], part), tensor[part])


def test_experts_are_quantised_one_by_one(checkpoints, base):
    pytest.importorskip("qwix")
    in_nf4 = load_model(checkpoints[1], base_dtype="nf4")
    equal(in_nf4.params, quantize(base.params, "nf4"))
    block = in_nf4.params["model"]["layers"]["mlp"]
    assert {type(block["experts"][name]).__name__ for name in ("gate_up_proj", "down_proj")} == {"QArray"}
    assert block["router"]["kernel"].dtype == block["experts"]["down_proj_bias"].dtype == jnp.float32
    ids, on_numbers = jnp.arange(8)[None], in_nf4.with_params(plain(in_nf4.params))
    assert relative_error(*(np.asarray(model(ids).logits) for model in (in_nf4, on_numbers))) <= 1e-6


def test_a_merged_model_is_numbers(checkpoints, base, tmp_path):
    model = HyLoRADAModel(base, HyLoRADAConfig(method="lora", lora_rank=2))
    model.adapters = jax.tree.map(lambda leaf: leaf + 0.1, model.adapters)
    model.save_pretrained(tmp_path / "adapter")
    found = []
    for name, directory in zip(("whole", "packed"), checkpoints, strict=True):
        write_merged(directory, tmp_path / "adapter", tmp_path / name)
        found.append(load_file(tmp_path / name / "model.safetensors"))
        assert "quantization_config" not in json.loads((tmp_path / name / "config.json").read_text())
    equal(found[1], found[0])
    assert {tensor.dtype for tensor in found[1].values()} == {jnp.dtype("bfloat16")}


BLOCKS, SCALES = (f"{EXPERTS[0]}_{part}" for part in ("blocks", "scales"))


def write_changed(directory, changed, checkpoints):
    tensors = load_file(checkpoints[1] / "model.safetensors") | changed
    save_file({n: x for n, x in tensors.items() if x is not None}, directory / "model.safetensors")
    (directory / "config.json").write_bytes((checkpoints[1] / "config.json").read_bytes())


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({BLOCKS: None}, rf"{SCALES}: U8 \(3, 64, 2\)"),
        ({SCALES: None}, rf"{BLOCKS}: U8 \(3, 64, 2, 16\)"),
        ({SCALES: np.zeros((3, 64, 1), np.uint8)}, r"\(3, 64, 2, 16\); .*\(3, 64, 1\)"),
        ({SCALES: np.zeros((3, 64, 2), np.float32)}, "F32"),
        ({EXPERTS[0]: np.zeros((3, 64, 64), np.float32)}, rf"{EXPERTS[0]}: F32 \(3, 64, 64\); .*U8"),
    ],
    ids=["no blocks", "no scales", "of other groups", "no bytes", "both layouts"],
)
def test_a_damaged_checkpoint_in_mxfp4_is_refused(changed, said, checkpoints, tmp_path):
    write_changed(tmp_path, changed, checkpoints)
    with pytest.raises(ModelError, match=said):
        open_weights(find_source(tmp_path))


def test_a_scale_that_is_no_number_is_refused(checkpoints, tmp_path):
    write_changed(tmp_path, {SCALES: np.full((3, 64, 2), 255, np.uint8)}, checkpoints)
    with pytest.raises(ModelError, match=rf"{EXPERTS[0]} in .*NaN"):
        load_model(tmp_path)
