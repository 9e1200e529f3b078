import dataclasses
import os
import subprocess
import sys
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hylorada_jax.config import METHODS, PRESETS, HyLoRADAConfig, Method
from hylorada_jax.errors import ConfigError
from hylorada_jax.math.linear_adapter import init_leaves


def test_the_type_names_the_methods():
    assert tuple(METHODS) == get_args(Method)


def test_the_documents_usages_run_as_written():
    config = HyLoRADAConfig(lora_rank=8, lora_alpha=16.0, use_hylorada=True, lora_plus_enabled=True)
    assert (config.method, config.linear) == ("hylorada_v1", "hylorada_v1")
    assert HyLoRADAConfig(use_dora=True).method == "dora"
    assert HyLoRADAConfig(use_hylorada=False).method == "lora"
    config = HyLoRADAConfig(use_hylorada_v2=True, structure_dim=32, structure_encoder_type="temporal")
    assert (config.method, config.linear) == ("hylorada_v2", "hylorada_v2")
    config = HyLoRADAConfig(
        lora_rank=8, position_bias_enabled=True, daa_enabled=True, sparse_enabled=True, s2_attn_enabled=False
    )
    assert (config.method, config.linear) == ("hylorada", "hylorada")
    assert config.daa_enabled
    assert config.sparse_enabled
    assert not config.s2_attn_enabled


def test_a_bare_config_is_the_unified_method_without_what_is_optional():
    config = HyLoRADAConfig(lora_rank=8)
    assert config == HyLoRADAConfig(method="hylorada")
    assert config.position_bias_enabled
    assert config.daa_enabled
    assert config.daa_position_bias
    assert not config.sparse_enabled
    assert not config.lora_plus_enabled


def test_the_documented_preset_is_the_table_of_the_documents():
    settings = HyLoRADAConfig.preset("documented").to_dict()
    table = {
        "method": "hylorada", "lora_rank": 8, "lora_alpha": 16.0, "lora_plus_enabled": True,
        "lora_plus_ratio": 10.0, "gate_init": 0.0, "residual_init": 0.1, "lora_dropout": 0.05,
        "position_bias_enabled": True, "daa_enabled": True, "daa_position_bias": True, "sparse_enabled": True,
        "use_rslora": False, "target_modules": None,
    }  # fmt: skip
    assert {name: settings[name] for name in table} == table
    # α is 2r at another rank too, unless it is given.
    assert HyLoRADAConfig.preset("documented", lora_rank=16).lora_alpha == 32
    assert HyLoRADAConfig.preset("documented", lora_alpha=4.0).lora_alpha == 4
    with pytest.raises(ConfigError, match="lora_rank"):
        HyLoRADAConfig.preset("documented", lora_rank="8")


def test_the_recommended_orthogonal_start_has_rows_as_long_as_kaimings():
    """Uniform in ±1/√d, a row of d numbers has a square of d · 1/(3d)."""
    lengths = {}
    for method in ("hylorada_v1", "dora"):
        config = HyLoRADAConfig.preset("recommended", method=method)
        assert config.linear is not None
        leaves = init_leaves(
            config.linear, jax.random.key(0), 8, 4096, jnp.ones(8), lora_A_gain=config.lora_A_gain
        )
        lengths[method] = np.linalg.norm(leaves["lora_A"], axis=1).mean()
    assert lengths["hylorada_v1"] == pytest.approx(lengths["dora"], rel=0.01)
    assert HyLoRADAConfig.preset("recommended", lora_A_gain=1.0).lora_A_gain == 1


@given(
    method=st.sampled_from(sorted(METHODS)),
    rank=st.integers(1, 64),
    alpha=st.floats(0.1, 1e3),
    dropout=st.floats(0, 0.99),
    targets=st.none()
    | st.lists(st.sampled_from(["q", "q_proj", "all-linear", r"h\.\d+"]), min_size=1).map(tuple),
    strategy=st.sampled_from(["uniform", "importance", "decreasing"]),
    start=st.sampled_from([None, "orthogonal", "kaiming"]),
    gain=st.floats(0.01, 100),
)
def test_json_round_trip_gives_an_equal_config(method, rank, alpha, dropout, targets, strategy, start, gain):
    config = HyLoRADAConfig(
        method=method,
        lora_rank=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=None if method == "sparse" else targets,
        rank_strategy=strategy,
        lora_A_init=start,
        lora_A_gain=gain,
    )
    assert HyLoRADAConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    "setting", [{"target_modules": ("q",)}, {"rank_pattern": {"q": 2}}, {"alpha_pattern": {"q": 2.0}}]
)
def test_sparse_adapters_take_no_settings_of_linear_layers(setting):
    with pytest.raises(ConfigError, match=rf"adapts no linear layer[\s\S]*{next(iter(setting))}="):
        HyLoRADAConfig(method="sparse", **setting)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("method", METHODS)
def test_every_preset_serves_every_method(preset, method):
    assert HyLoRADAConfig.preset(preset, method=method).method == method


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"lora_rank": 0}, "lora_rank"),
        ({"lora_rank": 2.5}, "lora_rank"),
        ({"lora_rank": True}, "lora_rank"),
        ({"lora_alpha": -1}, "lora_alpha"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"lora_alpha": "16"}, "lora_alpha"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"lora_plus_ratio": 0}, "lora_plus_ratio"),
        ({"lora_A_init": "orthogonl"}, "orthogonal"),
        ({"lora_A_gain": 0}, "lora_A_gain"),
        ({"lora_A_gain": float("inf")}, "lora_A_gain"),
        ({"method": "lorra"}, "lora"),
        ({"rank_strategy": "increasing"}, "decreasing"),
        ({"structure_encoder_type": "graph"}, "temporal"),
        ({"structure_dim": 0}, "structure_dim"),
        ({"target_modules": ()}, "target_modules"),
        ({"target_modules": (1,)}, "target_modules"),
        ({"use_rslora": 1}, "use_rslora"),
        ({"daa_enabled": "yes"}, "daa_enabled"),
        ({"method": "lora", "use_dora": True}, "use_dora"),
        ({"method": "lora", "position_bias_enabled": True}, "position_bias_enabled"),
        ({"use_hylorada_v2": True, "position_bias_enabled": True}, "position_bias_enabled"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, named):
    with pytest.raises(ConfigError, match=named):
        HyLoRADAConfig(**settings)


DEEP: list = []
for _ in range(2000):
    DEEP = [DEEP]
HOSTILE = [
    None, True, 0, -1, 2.5, 10**400, 1e308, float("nan"), float("-inf"), "", "x", "x" * 10**6, b"q", ["q"],
    [None], ["q"] * 10**5, {}, {"q": 2}, {"q": 10**400}, {5: 2}, {"q": None}, DEEP, {"q": DEEP},
]  # fmt: skip


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(HyLoRADAConfig)])
def test_any_value_is_refused_by_name_or_stays_what_it_was(name):
    for value in HOSTILE:
        refusal, said = None, None
        try:
            config = HyLoRADAConfig.from_dict({name: value})
            said = config.to_dict()[name]
            assert HyLoRADAConfig.from_json(config.to_json()) == config
        except ConfigError as error:
            refusal = str(error)
        if refusal is not None:
            assert name in refusal, value
            assert len(refusal) < 1000, value
        elif value is not None:  # which is a default
            assert said in (value, [value]), value  # a name alone is a list of it
            assert isinstance(said, bool) == isinstance(value, bool), value


def test_an_unknown_key_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="lora_rank"):
        HyLoRADAConfig.from_dict({"lora_rnk": 8})


@pytest.mark.parametrize("text", ["{", "[]", '"lora"', "[" * 100_000, '{"lora_rank": ' + "9" * 5000 + "}"])
def test_a_text_that_is_no_config_is_refused(text):
    with pytest.raises(ConfigError):
        HyLoRADAConfig.from_json(text)


def test_a_config_file_may_begin_with_a_byte_order_mark_but_is_utf_8(tmp_path):
    (tmp_path / "a.json").write_text('\ufeff{"lora_rank": 4}', encoding="utf-8")
    assert HyLoRADAConfig.load(tmp_path / "a.json").lora_rank == 4
    (tmp_path / "a.json").write_bytes('{"target_modules": "é"}'.encode("latin-1"))
    with pytest.raises(ConfigError, match="UTF-8"):
        HyLoRADAConfig.load(tmp_path / "a.json")


def test_a_config_file_is_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "nothing", tmp_path, tmp_path / "pipe", "x" * 5000, "a\0b"):
        with pytest.raises(ConfigError, match="A config file must be"):
            HyLoRADAConfig.load(path)


def test_layer_ranks_are_those_of_the_formulas():
    # r(1 − ½·min(i, L−1−i)/(L/2)) and r(1 − ½·i/(L−1)) by hand, for r = 8 and L = 4.
    importance = HyLoRADAConfig(lora_rank=8, rank_strategy="importance")
    assert [importance.layer_rank(i, 4) for i in range(4)] == [8, 6, 6, 8]
    decreasing = HyLoRADAConfig(lora_rank=8, rank_strategy="decreasing")
    assert [decreasing.layer_rank(i, 4) for i in range(4)] == [8, 6, 5, 4]
    assert HyLoRADAConfig(lora_rank=1, rank_strategy="decreasing").layer_rank(3, 4) == 1
    assert HyLoRADAConfig(lora_rank=2, rank_strategy="decreasing").layer_rank(3, 4) == 2


def test_the_config_loads_neither_jax_nor_torch():
    code = "import sys, hylorada_jax.config; sys.exit(bool({'jax', 'torch', 'flax'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
