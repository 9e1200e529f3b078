import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from hylorada_jax.config import METHODS, HyLoRADAConfig
from hylorada_jax.errors import ConfigError, ModelError, TargetError
from hylorada_torch.conftest import CAUSAL_MODELS, INPUT_IDS, MODELS, base_model, randomize
from hylorada_torch.linear import HyLoRADALinear
from hylorada_torch.model import HyLoRADAModel
from hylorada_torch.sparse import SparseAdapter
from hylorada_torch.surgery import AdaptedLinear, attach_adapters

# Every method, and every component alone on LoRA.
COMPONENTS: dict[str, dict[str, Any]] = {
    "daa": {"daa_enabled": True},
    "daa, shared by the heads": {"daa_enabled": True, "daa_position_bias": True, "daa_per_head": False},
    "sparse adapter": {"sparse_enabled": True},
    "s2": {"s2_attn_enabled": True},
    "embeddings": {"train_embeddings": True},
    "norms": {"train_norms": True},
}
CONFIGS = {
    **{method: HyLoRADAConfig(method=method, lora_rank=3) for method in METHODS},
    **{name: HyLoRADAConfig(method="lora", lora_rank=3, **settings) for name, settings in COMPONENTS.items()},
    "temporal": HyLoRADAConfig(method="hylorada_v2", structure_encoder_type="temporal"),
    "everything": HyLoRADAConfig(
        method="hylorada",
        target_modules=("all-linear",),
        sparse_enabled=True,
        s2_attn_enabled=True,
        train_embeddings=True,
        train_norms=True,
    ),
}


def logits(model, name):
    """Of a base or an adapted model."""
    inputs = {"decoder_input_ids": INPUT_IDS.flip(1)} if name == "t5" else {}
    return model(INPUT_IDS, **inputs).logits


def refused(name, config):
    """What does not apply to the models that are not causal."""
    if name in CAUSAL_MODELS:
        return False
    return config.s2_attn_enabled or (name == "t5" and config.depends_on_token)


MAIN = ("gpt2", "llama", "qwen2")
IDENTITY = [
    *((name, case) for name in MAIN for case in CONFIGS),
    *(
        (name, case)
        for name in sorted({*MODELS} - {*MAIN, "roberta"})
        for case in ("everything", "hylorada_v2")
    ),
    ("roberta", "hylorada_v2"),
    *((name, case) for name in ("bert", "t5") for case in ("hylorada", "sparse", "embeddings", "norms")),
    ("t5", "lorada"),
]


@pytest.mark.parametrize(("name", "case"), IDENTITY)
def test_an_attached_model_computes_what_it_did_before(name, case):
    base = base_model(name)
    before = logits(base, name)
    if refused(name, CONFIGS[case]):
        with pytest.raises(ConfigError):
            HyLoRADAModel(base, CONFIGS[case])
        assert all(parameter.requires_grad for parameter in base.parameters())
        return
    model = HyLoRADAModel(base, CONFIGS[case])
    assert model.adapters()
    # Rounding of a few float64 matrix products; T5's own softmax is in float32 whatever its dtype.
    tolerance = 1e-5 if name == "t5" and CONFIGS[case].daa_enabled else 1e-12
    torch.testing.assert_close(logits(model, name), before, rtol=tolerance, atol=tolerance)


ALIVE = [
    *((name, case) for name in MAIN for case in CONFIGS),
    *(("bert", "hylorada"), ("bert", "sparse"), ("t5", "daa, shared by the heads"), ("t5", "sparse")),
]


@pytest.mark.parametrize(("name", "case"), ALIVE)
def test_every_component_comes_alive(name, case):
    config = CONFIGS[case]
    model = HyLoRADAModel(base_model(name), config).train()
    adapters = model.adapters()
    inputs = {"structure_ids": INPUT_IDS % 5} if config.use_hylorada_v2 else {}
    inputs |= {"decoder_input_ids": INPUT_IDS.flip(1)} if name == "t5" else {}
    optimizer = torch.optim.SGD(adapters.values(), lr=0.1)
    first: dict[str, int] = {}  # the step, counted from 1, at which a leaf has a gradient for the first time
    losses = []
    for step in (1, 2, 3):
        optimizer.zero_grad()
        loss = model(INPUT_IDS, **inputs).logits.log_softmax(-1)[..., 0].square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        for leaf, parameter in adapters.items():
            assert parameter.grad is not None
            if parameter.grad.abs().max() > 1e-14:
                first.setdefault(leaf, step)
    assert losses[0] != losses[1] != losses[2]
    for leaf in adapters:
        if leaf.endswith(".beta"):
            assert leaf not in first  # a constant along the softmax
        elif leaf.startswith("structure_encoder") or leaf.endswith("position_scale"):
            assert first[leaf] == 3
        else:
            assert first[leaf] <= 2, leaf


def test_only_what_is_enabled_has_parameters():
    def kinds(config):
        names = HyLoRADAModel(base_model("qwen2"), config).adapters()
        return {name for name in names if "lora_" not in name and (".0." in name or name.count(".") < 3)}

    layer = "model.layers.0."
    norms = {f"{layer}input_layernorm.weight", f"{layer}post_attention_layernorm.weight", "model.norm.weight"}
    daa = {f"{layer}self_attn.{leaf}" for leaf in ("alpha", "beta")}
    assert kinds(CONFIGS["lora"]) == set()
    assert kinds(CONFIGS["lorada"]) == daa
    assert kinds(CONFIGS["s2"]) == set()
    assert kinds(CONFIGS["longlora"]) == norms | {"model.embed_tokens.weight"}
    assert kinds(CONFIGS["sparse"]) == {
        f"{layer}mlp.down_proj.{leaf}" for leaf in ("down", "up", "gate_scores")
    }
    unified = kinds(CONFIGS["hylorada"])
    assert {
        "position_bias",
        f"{layer}self_attn.position_bias",
        f"{layer}self_attn.q_proj.position_scale",
    } < unified
    assert {"structure_encoder.gate", f"{layer}self_attn.v_proj.scale_from_structure"} < kinds(
        CONFIGS["hylorada_v2"]
    )


QWEN = Qwen2Config(
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    vocab_size=151936,
    tie_word_embeddings=True,
)


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        # The table of method.md §8.
        ({"method": "lora"}, 540_672),
        ({"method": "lorada"}, 1_082_016),
        ({"method": "dora"}, 1_130_496),
        ({"method": "hylorada_v1"}, 1_130_688),
        # 96 layers with 32 more; 129·32 + 64·32 + 16 + 32 + 32 + 32·32 + 1 of the encoder.
        ({"method": "hylorada_v2"}, 1_130_688 + 96 * 32 + 7281),
        # 96 scalars, 64 shared, and 14·(2 + 64) in each of 24 layers.
        ({"method": "hylorada"}, 1_130_688 + 96 + 64 + 24 * 14 * 66),
        # 24 layers of 128·(2·896 + 1).
        ({"method": "sparse"}, 24 * 128 * 1793),
        # LoRA on q, k, v and o, the tied embedding once, and 49 norms.
        ({"method": "longlora"}, 1_082_016 - 24 * 28 + 151_936 * 896 + 49 * 896),
    ],
)
def test_counts(settings, count):
    with torch.device("meta"):
        base = Qwen2ForCausalLM(QWEN)
    model = HyLoRADAModel(base, HyLoRADAConfig(**settings))
    assert sum(parameter.numel() for parameter in model.adapters().values()) == count
    assert all(parameter.is_meta for parameter in model.adapters().values())  # as the layers are


@pytest.mark.parametrize("scales_bias", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_the_adapted_model_is_the_merged_model(name, scales_bias):
    base = base_model(name)
    merged = copy.deepcopy(base)
    config = HyLoRADAConfig(
        use_hylorada=True, target_modules=("all-linear",), magnitude_scales_bias=scales_bias
    )
    model = HyLoRADAModel(base, config)
    randomize(model.adapters().values())
    with torch.no_grad():
        for layer_name, layer in base.named_modules():
            if not isinstance(layer, AdaptedLinear):
                continue
            target, adapter = merged.get_submodule(layer_name), layer.adapter
            conv1d = not isinstance(target, nn.Linear)
            weight = target.weight.T if conv1d else target.weight
            scale, updated = adapter.column_scale(weight), adapter.merged_weight(weight)
            target.weight.copy_(updated.T if conv1d else updated)
            if scales_bias and target.bias is not None:
                target.bias.mul_(scale)
    # Rounding of a few float64 matrix products, logits of order 1.
    torch.testing.assert_close(model(INPUT_IDS).logits, merged(INPUT_IDS).logits, rtol=1e-11, atol=1e-11)


def test_dropout_and_gates_of_a_config_reach_every_layer():
    config = HyLoRADAConfig(
        method="hylorada", lora_dropout=0.25, sparse_enabled=True, sparse_dropout=0.5, gate_init=0.25,
        residual_init=-0.75,
    )  # fmt: skip
    parts = [*HyLoRADAModel(base_model("gpt2"), config).modules()]
    linears = [part for part in parts if isinstance(part, HyLoRADALinear)]
    assert {layer.dropout.p for layer in linears} == {0.25}
    assert {part.dropout.p for part in parts if isinstance(part, SparseAdapter)} == {0.5}
    assert {(layer.magnitude_gate.item(), layer.residual_weight.item()) for layer in linears} == {
        (0.25, -0.75)
    }


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {"attention_dropout": 0.5}),
        ("bert", {"attention_probs_dropout_prob": 0.5, "hidden_dropout_prob": 0.0}),
    ],
)
def test_an_adapted_attention_drops_the_weights_that_transformers_drops(name, settings):
    base = base_model(name, "eager", **settings)
    model = HyLoRADAModel(
        copy.deepcopy(base), HyLoRADAConfig(method="lorada", target_modules=("all-linear",))
    )

    def trained(network):
        network.train()
        torch.manual_seed(3)
        return logits(network, name)

    assert not torch.allclose(trained(base), logits(base.eval(), name))
    # Llama's eager attention computes its softmax in float32.
    torch.testing.assert_close(trained(model), trained(base), rtol=1e-6, atol=1e-6)


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
    adapters: dict[str, Any] = dict(attach_adapters(base_model("gpt2"), config).owners)
    ranks = {name: adapter.lora_A.shape[0] for name, adapter in adapters.items()}
    assert ranks == {"transformer.h.0.attn.c_attn": 8, "transformer.h.1.attn.c_attn": 4}
    for name, rank in ranks.items():
        assert adapters[name].scaling == 24.0 * rank / 8 / math.sqrt(rank)


@pytest.mark.parametrize("method", ["lora", "hylorada"])
def test_the_start_of_a_follows_the_config(method):
    def start(**settings):
        config = HyLoRADAConfig(method=method, lora_rank=4, **settings)
        return attach_adapters(base_model("gpt2"), config).parameters()["transformer.h.0.attn.c_attn.lora_A"]

    a = start(lora_A_init="orthogonal", lora_A_gain=3.0)  # [4, 8] in float64
    torch.testing.assert_close(a @ a.T, 9 * torch.eye(4, dtype=torch.float64))
    kaiming = start(lora_A_init="kaiming", lora_A_gain=3.0)
    assert 0.8 * 3 / 8**0.5 < kaiming.abs().max() <= 3 / 8**0.5
    assert torch.equal(start(lora_A_gain=3.0), kaiming if method == "lora" else a)


def test_the_seed_alone_decides_the_initial_values():
    config = HyLoRADAConfig(method="hylorada_v2", sparse_enabled=True)
    first, again, other = (
        attach_adapters(base_model("gpt2"), config, seed=seed).parameters() for seed in (0, 0, 1)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    for leaf in ("transformer.h.0.attn.c_attn.lora_A", "transformer.h.0.mlp.c_proj.down"):
        assert not torch.equal(first[leaf], other[leaf])


@pytest.mark.parametrize("method", ["hylorada", "hylorada_v2"])
def test_experts_whose_tokens_places_are_not_known_are_refused(method):
    base = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(3, 4)]), "up": nn.Linear(3, 4)})
    options: Any = {"method": method, "daa_enabled": False}
    with pytest.raises(ConfigError, match=r"experts\.0"):
        attach_adapters(base, HyLoRADAConfig(target_modules="all-linear", **options))
    assert attach_adapters(base, HyLoRADAConfig(target_modules=("up",), **options)).parameters()


def test_sparse_acts_on_the_whole_output_of_the_adapted_layer():
    base = base_model("gpt2")
    config = HyLoRADAConfig(use_hylorada=True, target_modules=("mlp.c_proj",), sparse_enabled=True)
    randomize(HyLoRADAModel(base, config).adapters().values())
    layer: Any = base.transformer.h[0].mlp.c_proj  # an AdaptedLinear
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    assert torch.equal(layer(x), layer.sparse(layer.forward(x)))
    assert not torch.equal(layer(x), layer.forward(x))


def test_the_padding_row_of_an_embedding_trains_like_every_other():
    model = HyLoRADAModel(base_model("bert"), CONFIGS["embeddings"])
    embedding = model.base_model.get_submodule("bert.embeddings.word_embeddings")
    weight = model.adapters()["bert.embeddings.word_embeddings.weight"]
    gradient = torch.autograd.grad(embedding(torch.tensor([0])).sum(), weight)[0]
    assert gradient[0].tolist() == [1.0] * 8  # transformers' BERT pads with token 0


def test_what_cannot_be_done_is_refused():
    with pytest.raises(TargetError, match="attn"):
        attach_adapters(base_model("gpt2"), HyLoRADAConfig(target_modules=("c_atn",)))
    for settings, part in (({"daa_enabled": True}, "self-attention"), ({"sparse_enabled": True}, "MLP")):
        config = HyLoRADAConfig.from_dict({"use_hylorada": True, "target_modules": ["0"], **settings})
        with pytest.raises(TargetError, match=part):
            attach_adapters(nn.Sequential(nn.Linear(2, 2)), config)
    with pytest.raises(ModelError, match=r"float32[\s\S]*bfloat16"):
        attach_adapters(base_model("gpt2").bfloat16(), CONFIGS["norms"])
    for case in ("lora", "sparse", "longlora"):
        model = base_model("gpt2")
        attach_adapters(model, CONFIGS[case])
        with pytest.raises(ModelError, match="once"):
            attach_adapters(model, CONFIGS["lora"])
