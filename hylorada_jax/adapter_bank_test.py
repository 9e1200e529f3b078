"""Several adapters on one base: each row has its own numbers, and nothing is compiled or copied for it."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hylorada_jax.adapter_bank import AdapterBank, apply_rows
from hylorada_jax.config import TRAINING_ONLY, HyLoRADAConfig
from hylorada_jax.errors import CheckpointError, ConfigError, DataError
from hylorada_jax.methods_test import CONFIGS, DECODER, ROUNDING, VOCAB, base_model
from hylorada_jax.model import HyLoRADAModel
from hylorada_jax.models.causal_lm import CausalLM
from hylorada_jax.models.decoder_config import DecoderConfig
from hylorada_jax.surgery import layout

NAMES = ("default", "tall", "small")
ROWS = ("small", None, "default", "tall", "default")
LENGTH = 7
# Quick: the fullest of the methods, and one whose rows have embeddings of their own.
QUICK = {("hylorada", "llama"), ("longlora", "llama")}
CASES = [
    pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
    for case in [*((method, "llama") for method in CONFIGS), ("hylorada", "gpt2"), ("longlora", "gpt2")]
]


def moved(model, seed):
    """Adapters far from their start, all leaves of them."""
    rng = np.random.default_rng(seed)
    tensors = {
        name: (leaf + 0.3 * rng.normal(size=leaf.shape)).astype(np.float32)
        for name, leaf in layout.flatten(model.sites, model.adapters).items()
    }
    return layout.unflatten(model.sites, tensors)


@functools.cache
def trees(config, family):
    model = HyLoRADAModel(base_model(family), config)
    return {name: moved(model, seed) for seed, name in enumerate(NAMES)}


@functools.cache
def shared_model(config, family):
    return HyLoRADAModel(base_model(family), config)


def full_bank(config, family="llama"):
    """A bank of three adapters, on a model that all tests of a config share with what it has compiled."""
    model = shared_model(config, family)
    first, *others = trees(config, family).items()
    model.adapters = first[1]
    bank = AdapterBank(model)
    for name, tree in others:
        bank.add(name, tree)
    return bank


def tokens(config, rows=5):
    rng = np.random.default_rng(2)
    given = {"input_ids": jnp.asarray(rng.integers(VOCAB, size=(rows, LENGTH)))}
    if config.use_hylorada_v2:
        given["structure_ids"] = jnp.asarray(rng.integers(8, size=(rows, LENGTH)))
    return given


def one_by_one(bank, names, given):
    """The logits of each row, from calls of the whole batch with that row's adapter alone."""
    plain = {name: value for name, value in given.items() if not name.startswith("structure")}
    whole = {None: np.asarray(bank.model.base(**plain).logits)}
    for name in bank.names:
        bank.switch(name)
        whole[name] = np.asarray(bank(**given).logits)
    return np.stack([whole[name][row] for row, name in enumerate(names)])


@pytest.mark.parametrize(("method", "family"), CASES)
def test_each_row_has_the_numbers_of_its_own_adapter(method, family):
    bank, given = full_bank(CONFIGS[method], family), tokens(CONFIGS[method])
    for names in (ROWS, ROWS[::-1], (None, "tall", "tall", "small", None)):
        expected = one_by_one(bank, names, given)
        mixed = bank(**given, adapters=names).logits
        np.testing.assert_allclose(mixed, expected, atol=ROUNDING)
    # Any row with another's adapter would show, and other names run the same program.
    by_name = np.stack([one_by_one(bank, [name] * len(ROWS), given) for name in (None, *NAMES)])
    apart = np.abs(by_name[:, None] - by_name).max((-2, -1)) + np.eye(len(by_name))[..., None]
    assert apart.min() > 0.01
    assert bank._rows._cache_size() == 1


TEMPORAL = dataclasses.replace(CONFIGS["hylorada_v2"], structure_encoder_type="temporal")


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (TEMPORAL, ("attention_mask", "structure_ids", "structure_positions")),
        (CONFIGS["hylorada"], ("segment_ids", "position_ids")),
    ],
    ids=["padded", "packed"],
)
def test_every_input_goes_along_with_its_row(config, names):
    rng = np.random.default_rng(4)
    real = np.arange(LENGTH) >= np.arange(len(ROWS))[:, None]  # row i has i tokens of padding in front
    everything: dict[str, np.ndarray] = {
        "attention_mask": real.astype(np.int32),
        "structure_ids": rng.integers(8, size=real.shape),
        "structure_positions": rng.uniform(0, 40, size=real.shape).astype(np.float32),
        "segment_ids": 1 + real.astype(np.int32),
        "position_ids": rng.integers(20, size=real.shape),
    }
    bank = full_bank(config)
    given = {"input_ids": rng.integers(VOCAB, size=real.shape)} | {name: everything[name] for name in names}
    expected = one_by_one(bank, ROWS, given)
    got = np.asarray(bank(**given, adapters=ROWS).logits)
    shown = real if "attention_mask" in given else np.ones_like(real)
    np.testing.assert_allclose(got[shown], expected[shown], atol=ROUNDING)


def test_switching_compiles_nothing_and_disabling_is_exactly_the_base():
    config = CONFIGS["hylorada"]
    bank, given = full_bank(config), tokens(config)
    model, plain = bank.model, np.asarray(base_model("llama")(**given).logits)
    seen = {bank.active: np.asarray(model(**given).logits)}
    compiled = model._jitted._cache_size()
    for name in ("small", "tall", "small", "default"):
        bank.switch(name)
        assert bank.active == name
        logits = np.asarray(model(**given).logits)
        np.testing.assert_array_equal(logits, seen.setdefault(name, logits))
        with model.disable_adapter():
            np.testing.assert_array_equal(model(**given).logits, plain)
            np.testing.assert_array_equal(bank(**given, adapters=ROWS).logits, plain)
    assert model._jitted._cache_size() == compiled
    for name, tree in trees(config, "llama").items():
        model.adapters = tree
        np.testing.assert_array_equal(model(**given).logits, seen[name])


def test_no_row_sees_the_adapter_of_another():
    bank, given = full_bank(CONFIGS["hylorada"]), tokens(CONFIGS["hylorada"])
    broken = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), bank.model.adapters)
    before = np.asarray(bank(**given, adapters=ROWS).logits)
    bank.remove("tall")
    bank.add("tall", broken)
    after = np.asarray(bank(**given, adapters=ROWS).logits)
    others = np.array(ROWS) != "tall"
    assert np.isnan(after[~others]).all()
    np.testing.assert_array_equal(after[others], before[others])


def test_training_the_active_adapter_trains_the_banks():
    bank, given = full_bank(CONFIGS["lora"]), tokens(CONFIGS["lora"])
    bank.switch("tall")
    before = np.asarray(bank(**given, adapters=ROWS).logits)
    bank.model.adapters = moved(bank.model, 9)
    after = np.asarray(bank(**given, adapters=ROWS).logits)
    same = [name != "tall" for name in ROWS]
    np.testing.assert_array_equal(after[same], before[same])
    np.testing.assert_allclose(after, one_by_one(bank, ROWS, given), atol=ROUNDING)
    assert np.abs(after - before).max((1, 2)).max() > 0.01
    bank.switch("tall")
    bank.model.adapters = trained = moved(bank.model, 10)
    bank.switch("default")
    bank.switch("tall")
    jax.tree.map(np.testing.assert_array_equal, bank.model.adapters, trained)


def test_an_adapter_outlives_the_arrays_that_it_was_added_from():
    bank, expected = full_bank(CONFIGS["lora"]), trees(CONFIGS["lora"], "llama")["tall"]
    given = jax.tree.map(jnp.array, expected)
    bank.add("more", given)
    jax.tree.map(lambda leaf: leaf.delete(), given)  # as a step that donates them does
    bank.switch("more")
    jax.tree.map(np.testing.assert_array_equal, bank.model.adapters, expected)


def test_adapters_come_from_their_files(tmp_path):
    config = CONFIGS["hylorada"]
    bank, given = full_bank(config), tokens(config)
    for name in bank.names:
        bank.switch(name)
        bank.model.save_pretrained(tmp_path / name)
    # One was trained by other settings, which change nothing of what it computes.
    otherwise: dict[str, Any] = {
        "lora_dropout": 0.5, "lora_A_init": "kaiming", "lora_A_gain": 0.5, "gate_init": 1.0,
        "residual_init": 1.0, "detach_norm": True, "lora_plus_enabled": True, "lora_plus_ratio": 3.0,
        "sparse_temperature": 2.0, "sparse_dropout": 0.5, "s2_attn_enabled": True, "s2_group_size": 4,
        "s2_shift_ratio": 0.25,
    }  # fmt: skip
    assert otherwise.keys() == TRAINING_ONLY
    tall = HyLoRADAModel(base_model("llama"), dataclasses.replace(config, **otherwise))
    bank.switch("tall")
    tall.adapters = bank.model.adapters
    tall.save_pretrained(tmp_path / "tall", overwrite=True)
    np.testing.assert_array_equal(tall(**given).logits, bank.model(**given).logits)
    loaded = AdapterBank(HyLoRADAModel.from_pretrained(base_model("llama"), tmp_path / "default"))
    for name in NAMES[1:]:
        loaded.load(name, tmp_path / name)
    assert loaded.names == NAMES
    assert loaded.active == "default"
    np.testing.assert_array_equal(loaded(**given, adapters=ROWS).logits, bank(**given, adapters=ROWS).logits)


def test_an_adapters_template_and_structure_come_and_go_with_it(tmp_path):
    bank = full_bank(CONFIGS["lora"])
    bank.model.chat_template, bank.model.structure = "{{ messages }}", "code"
    bank.model.save_pretrained(tmp_path)
    bank.model.chat_template = bank.model.structure = None
    bank.load("a", tmp_path)
    for name, expected in (("a", ("{{ messages }}", "code")), ("tall", (None, None))):
        bank.switch(name)
        assert (bank.model.chat_template, bank.model.structure) == (expected)


@pytest.mark.parametrize("kind", [jnp.asarray, np.asarray, lambda leaf: jnp.asarray(leaf, jnp.bfloat16)])
def test_a_function_that_is_compiled_around_the_call_leaves_the_bank_as_it_was(kind):
    bank, given = full_bank(CONFIGS["lora"]), tokens(CONFIGS["lora"])
    bank.model.adapters = jax.tree.map(kind, moved(bank.model, 7))
    compiled = jax.jit(lambda ids: bank(ids, ROWS).logits)(given["input_ids"])
    np.testing.assert_allclose(bank(**given, adapters=ROWS).logits, compiled, atol=ROUNDING)


def test_what_does_not_fit_is_refused_and_the_bank_stays_as_it_was(tmp_path):
    config = CONFIGS["lora"]
    bank, given = full_bank(config), tokens(config)
    adapters = bank.model.adapters
    wide = HyLoRADAModel(base_model("llama"), dataclasses.replace(config, lora_rank=4))
    wide.save_pretrained(tmp_path / "wide")
    HyLoRADAModel(base_model("qwen2"), config).save_pretrained(tmp_path / "qwen2")
    bank.model.save_pretrained(tmp_path / "own")

    with pytest.raises(CheckpointError, match=r"lora_rank: adapter 4, model 2\n.*from_pretrained"):
        bank.load("wide", tmp_path / "wide")
    with pytest.raises(CheckpointError, match="model_type: adapter 'qwen2', model 'llama'"):
        bank.load("qwen2", tmp_path / "qwen2")
    with pytest.raises(CheckpointError, match=r"lora_A \(2, 4, 12\) for \(2, 2, 12\)"):
        bank.add("wide", wide.adapters)
    with pytest.raises(CheckpointError, match="unexpected other"):
        bank.add("more", {**adapters, "other": jnp.ones(2)})
    with pytest.raises(ConfigError, match=r"not replaced unasked(\n|.)*'tall'"):
        bank.add("tall", adapters)
    with pytest.raises(ConfigError, match="not replaced unasked"):
        bank.load("small", tmp_path / "absent")
    with pytest.raises(ConfigError, match=r"'tal'\n.*Did you mean tall"):
        bank.switch("tal")
    with pytest.raises(ConfigError, match=r"Known: default, tall, small\."):
        bank.remove("zzz")
    with pytest.raises(ConfigError, match="active adapter"):
        bank.remove("default")
    with pytest.raises(ConfigError, match="Did you mean small"):
        bank(**given, adapters=["smal", *ROWS[1:]])
    with pytest.raises(DataError, match=r"'adapters': \(4,\).* for input_ids \(5, 7\)"):
        bank(**given, adapters=ROWS[:4])
    with pytest.raises(DataError, match=r"'attention_mask': \(1,\)"):
        bank(**given, adapters=ROWS, attention_mask=jnp.ones((1, LENGTH), int))
    with pytest.raises(DataError, match="a name for each row"):
        bank(**given, adapters="tall")
    assert bank.names == NAMES
    assert bank.active == "default"
    assert bank.model.adapters is adapters


def test_positions_beyond_the_table_are_refused():
    bank, given = full_bank(CONFIGS["lora"], "gpt2"), tokens(CONFIGS["lora"])
    places = jnp.full(given["input_ids"].shape, 32)
    with pytest.raises(DataError, match="a position of 32"):
        bank(**given, adapters=ROWS, position_ids=places)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_models_of_different_configs_share_the_frozen_weights(family):
    one, other = (shared_model(CONFIGS[method], family) for method in ("lora", "hylorada"))
    leaves = [jax.tree.leaves(model.frozen["params"]) for model in (one, other)]
    assert all(a is b for a, b in zip(*leaves, strict=True))
    some = jax.tree.leaves(shared_model(CONFIGS["longlora"], family).frozen["params"])
    assert {*map(id, some)} < {*map(id, leaves[0])}  # less what trains itself


def test_four_adapters_cost_as_much_as_one():
    """Frozen products once over the batch: the same operations, and no frozen weight copied for a row."""
    sizes = {"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 3}
    shape = DecoderConfig.from_hf({"model_type": "llama", **DECODER, **sizes})
    config = HyLoRADAConfig(method="dora", lora_rank=2)
    model = HyLoRADAModel(CausalLM.from_config(shape, jax.random.key(0)), config)
    bank = AdapterBank(model)
    for seed, name in enumerate("bcd"):
        bank.add(name, moved(model, seed))
    names = ("c", "default", "d", "b")
    ids = tokens(config, rows=4)["input_ids"]
    resolved, index = model.resolve(model.adapters), bank.index(names)

    @jax.jit
    def plain(frozen):
        return model.base.forward({"params": frozen["params"]}, ids).logits

    @jax.jit
    def single(frozen, resolved):
        return model.apply_resolved(resolved, ids, frozen=frozen).logits

    @jax.jit
    def mixed(frozen, stack, index):
        return apply_rows(model, stack, index, ids, frozen=frozen).logits

    compiled = {
        "plain": plain.lower(model.frozen).compile(),
        "single": single.lower(model.frozen, resolved).compile(),
        "mixed": mixed.lower(model.frozen, bank.stack(), index).compile(),
    }
    flops = {name: program.cost_analysis()["flops"] for name, program in compiled.items()}  # type: ignore[index]
    # Beside a frozen product of d_in·d_out a low-rank layer takes r·(d_in + d_out): 1/24 for q and o.
    assert flops["mixed"] < 1.05 * flops["single"] < 1.1 * flops["plain"], flops
    program = str(jax.make_jaxpr(mixed)(model.frozen, bank.stack(), index))
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.frozen["params"]):
        if path[-1].key in ("kernel", "embedding"):
            dims = ",".join(map(str, leaf.shape[-2:]))
            assert re.search(rf"\[(2,)?{dims}\]", program)
            assert not re.search(rf"\[(\d+,)*4,(\d+,)*{dims}\]", program), dims
    got = mixed(model.frozen, bank.stack(), index)
    np.testing.assert_allclose(got, bank(ids, names).logits, atol=ROUNDING)


def test_a_place_beyond_the_stack_is_no_adapter_of_another():
    bank, given = full_bank(CONFIGS["lora"]), tokens(CONFIGS["lora"], rows=2)
    logits = apply_rows(bank.model, bank.stack(), jnp.array([4, 3]), **given).logits
    assert np.isnan(logits[0]).all()
    assert np.isfinite(logits[1]).all()
