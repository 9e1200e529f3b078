import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import ModelError, NotBuiltError, TargetError
from hylorada_torch.model import HyLoRADAModel
from hylorada_torch.surgery import AdaptedLinear, attach_adapters

LLAMA_SIZES = {
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "vocab_size": 31,
}
MODELS = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=31, n_positions=16)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(attention_bias=True, **LLAMA_SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**LLAMA_SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**LLAMA_SIZES)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**LLAMA_SIZES)),
}
INPUT_IDS = torch.randint(31, (2, 9), generator=torch.Generator().manual_seed(1))


def base_model(name):
    """A small random model in float64 whose biases are not zero."""
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def randomize(parameters):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize("method", ["lora", "dora", "hylorada_v1"])
@pytest.mark.parametrize("name", MODELS)
def test_an_attached_model_computes_what_it_did_before(name, method):
    base = base_model(name)
    before = base(INPUT_IDS).logits
    model = HyLoRADAModel(base, HyLoRADAConfig(method=method, target_modules=("all-linear",)))
    assert model.adapters()
    # Rounding of a few float64 matrix products.
    torch.testing.assert_close(model(INPUT_IDS).logits, before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scales_bias", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_the_adapted_model_is_the_merged_model(name, scales_bias):
    base = base_model(name)
    merged = copy.deepcopy(base)
    config = HyLoRADAConfig(target_modules=("all-linear",), magnitude_scales_bias=scales_bias)
    model = HyLoRADAModel(base, config)
    randomize(model.adapters().values())
    with torch.no_grad():
        for layer_name, layer in base.named_modules():
            if not isinstance(layer, AdaptedLinear):
                continue
            target, adapter = merged.get_submodule(layer_name), layer.adapter
            conv1d = not isinstance(target, nn.Linear)
            weight = target.weight.T if conv1d else target.weight
            scale = adapter.column_scale(weight)
            updated = scale[:, None] * (weight + adapter.scaling * adapter.lora_B @ adapter.lora_A)
            target.weight.copy_(updated.T if conv1d else updated)
            if scales_bias and target.bias is not None:
                target.bias.mul_(scale)
    # Rounding of a few float64 matrix products, logits of order 1.
    torch.testing.assert_close(model(INPUT_IDS).logits, merged(INPUT_IDS).logits, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
@pytest.mark.parametrize(
    ("method", "use_rslora"), [("lora", False), ("lora", True), ("dora", False), ("dora", True)]
)
def test_lora_and_dora_are_peft_s(name, method, use_rslora):
    targets = ("c_attn", "c_proj") if name == "gpt2" else ("q_proj", "v_proj", "o_proj", "down_proj")
    base = base_model(name)
    theirs = get_peft_model(
        copy.deepcopy(base),
        LoraConfig(
            r=3,
            lora_alpha=5,
            target_modules=list(targets),
            use_dora=method == "dora",
            use_rslora=use_rslora,
            fan_in_fan_out=name == "gpt2",
        ),
    )
    ours = HyLoRADAModel(
        base,
        HyLoRADAConfig(
            method=method, lora_rank=3, lora_alpha=5.0, target_modules=targets, use_rslora=use_rslora
        ),
    )
    adapters = ours.adapters()
    randomize(adapters.values())
    their_parameters = {name: p for name, p in theirs.named_parameters() if p.requires_grad}

    def their_name(ours):
        layer, leaf = ours.rsplit(".", 1)
        leaf = "lora_magnitude_vector" if leaf == "magnitude" else leaf
        return f"base_model.model.{layer}.{leaf}.default.weight"

    assert {their_name(name) for name in adapters} == set(their_parameters)
    with torch.no_grad():
        for name, parameter in adapters.items():
            their_parameters[their_name(name)].copy_(parameter)
    logits, their_logits = ours(INPUT_IDS).logits, theirs(INPUT_IDS).logits
    # Both in float64; PEFT orders the sums differently.
    torch.testing.assert_close(logits, their_logits, rtol=1e-11, atol=1e-11)
    logits.square().mean().backward()
    their_logits.square().mean().backward()
    for name, parameter in adapters.items():
        torch.testing.assert_close(
            parameter.grad, their_parameters[their_name(name)].grad, rtol=1e-10, atol=1e-10
        )


def test_only_the_adapters_train():
    base = base_model("qwen2")
    model = HyLoRADAModel(base, HyLoRADAConfig())
    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert trainable == {id(parameter) for parameter in model.adapters().values()}
    model(INPUT_IDS).logits.sum().backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in model.parameters())


def test_layer_ranks_and_alpha_follow_the_config():
    config = HyLoRADAConfig(
        method="lora", lora_rank=8, lora_alpha=24.0, rank_strategy="decreasing", use_rslora=True
    )
    adapters = attach_adapters(base_model("gpt2"), config)
    ranks = {name: adapter.lora_A.shape[0] for name, adapter in adapters.items()}
    assert ranks == {"transformer.h.0.attn.c_attn": 8, "transformer.h.1.attn.c_attn": 4}
    for adapter in adapters.values():
        assert adapter.scaling == config.scale(adapter.lora_A.shape[0])


def test_the_seed_alone_decides_the_initial_values():
    first, again, other = (
        attach_adapters(base_model("gpt2"), HyLoRADAConfig(), seed=seed)["transformer.h.0.attn.c_attn"].lora_A
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_what_cannot_be_done_is_refused():
    with pytest.raises(NotBuiltError, match="daa_enabled"):
        attach_adapters(base_model("gpt2"), HyLoRADAConfig(method="lorada"))
    with pytest.raises(TargetError, match="attn"):
        attach_adapters(base_model("gpt2"), HyLoRADAConfig(target_modules=("c_atn",)))
    model = base_model("gpt2")
    attach_adapters(model, HyLoRADAConfig())
    with pytest.raises(ModelError, match="once"):
        attach_adapters(model, HyLoRADAConfig())
