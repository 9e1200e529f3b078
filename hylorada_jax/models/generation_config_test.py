import json
import math
import warnings

import pytest

from hylorada_jax.errors import ModelError
from hylorada_jax.models.generation_config import generation_defaults
from hylorada_jax.models.gguf_test import KEYS, tensors, write_gguf

SAMPLED = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.05}


def defaults(directory, said):
    (directory / "config.json").write_text("{}")
    (directory / "generation_config.json").write_text(said if isinstance(said, str) else json.dumps(said))
    return generation_defaults(directory)


@pytest.mark.parametrize(
    ("said", "taken"),
    [
        ({}, {}),
        ({"eos_token_id": 3, "transformers_version": "5.0.0", "max_length": 20}, {}),
        (SAMPLED, {name: value for name, value in SAMPLED.items() if name != "do_sample"}),
        (SAMPLED | {"do_sample": False}, {}),
        ({"temperature": 0.6, "top_p": 0.9}, {}),
        ({"do_sample": True}, {"temperature": 1.0, "top_k": 50}),
        ({"do_sample": True, "top_k": 0, "top_p": 1.0, "min_p": 0.0}, {"temperature": 1.0}),
        ({"do_sample": True, "temperature": None, "top_k": None}, {"temperature": 1.0, "top_k": 50}),
        ({"repetition_penalty": 1.1, "max_new_tokens": 7}, {"repetition_penalty": 1.1, "max_new_tokens": 7}),
        ({"repetition_penalty": 1.0}, {}),
    ],
)
def test_a_file_gives_the_settings_that_have_an_effect(said, taken, tmp_path):
    assert defaults(tmp_path, said) == taken


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("do_sample", (1, "yes", [])),
        ("temperature", ("hot", True, [], -0.1, math.nan, math.inf, 1e300)),
        ("top_k", ("50", True, 1.5, -1, 2**31, [50])),
        ("top_p", ("x", 0, -0.1, 1.5, math.nan)),
        ("min_p", ("x", -0.1, 1.5, math.nan)),
        ("repetition_penalty", ("x", 0, -1, math.nan, math.inf, {})),
        ("max_new_tokens", ("x", 0, -1, 1.5, 2**40, math.nan)),
    ],
)
def test_a_wrong_value_is_refused_by_name(key, values, tmp_path):
    for value in values:
        with pytest.raises(ModelError, match=rf"{key}: [\s\S]*remedy: +Correct generation_config\.json"):
            defaults(tmp_path, {key: value})


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000, "3", "\ufffe"])
def test_what_is_no_json_object_is_refused(content, tmp_path):
    with pytest.raises(ModelError, match=r"generation_config\.json must be a JSON object"):
        defaults(tmp_path, content)


def test_what_would_change_the_answers_and_is_not_heeded_is_named(tmp_path):
    neutral = {"num_beams": 1, "no_repeat_ngram_size": 0, "bad_words_ids": None, "typical_p": 1.0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        defaults(tmp_path, neutral)
    with pytest.warns(UserWarning, match="not heeded: num_beams, stop_strings$") as caught:
        defaults(tmp_path, neutral | {"num_beams": 4, "stop_strings": ["x"]})
    assert len(caught) == 1


def test_constraints_are_heeded_where_hugging_faces_models_generate(tmp_path):
    bart = {"num_beams": 4, "min_length": 56, "forced_bos_token_id": 0, "no_repeat_ngram_size": 3}
    for kind, named in (
        ("bart", "num_beams"),
        ("llama", "forced_bos_token_id, min_length, no_repeat_ngram_size, num_beams"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        (tmp_path / "generation_config.json").write_text(json.dumps(bart))
        with pytest.warns(UserWarning, match=f"not heeded: {named}$"):
            generation_defaults(tmp_path)
    # Of older directories, as transformers 4 reads them.
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bart", "do_sample": True} | bart))
    with pytest.warns(UserWarning, match="not heeded: num_beams$"):
        assert generation_defaults(tmp_path) == {"temperature": 1.0, "top_k": 50}


def test_a_gguf_file_has_those_that_were_converted(tmp_path):
    said = {"temp": 0.6, "top_k": 20, "penalty_repeat": 1.1, "mirostat": 2}
    extra = {f"general.sampling.{key}": value for key, value in said.items()}
    path = write_gguf(tmp_path / "t.gguf", "llama", KEYS, tensors(), extra=extra)
    with pytest.warns(UserWarning, match=r"not heeded: general\.sampling\.mirostat$"):
        found = generation_defaults(path)
    assert found == pytest.approx({"temperature": 0.6, "top_k": 20, "repetition_penalty": 1.1})
    assert generation_defaults(write_gguf(tmp_path / "plain.gguf", "llama", KEYS, tensors())) == {}
