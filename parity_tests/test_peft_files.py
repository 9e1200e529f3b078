"""Adapters to peft's files and from them, against the installed peft, which loads and saves them in torch."""

import dataclasses
import json
from typing import Any

import jax
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import CheckpointError, ConfigError, ModelError
from hylorada_jax.exchange.merged import write_merged
from hylorada_jax.exchange.peft_export import effect, export_peft
from hylorada_jax.exchange.peft_import import import_peft
from hylorada_jax.model import HyLoRADAModel
from hylorada_jax.models.loading import load_model
from hylorada_jax.saved.adapter_files import CONFIG_NAME, WEIGHTS_NAME
from hylorada_jax.saved.saved_adapter import open_adapter
from hylorada_jax.surgery import layout
from hylorada_jax.surgery.collapse import without
from parity_tests.families import all_in_float64, jax_base, measuring, torch_base
from parity_tests.models import CONFIGS, build, draw_inputs, torch_inputs
from parity_tests.tolerances import relative_error

# Of logits, relative.
LOGITS = {"float64": 1e-9, "float32": 1e-4}
BY_DEPTH = HyLoRADAConfig(method="lora", lora_rank=6, use_rslora=True, rank_strategy="decreasing")
EXPORTED: dict[str, Any] = {
    "lora": ("gpt2", CONFIGS["lora"]),
    "rslora": ("gpt2", CONFIGS["lora, rslora, its own targets"]),
    "rslora by depth": ("qwen2", BY_DEPTH),
    "dora": ("gpt2", CONFIGS["dora"]),
    "dora by depth": ("qwen2", HyLoRADAConfig(method="dora", lora_rank=6, rank_strategy="decreasing")),
    "v1": ("gpt2", CONFIGS["hylorada_v1"]),
    "dora of experts": ("qwen2_moe", CONFIGS["dora"]),
    "v1 by depth": ("qwen2", CONFIGS["hylorada_v1, ranks by depth"]),
    "embeddings and norms": ("qwen3", CONFIGS["longlora"]),
}  # fmt: skip


@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, "float64") for case in EXPORTED), ("v1", "float32"), ("v1 by depth", "float32")],
)
def test_peft_computes_what_was_exported(case, dtype, tmp_path):
    family, config = EXPORTED[case]
    with measuring(dtype):
        model = adapted(family, config, dtype)
        export_peft(model, tmp_path / "peft")
        got = jax_logits(model, family)
        if config.linear in ("lora", "dora"):  # the way back keeps every bit
            back = import_peft(jax_base(family, dtype), tmp_path / "peft")
            jax.tree.map(np.testing.assert_array_equal, back.adapters, model.adapters)
    assert relative_error(peft_logits(family, tmp_path / "peft", dtype), got) <= LOGITS[dtype]
    assert relative_error(peft_logits(family, None, dtype), got) > 0.01  # the adapter does something


@pytest.mark.parametrize(
    ("family", "wrapper"),
    [("gpt2", "PeftModelForCausalLM"), ("t5", "PeftModelForSeq2SeqLM"), ("bert", "PeftModel")],
)
def test_peft_wraps_what_was_exported_for_its_task(family, wrapper, tmp_path):
    model = adapted(family, CONFIGS["lora"], "float32")
    export_peft(model, tmp_path)
    assert type(PeftModel.from_pretrained(torch_base(family, "float32"), tmp_path)).__name__ == wrapper
    assert json.loads((tmp_path / CONFIG_NAME).read_text())["base_model_name_or_path"] == model.base.name


def test_alpha_goes_into_the_file_as_it_was_set(tmp_path):
    set_to = {"q_proj": 7}  # and 7/√2·√2 is another float
    targets = ("q_proj", "v_proj")
    config = HyLoRADAConfig(
        method="lora", lora_rank=2, use_rslora=True, target_modules=targets, alpha_pattern=set_to
    )
    export_peft(adapted("llama", config, "float32"), tmp_path)
    assert json.loads((tmp_path / CONFIG_NAME).read_text())["alpha_pattern"] == set_to


TOKENWISE: dict[str, Any] = {
    "daa": ("llama", CONFIGS["lorada"]),
    "sparse": ("llama", dataclasses.replace(CONFIGS["dora"], sparse_enabled=True, sparse_adapter_dim=4)),
    "structure": ("gpt2", CONFIGS["hylorada_v2"]),
    "position_bias": ("qwen2", HyLoRADAConfig(method="hylorada", daa_enabled=False)),
}


@pytest.mark.parametrize("component", TOKENWISE)
def test_what_peft_cannot_express_is_refused_by_name_or_dropped_deliberately(component, tmp_path):
    family, config = TOKENWISE[component]
    ids = draw_inputs(family)["input_ids"]
    with measuring("float64"):
        model = adapted(family, config)
        with pytest.raises(ModelError, match=rf"{component}: .*\n[\s\S]*--drop {component}"):
            export_peft(model, tmp_path)
        share = effect(model, component, ids)
        before, whole = jax_logits(model, family), np.asarray(model(ids).logits)
        with pytest.raises(ModelError, match=rf"{component}: .* by {share:.2%}"):
            export_peft(model, tmp_path, sample=ids)
        assert not list(tmp_path.iterdir())
        export_peft(model, tmp_path, drop=[component])
        dropped = without(model.sites, layout.flatten(model.sites, model.adapters), [component])
        model.adapters = layout.unflatten(model.sites, dropped)
        expected, rest = jax_logits(model, family), np.asarray(model(ids).logits)
    assert relative_error(peft_logits(family, tmp_path), expected) <= LOGITS["float64"]
    assert relative_error(expected, before) > 1e-3
    assert share == pytest.approx(np.linalg.norm(rest - whole) / np.linalg.norm(whole), rel=1e-9)


def test_what_cannot_be_exported_at_all_is_refused(tmp_path):
    with measuring("float64"):
        sparse = adapted("llama", CONFIGS["sparse"])
        with pytest.raises(ModelError, match="method='sparse'"):
            export_peft(sparse, tmp_path, drop=["sparse"])
        biased = adapted("gpt2", CONFIGS["hylorada_v1, one layer, bias scaled"])
        with pytest.raises(ModelError, match="magnitude_scales_bias"):
            export_peft(biased, tmp_path)
        with pytest.raises(ConfigError, match="gate"):
            export_peft(biased, tmp_path, drop=["gate"])
        tables = adapted("t5", dataclasses.replace(CONFIGS["lora"], train_embeddings=True))
        with pytest.raises(ModelError, match=r"'t5'[\s\S]*hylorada merge"):
            export_peft(tables, tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / CONFIG_NAME).write_text("{}")
    with measuring("float64"), pytest.raises(CheckpointError, match="overwritten") as error:
        export_peft(adapted("gpt2", CONFIGS["lora"]), tmp_path)
    assert error.value.remedy == "Choose another directory, or remove this one."
    assert (tmp_path / CONFIG_NAME).read_text() == "{}"


@pytest.mark.parametrize("method", ["dora", "hylorada_v1"])
@pytest.mark.parametrize("rows", ["zero", "cancelled", "moved"])
def test_rows_of_zeros_by_which_peft_would_divide_are_refused(method, rows, tmp_path):
    """As of a padded MLP, which stay zero in training. PEFT has no floor below the norm."""
    with all_in_float64():
        base = torch_base("llama", "float32")
    kernels = [layer.mlp.up_proj.weight.data for layer in base.float().model.layers]
    for kernel in kernels:
        kernel[-2:] = 0
    if rows == "cancelled":
        kernels[0][-1, 0] = 2
    base.save_pretrained(tmp_path / "base")
    config = HyLoRADAConfig(method=method, lora_rank=2, lora_alpha=2, target_modules=["up_proj"])
    model = HyLoRADAModel(load_model(tmp_path / "base"), config)
    tensors = layout.flatten(model.sites, model.adapters)
    rng = np.random.default_rng(0)
    for name in (name for name in tensors if name.endswith(".lora_B")):
        tensors[name] = rng.normal(0, 0.2, tensors[name].shape).astype(np.float32)
        if rows == "zero":
            tensors[name][-2:] = 0
        if rows == "cancelled" and ".0." in name:
            tensors[name][-1] = [-2, 0]
            A = name.replace("lora_B", "lora_A")
            tensors[A] = np.eye(*tensors[A].shape, dtype=np.float32)
    model.adapters = layout.unflatten(model.sites, tensors)
    ids = torch.arange(1, 9)[None]
    ours = np.asarray(model(jax.numpy.asarray(ids.numpy())).logits)
    assert np.isfinite(ours).all()
    if rows == "moved":
        export_peft(model, tmp_path / "peft")
        theirs = PeftModel.from_pretrained(base, tmp_path / "peft")
        with torch.no_grad():
            assert relative_error(theirs(ids).logits.numpy(), ours) <= LOGITS["float32"]
        return
    with pytest.raises(ModelError, match=r"rows of zeros in .*up_proj[\s\S]*`hylorada merge`"):
        export_peft(model, tmp_path / "peft")
    assert not (tmp_path / "peft").exists()
    model.save_pretrained(tmp_path / "ours")
    write_merged(tmp_path / "base", tmp_path / "ours", tmp_path / "merged")  # the remedy
    with torch.no_grad():
        merged = type(base).from_pretrained(tmp_path / "merged", dtype=torch.float32)(ids).logits.numpy()
    assert relative_error(merged, ours) <= LOGITS["float32"]


NORMS = ["norm", "input_layernorm", "post_attention_layernorm", "q_norm", "k_norm"]
# LoraConfig's own arguments, of all that peft lets one say of LoRA and DoRA.
IMPORTED: dict[str, Any] = {
    "lora": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "lora_dropout": 0.1}),
    "rslora of a pattern": (
        "qwen2",
        {"target_modules": r".*\.1\..*(q|v)_proj", "use_rslora": True, "rank_pattern": {"q_proj": 5}},
    ),
    "patterns": (
        "llama",
        {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {r".*\.0\.mlp\.down_proj": 2},
         "alpha_pattern": {"down_proj": 9, "layers.1.self_attn.q_proj": 1, ".*q_proj": 7}},  # first wins
    ),
    "dora": ("gpt2", {"target_modules": "all-linear", "fan_in_fan_out": True, "use_dora": True}),
    "dora of a pattern": (
        "qwen2", {"target_modules": ["k_proj", "o_proj"], "use_dora": True, "rank_pattern": {"o_proj": 1}},
    ),
    "norms": ("qwen3", {"target_modules": ["q_proj"], "modules_to_save": NORMS}),
}  # fmt: skip


@pytest.fixture
def saved(tmp_path):
    """(case) → the family, and a directory where peft has saved a random adapter of its own."""

    def save(case):
        family, options = IMPORTED[case]
        torch.manual_seed(3)
        with all_in_float64():
            model = get_peft_model(torch_base(family, "float64"), LoraConfig(r=3, lora_alpha=4, **options))
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data += 0.2 * torch.randn_like(parameter)
            model.save_pretrained(tmp_path / "theirs")
        return family, tmp_path / "theirs"

    return save


@pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA with rank_pattern")
@pytest.mark.parametrize("case", IMPORTED)
def test_an_adapter_of_pefts_computes_the_same_and_goes_back_bit_by_bit(case, saved, tmp_path):
    family, theirs = saved(case)
    with measuring("float64"):
        model = import_peft(jax_base(family, "float64"), theirs)
        assert relative_error(jax_logits(model, family), peft_logits(family, theirs)) <= LOGITS["float64"]
        export_peft(model, tmp_path / "back")
    dropout = LoraConfig.from_pretrained(theirs).lora_dropout
    assert dropout == model.config.lora_dropout == LoraConfig.from_pretrained(tmp_path / "back").lora_dropout
    before, after = (load_file(place / WEIGHTS_NAME) for place in (theirs, tmp_path / "back"))
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(after[name], before[name], strict=True)
    assert relative_error(peft_logits(family, tmp_path / "back"), peft_logits(family, theirs)) <= 1e-14


@pytest.mark.parametrize("case", ["dora", "dora of a pattern"])
def test_a_dora_adapter_starts_a_hylorada_run_from_its_function(case, saved, tmp_path):
    family, theirs = saved(case)
    with measuring("float64"):
        model = import_peft(jax_base(family, "float64"), theirs, method="hylorada_v1")
        assert model.config.method == "hylorada_v1"
        assert relative_error(jax_logits(model, family), peft_logits(family, theirs)) <= LOGITS["float64"]
        # Alive: the gates are where a fresh adapter's are.
        gates = {
            float(value)
            for name, value in layout.flatten(model.sites, model.adapters).items()
            if name.endswith((".magnitude_gate", ".residual_weight"))
        }
        assert gates == {0.0, 0.1}
        model.save_pretrained(tmp_path / "ours")
        export_peft(model, tmp_path / "back")
    assert relative_error(peft_logits(family, tmp_path / "back"), peft_logits(family, theirs)) <= 1e-12
    assert open_adapter(tmp_path / "ours").config == model.config


UNSUPPORTED: dict[str, Any] = {
    "bias": {"bias": "all"},
    "lora_bias": {"lora_bias": True},
    "init_lora_weights": {"init_lora_weights": "pissa"},
    "trainable_token_indices": {"trainable_token_indices": [1]},
    "layer_replication": {"layer_replication": [[0, 1]]},
    "peft_type": {"peft_type": "IA3"},
    "use_a_thing_of_next_year": {"use_a_thing_of_next_year": True},
}


@pytest.mark.parametrize("setting", UNSUPPORTED)
def test_what_is_not_supported_is_refused_by_name(setting, saved):
    family, theirs = saved("lora")
    change(theirs, **UNSUPPORTED[setting])
    with measuring("float64"), pytest.raises(ConfigError, match=setting):
        import_peft(jax_base(family, "float64"), theirs)


def change(directory, **settings):
    path = directory / CONFIG_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_files_that_do_not_fit_are_refused(saved):
    family, theirs = saved("lora")
    with measuring("float64"):
        base = jax_base(family, "float64")
    whole = load_file(theirs / WEIGHTS_NAME)
    name = next(iter(whole))
    damaged = {
        r"ranks.*\n.*3, not 4": (dict(whole), {"r": 4}),
        "missing": ({key: value for key, value in whole.items() if key != name}, {"r": 3}),
        "finite": (whole | {name: np.full_like(whole[name], np.nan)}, {}),
        "h.7.attn.c_attn": (
            {key.replace("h.0.", "h.7."): value for key, value in whole.items()},
            {},
        ),
        "lora_embedding_A": (whole | {"base_model.model.transformer.wte.lora_embedding_A": whole[name]}, {}),
        "I64": (whole | {name: whole[name].astype(np.int64)}, {}),
        "untouched": (whole | {"base_model.model.transformer.wte.weight": np.ones((128, 8))}, {}),
        "all norms": (whole | {"base_model.model.transformer.ln_f.weight": np.ones(8)}, {}),
    }
    with measuring("float64"):
        for message, (tensors, settings) in damaged.items():
            save_file(tensors, theirs / WEIGHTS_NAME)
            change(theirs, **settings)
            with pytest.raises((CheckpointError, ConfigError), match=message):
                import_peft(base, theirs)
        with pytest.raises(ConfigError, match="hylorada_v1"):
            import_peft(base, theirs, method="hylorada_v1")
    (theirs / WEIGHTS_NAME).write_bytes((theirs / WEIGHTS_NAME).read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="complete safetensors"):
        import_peft(base, theirs)
    (theirs / WEIGHTS_NAME).rename(theirs / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="pickle"):
        import_peft(base, theirs)
    with pytest.raises(CheckpointError, match="import-peft"):
        open_adapter(theirs)


def adapted(family, config, dtype="float64"):
    pair = build(family, config, dtype)
    pair.model.adapters = pair.adapters
    return pair.model


def jax_logits(model, family):
    inputs = draw_inputs(family, model.config)
    labels = inputs.pop("labels")
    inputs.pop("structure_ids", None)  # of which nothing is exported
    return np.asarray(model(**inputs).logits)[labels >= 0]


def peft_logits(family, directory, dtype="float64"):
    """The logits of the torch model with the adapter as peft loads it; without a directory, of the base."""
    inputs = torch_inputs(draw_inputs(family))
    labels = inputs.pop("labels")
    with all_in_float64():
        model = torch_base(family, dtype)
    if directory is not None:  # outside, for safetensors asks torch for its float32
        model = PeftModel.from_pretrained(model, directory).double()
    with all_in_float64(), torch.no_grad():
        return model(**inputs).logits[labels >= 0].numpy()
