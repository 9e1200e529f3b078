"""The settings of a generation_config.json choose among the tokens as transformers does with them."""

import json
import warnings
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from hylorada_jax.models.generation_config import generation_defaults
from hylorada_jax.models.sampling import sampling

CONFIG = transformers.LlamaConfig(
    vocab_size=97, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
)
FILES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "sampling": {"do_sample": True},
    "qwen3": {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95},
    "qwen2.5": {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05},
    "llama-3": {"do_sample": True, "temperature": 0.6, "top_p": 0.9},
    "min-p": {"do_sample": True, "top_k": 0, "min_p": 0.2, "repetition_penalty": 1.5},
    "greedy": {"do_sample": False, "repetition_penalty": 1.3},
    "greedy, by default": {"temperature": 0.6, "top_p": 0.9},
    "off": {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0},
}


@pytest.mark.parametrize("said", FILES.values(), ids=FILES)
def test_logits_become_what_transformers_samples_from(said, tmp_path):
    CONFIG.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    rng = np.random.default_rng(0)
    logits, ids = rng.normal(0, 3, (32, 97)).astype(np.float32), rng.integers(0, 97, (32, 12))

    model = transformers.LlamaForCausalLM(CONFIG)
    model.generation_config = transformers.GenerationConfig.from_pretrained(tmp_path)
    theirs, _ = model._prepare_generation_config(None)
    processors = model._get_logits_processor(generation_config=theirs, input_ids_seq_length=12, device="cpu")
    expected = processors(torch.tensor(ids), torch.tensor(logits)).numpy()

    seen = jnp.zeros(logits.shape, bool).at[jnp.arange(32)[:, None], ids].set(True)
    settings = {name: x for name, x in generation_defaults(tmp_path).items() if name != "max_new_tokens"}
    chosen = sampling(**settings)
    found = np.asarray(chosen.adjust(jnp.asarray(logits), seen))
    assert (chosen.temperature is not None) == bool(theirs.do_sample)
    np.testing.assert_array_equal(np.isfinite(found), np.isfinite(expected))
    # Two float32 operations on each logit.
    np.testing.assert_allclose(found, expected, rtol=3e-7)


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"max_length": 9}, "max_length"),
        ({"max_time": 1e-9}, "max_time"),
        ({"max_length": 9, "max_time": 1e-9}, "max_length, max_time"),
        ({"max_length": 9, "max_new_tokens": 12}, ""),
        ({"max_length": 20}, ""),  # what transformers takes by itself
        ({}, ""),
    ],
)
def test_what_ends_an_answer_early_in_transformers_is_named(said, named, tmp_path):
    CONFIG.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    model, ids = transformers.LlamaForCausalLM(CONFIG).eval(), torch.tensor([[5, 6, 7]])

    def length(settings: dict[str, Any]) -> int:
        # A file has none of a text's ends, so that nothing else ends it.
        model.generation_config = transformers.GenerationConfig(pad_token_id=0, eos_token_id=None, **settings)
        return model.generate(ids, do_sample=False).shape[1]

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours = generation_defaults(tmp_path)
    messages = [str(warning.message).partition("not heeded: ")[2] for warning in caught]
    assert messages == [named] * bool(named)
    assert (length(said) == length(ours)) == (not named)
