"""Whole adapted models in JAX against the reference: every row of the registered matrix."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hylorada_jax.config import METHODS
from hylorada_jax.errors import DataError, ModelError
from hylorada_jax.models.families import DECODERS
from hylorada_jax.models.wrapped import as_base
from hylorada_jax.saved.adapter_files import WEIGHTS_NAME
from parity_tests.families import FAMILIES, FUSED, HF_FLAX, NEW, jax_base, measuring
from parity_tests.models import (
    CONFIGS,
    FULLEST,
    MATRIX,
    base_errors,
    budgets,
    build,
    errors,
    measure_model,
    there_and_back,
    torch_inputs,
    torch_results,
)
from parity_tests.tolerances import FUSION, MODEL, relative_error


def test_every_method_and_every_family_is_registered():
    assert {CONFIGS[name].method for _, name in MATRIX} == set(METHODS)
    assert {name for _, name in MATRIX} == set(CONFIGS)
    assert {family for family, _ in MATRIX} == set(FAMILIES)
    # What hylorada_jax adapts whole, attention included: the families of our decoder, and of HF's these.
    assert {*FAMILIES, *NEW} == {*DECODERS, *HF_FLAX}


def test_every_attention_of_hugging_faces_that_is_ours_is_registered():
    attention = pytest.importorskip("hylorada_jax.models.hf.attention", exc_type=ImportError)
    theirs = [cls.__name__.removeprefix("Flax").lower() for cls in attention.ATTENTIONS]
    assert [next(f for f in HF_FLAX if name.startswith(f)) for name in theirs] == list(HF_FLAX)


@pytest.mark.slow
def test_the_oracle_has_gemma_2s_soft_caps():
    """Which transformers' own choice of attention drops; the reference's DAA would hide it."""
    assert max(base_errors("gemma2", "float64").values()) <= MODEL["float64"]


# Beside transformers 5, what the reference hooks into: each family once, and what models are given beside
# tokens. The other methods' formulas do not depend on it.
FIRST = {row[0]: row for row in reversed(MATRIX)}
CHOSEN = [row for row in MATRIX if not FUSED or row == FIRST[row[0]] or CONFIGS[row[1]].use_hylorada_v2]
# Decoders like others here: `make test-transformers5` has each with its first row, and test_decoder.py all.
ALIKE = {
    "mistral", "qwen2_moe", "qwen3", "phi3", "granite", "olmo2", "smollm3", "gemma", "gemma2", "gemma3_text",
    "gpt_oss",
}  # fmt: skip


def marks(family, name):
    """Quick where the program is small."""
    if family in ALIKE and (family, name) == FIRST[family]:
        return pytest.mark.apart
    return () if family in ("gpt2", "llama") and (family, name) not in FULLEST else pytest.mark.slow


ROWS = [pytest.param(*row, marks=marks(*row)) for row in CHOSEN if row[0] not in FUSED]


@pytest.mark.parametrize(("family", "name"), ROWS)
def test_float64(family, name, tmp_path):
    with measuring("float64"):
        pair = build(family, CONFIGS[name], "float64", in_front=True)
        model = pair.model
        within_budgets(family, "float64", errors(pair.got(), pair.expected()))

        # Saved, loaded and saved by the reference and loaded it is the same, bit for bit, on both sides, and
        # runs in the program that is compiled already. Loading compares how each side names the base.
        model.adapters, model.chat_template, model.structure = pair.adapters, "{{ messages }}", "code"
        there, loaded = there_and_back(model, family, tmp_path)
        files = [(tmp_path / side / WEIGHTS_NAME).read_bytes() for side in ("jax", "torch")]
        assert files[0] == files[1]
        beside = loaded.chat_template, loaded.structure
        assert (loaded.config, *beside) == (CONFIGS[name], "{{ messages }}", "code")
        assert str(jax.tree.structure(loaded.adapters)) == str(jax.tree.structure(pair.adapters))
        jax.tree.map(np.testing.assert_array_equal, loaded.adapters, pair.adapters)
        got, expected = pair.got(loaded), dataclasses.replace(pair, reference=there).expected()
        within_budgets(family, "float64", errors(got, expected))
        assert pair.program._cache_size() == 1

        # Operation by operation, without a jit of the whole, too.
        inputs: dict[str, Any] = {key: jnp.asarray(x) for key, x in pair.inputs.items() if key != "labels"}
        if (family, name) == ("llama", "hylorada"):
            eager = loaded.apply(loaded.adapters, train=pair.train, **inputs).logits
            assert relative_error(eager[pair.inputs["labels"] >= 0], got["logits"]) <= FUSION

        # Folded into the weights, or refused.
        if not mergeable(CONFIGS[name]):
            with pytest.raises(ModelError, match="can be merged"):
                loaded.merge_and_unload()
            return
        merged = as_base(loaded.merge_and_unload())
        logits = base_logits(family)(merged.params, inputs)[pair.inputs["labels"] >= 0]
    evaluated = torch_results(pair.reference.eval(), pair.inputs, pair.reference.adapters())["logits"]
    assert relative_error(logits, evaluated) <= MODEL["float64"]


def test_both_models_refuse_structure_ids_below_0():
    with measuring("float64"):
        pair = build("llama", CONFIGS["hylorada_v2"], "float64")
        del pair.inputs["labels"]
        pair.inputs["structure_ids"][0, 3] = -1
        of_jax: dict[str, Any] = dict(pair.inputs)
        for model, inputs in ((pair.model, of_jax), (pair.reference, torch_inputs(pair.inputs))):
            with pytest.raises(DataError, match="Structure ids must be integers ≥ 0"):
                model(**inputs)


# Our decoder, and one family of Hugging Face's. `hylorada parity` measures them all.
LOWER = [
    (*row, dtype)
    for row in FULLEST
    for dtype in {"llama": ("float32", "bfloat16"), "t5": ("float32",)}.get(row[0], ())
]


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize(("family", "name", "dtype"), LOWER)
def test_lower_precision(family, name, dtype):
    measured = measure_model(family, name, dtype)
    assert all(error <= budget for error, budget in measured.values()), measured


def within_budgets(family, dtype, found):
    allowed = budgets(family, dtype)
    assert all(found[direction] <= allowed[direction] for direction in allowed), (found, allowed)


def mergeable(config):
    """Whether all of the update is one of weights: none of a single token, in attention, or after an MLP."""
    per_token = config.position_bias_enabled or config.use_hylorada_v2
    return not (per_token or config.daa_enabled or config.sparse_enabled)


@functools.cache
def base_logits(family):
    """The family's base model in float64 as a jitted function of its parameters."""
    base = as_base(jax_base(family, "float64"))
    return jax.jit(lambda params, inputs: base.forward({"params": params}, **inputs).logits)
