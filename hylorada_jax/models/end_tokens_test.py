import json

import pytest

from hylorada_jax.errors import ModelError
from hylorada_jax.models.end_tokens import end_tokens
from hylorada_jax.models.gguf_test import KEYS, tensors, write_gguf
from hylorada_jax.models.source import find_source


@pytest.mark.parametrize(
    ("generation", "config", "ends"),
    [
        ([1, 185], 2, (1, 185)),
        (7, 2, (7,)),
        ([185, 1, 185], None, (185, 1)),
        (None, [1, 185], (1, 185)),
        (None, 2, (2,)),
        (None, None, ()),
        (0, 2, (0,)),
    ],
)
def test_generation_config_counts_before_config(generation, config, ends, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": config}))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert end_tokens(find_source(tmp_path, config_only=True)) == ends
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert end_tokens(find_source(tmp_path, config_only=True)) == ends


@pytest.mark.parametrize(
    "content",
    [
        *("{", "[]", "[" * 100_000),
        *(
            f'{{"eos_token_id": {value}}}'
            for value in ('"</s>"', "[[1]]", "true", "1.5", "-1", "NaN", "{}", "[null]")
        ),
    ],
)
def test_what_names_no_token_is_refused(content, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ModelError, match="remedy"):
        end_tokens(find_source(tmp_path, config_only=True))


def test_a_gguf_file_has_ends_of_texts_turns_and_messages(tmp_path):
    extra = {f"tokenizer.ggml.{key}_token_id": value for key, value in {"eos": 1, "eot": 3, "eom": 1}.items()}
    path = write_gguf(tmp_path / "t.gguf", "llama", KEYS, tensors(), extra=extra)
    assert end_tokens(find_source(path)) == (1, 3)
