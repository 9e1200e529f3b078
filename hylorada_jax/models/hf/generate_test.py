"""What Hugging Face's classes generate here is what their torch models do, each prompt alone."""

import json
from typing import Any

import jax
import pytest

transformers = pytest.importorskip("hylorada_jax.models.hf.loading", exc_type=ImportError).transformers
torch = pytest.importorskip("torch")

from hylorada_jax import HyLoRADAConfig, HyLoRADAModel, load_model  # noqa: E402
from hylorada_jax.errors import ConfigError, DataError, ModelError  # noqa: E402
from hylorada_jax.models.hf.base import HFFlaxModel  # noqa: E402
from hylorada_jax.models.hf.base_test import BART, GPT2  # noqa: E402

PROMPTS, NEW = [[5, 9, 11, 7, 6], [8]], 8
CONFIGS = {
    "bart": transformers.BartConfig(
        **BART, init_std=0.5, forced_eos_token_id=None, tie_word_embeddings=False
    ),
    "gpt2": transformers.GPT2Config(**GPT2, initializer_range=0.5, bos_token_id=1, eos_token_id=2),
}
CLASSES = {"bart": "BartForConditionalGeneration", "gpt2": "GPT2LMHeadModel"}
OFF: dict[str, Any] = {
    "min_length": 0, "no_repeat_ngram_size": 0, "forced_bos_token_id": None, "forced_eos_token_id": None,
    "suppress_tokens": None, "begin_suppress_tokens": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """torch's model, and ours of its files, by family."""
    found = {}
    for name, config in CONFIGS.items():
        path = tmp_path_factory.mktemp(name)
        torch.manual_seed(1)
        oracle = getattr(transformers, CLASSES[name])(config).eval()
        oracle.save_pretrained(path)
        found[name] = oracle, HFFlaxModel.wrap(load_model(path)), path
    return found


def of_torch(oracle, ends, prompts=PROMPTS, new=NEW, *, said):
    """The new tokens of each prompt alone."""
    oracle.generation_config.update(**said, eos_token_id=[*ends] or None)
    rows = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        settings = {"do_sample": False, "num_beams": 1, "max_new_tokens": new, "pad_token_id": 0}
        row = oracle.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0].tolist()
        rows.append(row[1 if oracle.config.is_encoder_decoder else len(prompt) :])
    return rows


# Without any, BART answers [23, 0, 0, 13, 43 …] and [19, 19, 19, 19, 43 …].
CASES: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "one end": ("bart", (43,), {"min_length": 6}),
    "ends on time": ("bart", (43,), {"min_length": 5}),
    "several ends": ("bart", (43, 13), {"min_length": 7}),
    "no room for an end": ("bart", (0, 19), {"min_length": 20}),
    "first and last": ("bart", (), {"forced_bos_token_id": 7, "forced_eos_token_id": [0, 9]}),
    "suppressed": ("bart", (), {"suppress_tokens": [13, 43], "begin_suppress_tokens": [23, 19]}),
    "suppressed behind the first": (
        "bart",
        (),
        {"forced_bos_token_id": 7, "begin_suppress_tokens": [7, 19, 0]},
    ),
    "no token twice": ("bart", (), {"no_repeat_ngram_size": 1}),
    "no n-gram twice": ("bart", (), {"no_repeat_ngram_size": 2}),
    "n-grams longer than the rows": ("bart", (), {"no_repeat_ngram_size": 40}),
    "a prompt counts": ("gpt2", (26, 46), {"min_length": 7}),
    "no n-gram of padding": (
        "gpt2",
        (),
        {"no_repeat_ngram_size": 2, "suppress_tokens": [*range(1, 8), *range(9, 50)]},
    ),
    "no n-gram of the prompt": ("gpt2", (), {"no_repeat_ngram_size": 2, "forced_bos_token_id": 8}),
}


UNCHANGED = ("ends on time", "n-grams longer than the rows")


@pytest.mark.filterwarnings("ignore:Unfeasible length constraints")
@pytest.mark.parametrize("case", CASES)
def test_the_constraints_of_a_generation_config_are_those_of_torch(case, pairs):
    name, ends, said = CASES[case]
    oracle, ours, _ = pairs[name]
    free = of_torch(oracle, ends, said=OFF)
    expected = of_torch(oracle, ends, said=OFF | said)
    ours.model.generation_config.update(**OFF | said)
    assert ours.generate(PROMPTS, max_new_tokens=NEW, eos_token_id=ends) == expected
    assert (expected == free) == (case in UNCHANGED)


def test_sampled_tokens_keep_to_the_constraints(pairs):
    _, ours, _ = pairs["bart"]
    ours.model.generation_config.update(**OFF | {"min_length": 6, "forced_bos_token_id": 7})
    how: dict[str, Any] = {"temperature": 5.0, "top_k": 3, "rng": jax.random.key(0)}
    rows = ours.generate([[5, 9]] * 200, max_new_tokens=NEW, eos_token_id=(43, 13), **how)
    assert {row[0] for row in rows} == {7}
    assert min(map(len, rows)) == 6 - 1 + 1  # the start token counts, and the end is there
    assert max(map(len, rows)) == NEW


def test_the_file_says_what_is_generated(pairs, tmp_path):
    """As transformers reads them: generation_config.json alone where it is there, else config.json."""
    oracle, _, path = pairs["bart"]
    weights = (path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights)
    config = json.loads((path / "config.json").read_text()) | {"no_repeat_ngram_size": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    said = {"min_length": 6, "forced_bos_token_id": 7, "eos_token_id": [43, 13], "decoder_start_token_id": 2}
    for file in ({}, said):
        if file:
            (tmp_path / "generation_config.json").write_text(json.dumps(file))
        theirs = type(oracle).from_pretrained(tmp_path).generation_config
        ends = theirs.eos_token_id if file else [2]
        expected = of_torch(oracle, ends, said={name: getattr(theirs, name) for name in OFF})
        assert HFFlaxModel.wrap(load_model(tmp_path)).generate(PROMPTS, max_new_tokens=NEW) == expected
    for key, value in (("min_length", "long"), ("forced_bos_token_id", 50), ("suppress_tokens", [3, -1])):
        (tmp_path / "generation_config.json").write_text(json.dumps({key: value}))
        with pytest.raises(ModelError, match=rf"{key}[\s\S]*remedy: +Correct generation_config\.json"):
            load_model(tmp_path)


def test_an_encoder_and_a_decoder_have_a_table_of_positions_each(pairs):
    oracle, ours, _ = pairs["bart"]
    ours.model.generation_config.update(**OFF)
    assert ours.position_limit == 32
    for prompt, new in (([5, 9] * 16, 2), ([5, 9], 31)):
        expected = of_torch(oracle, (), [prompt], new, said=OFF)
        assert ours.generate([prompt], max_new_tokens=new, eos_token_id=()) == expected
    for prompt, new, row in (([5, 9] * 16 + [5], 2, 33), ([5, 9], 32, 33)):
        with pytest.raises(DataError, match=rf"below 32[\s\S]*received: {row} tokens in a row"):
            ours.generate([[8], prompt], max_new_tokens=new)


@pytest.mark.parametrize("method", ["hylorada", "hylorada_v2"])
def test_what_depends_on_the_token_is_refused_for_an_encoder_decoder(pairs, method):
    """As in hylorada_torch: of the encoder's tokens, that of the decoder's would be read."""
    config = HyLoRADAConfig(method=method, lora_rank=2, daa_enabled=False)
    with pytest.raises(ConfigError, match="belong to one sequence of tokens"):
        HyLoRADAModel(pairs["bart"][1], config)
    HyLoRADAModel(pairs["gpt2"][1], config)
