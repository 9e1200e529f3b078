import pytest

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import TargetError
from hylorada_jax.surgery.targets import (
    layer_alphas,
    layer_ranks,
    mlp_outputs,
    select_targets,
    self_attentions,
)

LLAMA = [
    f"model.layers.{i}.{part}"
    for i in range(3)
    for part in (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.up_proj",
    )
] + ["lm_head"]
GPT2 = [
    f"transformer.h.{i}.{part}" for i in range(2) for part in ("attn.c_attn", "attn.c_proj", "mlp.c_proj")
]


def select(names, **settings):
    return select_targets(names, HyLoRADAConfig(**settings))


def test_a_methods_roles_find_each_familys_projections():
    assert select(LLAMA, method="lora") == [n for n in LLAMA if n.endswith(("q_proj", "v_proj"))]
    assert select(LLAMA, method="dora") == [n for n in LLAMA if "self_attn" in n]
    assert select(GPT2, method="lora") == [n for n in GPT2 if n.endswith("c_attn")]
    assert select(GPT2, method="dora") == [n for n in GPT2 if ".attn." in n]


def test_names_regexes_and_exclusions():
    assert select(GPT2, target_modules="c_proj") == [n for n in GPT2 if n.endswith("c_proj")]
    assert select(GPT2, target_modules="mlp.c_proj") == [n for n in GPT2 if n.endswith("mlp.c_proj")]
    assert select(
        LLAMA, target_modules=r"model\.layers\.[01]\..*_proj", exclude_modules=("mlp.up_proj",)
    ) == [n for n in LLAMA[:10] if "self_attn" in n]


def test_all_linear_leaves_the_output_head_out():
    assert select(LLAMA, target_modules="all-linear") == LLAMA[:-1]


@pytest.mark.parametrize("pattern", ["q_prj", r"model\.layer\..*", "roj"])
def test_a_pattern_without_a_match_is_refused_with_near_ones(pattern):
    for settings in (
        {"target_modules": pattern},
        {"target_modules": "q_proj", "exclude_modules": (pattern,)},
    ):
        with pytest.raises(TargetError, match="q_proj") as error:
            select(LLAMA, **settings)
        assert pattern in str(error.value.received).replace("\\\\", "\\")


def test_a_broken_regex_no_layers_an_empty_choice_and_the_head_are_refused():
    with pytest.raises(TargetError, match="regular expression"):
        select(LLAMA, target_modules="*proj")
    with pytest.raises(TargetError, match="a class that is known"):
        select([], target_modules="all-linear")
    with pytest.raises(TargetError, match="left to adapt"):
        select(LLAMA, target_modules="q_proj", exclude_modules=("q_proj",))
    with pytest.raises(TargetError, match="output head"):
        select(LLAMA, target_modules="lm_head")


def test_ranks_follow_the_depth_of_the_whole_model():
    config = HyLoRADAConfig(lora_rank=8, rank_strategy="decreasing", target_modules=r".*\.[12]\..*q_proj")
    ranks = layer_ranks(select_targets(LLAMA, config), LLAMA, config)
    assert ranks == {"model.layers.1.self_attn.q_proj": 6, "model.layers.2.self_attn.q_proj": 4}


def test_alpha_keeps_its_ratio_to_the_rank():
    config = HyLoRADAConfig(lora_rank=8, lora_alpha=16.0)
    alphas = layer_alphas({"a": 8, "b": 4}, ["a", "b"], config)
    assert config.scale(8, alphas["a"]) == config.scale(4, alphas["b"]) == 2.0
    rslora = HyLoRADAConfig(lora_rank=8, lora_alpha=16.0, use_rslora=True)
    assert rslora.scale(4, alphas["b"]) == 8.0 / 2.0  # α_l = 16·4/8 = 8, over √4


def test_ranks_by_depth_need_numbers_which_flax_puts_behind_a_blocks_name():
    config = HyLoRADAConfig(lora_rank=8, rank_strategy="decreasing")
    names = [f"Block_{number}.Dense_{layer}" for number in range(3) for layer in range(2)]
    assert layer_ranks(names, names, config) == dict(zip(names, (8, 8, 6, 6, 4, 4), strict=True))
    with pytest.raises(TargetError, match=r"decreasing[\s\S]*fc, out"):
        layer_ranks(["fc"], ["fc", "out"], config)


@pytest.mark.parametrize(
    ("block", "attention", "mlp"),
    [
        (["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"], "attn", "mlp.c_proj"),
        (
            ["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"],
            "self_attn",
            "mlp.down_proj",
        ),
        (
            ["attention.self.query", "attention.output.dense", "crossattention.self.query", "output.dense"],
            "attention.self",
            "output.dense",
        ),
        (
            ["layer.0.SelfAttention.q", "layer.1.EncDecAttention.q", "layer.2.DenseReluDense.wo"],
            "layer.0.SelfAttention",
            "layer.2.DenseReluDense.wo",
        ),
    ],
)
def test_self_attentions_and_mlp_outputs_of_every_family(block, attention, mlp):
    names = [f"h.{depth}.{layer}" for depth in range(2) for layer in block]
    assert self_attentions(names) == [f"h.{depth}.{attention}" for depth in range(2)]
    assert mlp_outputs(names) == [f"h.{depth}.{mlp}" for depth in range(2)]


@pytest.mark.parametrize("find", [self_attentions, mlp_outputs])
def test_a_model_without_the_wanted_blocks_is_refused(find):
    with pytest.raises(TargetError, match=r"fc\.\*"):
        find(["fc.0", "fc.1", "attention.output.dense"])
