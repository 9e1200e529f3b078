import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import CheckpointError, ConfigError, DataError, ModelError
from hylorada_jax.nnx import AdapterBank, AdapterParam, adapt, disabled, resolve, save_adapter, tokens
from hylorada_jax.nnx.adapting_test import config_of, made, moved, output
from hylorada_jax.nnx.hooks_test import FULL, POSITIONS, Unaware, Words, run
from hylorada_jax.saved.saved_adapter import open_adapter

X = jax.random.normal(jax.random.key(1), (4, 5, 6))
PLACES = jnp.concatenate([POSITIONS, POSITIONS])


def test_every_row_has_its_adapter_and_what_the_model_learns_the_bank_has(tmp_path):
    model = moved(adapt(Words(), FULL, nnx.Rngs(1)), seed=3)
    save_adapter(model, tmp_path)
    bank = AdapterBank(moved(model, seed=4))
    bank.load("saved", tmp_path)
    expected: dict[str | None, jax.Array] = {"default": run(model, X, PLACES)}
    with disabled(model):
        expected[None] = run(model, X, PLACES)
    bank.switch("saved")
    expected["saved"] = run(model, X, PLACES)
    assert float(jnp.abs(expected["saved"] - expected["default"]).max()) > 1e-3
    for rows in (["saved", None, "default", "saved"], [None, "default", "default", "saved"]):
        got = bank(X, PLACES, adapters=rows)
        for i, name in enumerate(rows):
            # Sums in another order, whose terms are as large as the row's largest numbers.
            atol = 1e-5 * float(jnp.abs(expected[name][i]).max())
            np.testing.assert_allclose(got[i], expected[name][i], rtol=0, atol=atol)
    moved(model, seed=5)
    np.testing.assert_allclose(
        bank(X, PLACES, adapters=["saved"] * 4), run(model, X, PLACES), rtol=1e-5, atol=1e-5
    )
    bank.switch("default")
    np.testing.assert_array_equal(run(model, X, PLACES), expected["default"])


def test_what_the_context_gives_goes_along_with_its_row():
    config = HyLoRADAConfig(
        method="hylorada_v2", lora_rank=2, structure_seq_len=5, target_modules="all-linear"
    )
    model = moved(adapt(Unaware(), config, nnx.Rngs(1)))
    bank, ids = AdapterBank(model), jnp.arange(20).reshape(4, 5)
    for given in (
        {"structure_ids": ids},
        {"structure_ids": ids, "structure_positions": PLACES + 0.5, "position_ids": PLACES},
        {"position_ids": PLACES[3:]},
    ):
        with tokens(**given):
            got, expected = bank(X, adapters=["default", None, "default", "default"]), output(model, X)
            with disabled(model):
                base = output(model, X)
        expected = expected.at[1].set(base[1])
        assert float(jnp.abs(expected - base)[0].max()) > 1e-3
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5 * float(jnp.abs(expected).max()))
    with tokens(structure_ids=ids[:2]), pytest.raises(DataError, match=r"2, 5.* for 4 rows"):
        bank(X, adapters=["default"] * 4)


def test_within_disabled_every_row_is_the_bases(tmp_path):
    net, x = made("Linear")
    before = output(net, x)
    bank = AdapterBank(moved(adapt(net, config_of("lora"), nnx.Rngs(0))))
    adapted = output(net, x)
    save_adapter(net, tmp_path, chat_template="{{ messages }}")
    bank.load("saved", tmp_path)
    with disabled(net):
        np.testing.assert_array_equal(bank(x, adapters=["default", None]), before)
        bank.switch("saved")  # with another chat template, and the same adapters
        np.testing.assert_array_equal(output(net, x), before)
    np.testing.assert_array_equal(output(net, x), adapted)


def test_a_function_that_is_compiled_around_the_call_leaves_the_bank_as_it_was():
    net, x = made("Linear")
    bank = AdapterBank(moved(adapt(net, config_of("lora"), nnx.Rngs(0))))
    compiled = nnx.jit(lambda x: bank(x, adapters=["default", None]))
    expected = compiled(x)
    np.testing.assert_allclose(bank(x, adapters=["default", None]), expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(compiled(x), expected)


def test_an_adapters_template_and_structure_come_and_go_with_it(tmp_path):
    bank = AdapterBank(adapt(made("Linear")[0], config_of("lora"), nnx.Rngs(0)))
    save_adapter(bank.model, tmp_path / "a", chat_template="{{ messages }}", structure="code")
    bank.load("a", tmp_path / "a")
    traced, x = mock.Mock(side_effect=lambda net, x: net(x)), made("Linear")[1]
    called = nnx.jit(lambda net, x: traced(net, x))
    for name in ("a", "default", "a", "default"):
        bank.switch(name)
        called(bank.model, x)
        save_adapter(bank.model, tmp_path / "again", overwrite=True)
        found, expected = open_adapter(tmp_path / "again"), ("{{ messages }}", "code")
        assert (found.chat_template, found.structure) == (expected if name == "a" else (None, None))
    assert traced.call_count == 2  # once for each


def test_an_adapter_outlives_the_arrays_that_it_was_added_from():
    bank = AdapterBank(adapt(made("Linear")[0], config_of("lora"), nnx.Rngs(0)))
    given = nnx.state(moved(nnx.clone(bank.model)), AdapterParam)
    expected = jax.tree.map(np.array, nnx.to_pure_dict(given))
    bank.add("other", given)
    jax.tree.map(lambda leaf: leaf.delete(), given)  # as a step that donates them does
    bank.switch("other")
    found = nnx.to_pure_dict(nnx.state(bank.model, AdapterParam))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda bank: bank.switch("defalt"), ConfigError, "Did you mean default"),
        (lambda bank: bank.remove("default"), ConfigError, "active"),
        (lambda bank: bank.add("default", nnx.state(bank.model, AdapterParam)), ConfigError, "unasked"),
        (lambda bank: bank.load("default", "absent"), ConfigError, "unasked"),
        (lambda bank: bank.add("other", nnx.state(bank.model, nnx.BatchStat)), CheckpointError, "missing"),
        (lambda bank: bank(jnp.ones((2, 6)), adapters=["default"]), DataError, "1 adapters"),
        (lambda bank: bank([[1.0] * 6], adapters=["default"]), DataError, "a list"),
        (lambda bank: AdapterBank(resolve(bank.model)), ModelError, "resolved"),
    ],
    ids=["unknown", "active", "taken", "taken, not read", "other leaves", "rows", "a list", "resolved"],
)
def test_what_a_bank_cannot_do_is_refused(call, error, match):
    with pytest.raises(error, match=match):
        call(AdapterBank(adapt(made("Linear")[0], config_of("lora"), nnx.Rngs(0))))


class Counting(nnx.Module):
    """A layer that counts its calls, or gives one number."""

    def __init__(self, does):
        self.seen, self.does = nnx.Cache(jnp.zeros(())), does
        self.fc = nnx.Linear(6, 3, rngs=nnx.Rngs(0))

    def __call__(self, x):
        self.sow(nnx.Intermediate, "sown", x)
        if self.does == "count":
            self.seen[...] += 1
        y = self.fc(x)
        return y.sum() if self.does == "sum" else y


def test_a_model_that_cannot_be_computed_row_by_row_is_refused():
    x, names = jnp.ones((2, 6)), ["default", None]
    banks = {
        does: AdapterBank(adapt(Counting(does), config_of("lora"), nnx.Rngs(0)))
        for does in ("count", "sum", "nothing")
    }
    for does, said in (("count", "writes to its variables"), ("sum", "axis of rows")):
        with pytest.raises(ModelError, match=said):
            banks[does](x, adapters=names)
    np.testing.assert_allclose(banks["nothing"](x, adapters=names), banks["nothing"](x), rtol=1e-6)


def test_an_adapter_of_another_config_is_refused(tmp_path):
    save_adapter(adapt(made("Linear")[0], config_of("dora"), nnx.Rngs(0)), tmp_path)
    bank = AdapterBank(adapt(made("Linear")[0], config_of("lora"), nnx.Rngs(0)))
    with pytest.raises(CheckpointError, match="have the config"):
        bank.load("other", tmp_path)
    # But for what is of training.
    net, x = made("Linear")
    dropping = moved(adapt(net, dataclasses.replace(config_of("lora"), lora_dropout=0.5), nnx.Rngs(0)))
    save_adapter(dropping, tmp_path, overwrite=True)
    bank.load("other", tmp_path)
    bank.switch("other")
    dropping.eval()
    np.testing.assert_array_equal(bank.model(x), dropping(x))
