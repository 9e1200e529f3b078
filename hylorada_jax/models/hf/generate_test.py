"""What Hugging Face's classes generate here is what their torch models do, each prompt alone."""

from typing import Any

import pytest

transformers = pytest.importorskip("hylorada_jax.models.hf.loading", exc_type=ImportError).transformers
torch = pytest.importorskip("torch")

from hylorada_jax import HyLoRADAConfig, HyLoRADAModel, load_model  # noqa: E402
from hylorada_jax.errors import ConfigError, DataError  # noqa: E402
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


def test_a_structure_prior_is_refused_for_an_encoder_decoder(pairs):
    """As in hylorada_torch: the structure of the encoder's tokens would be read of the decoder's."""
    config = HyLoRADAConfig(method="hylorada_v2", lora_rank=2)
    with pytest.raises(ConfigError, match="belongs to one sequence of tokens"):
        HyLoRADAModel(pairs["bart"][1], config)
    HyLoRADAModel(pairs["gpt2"][1], config)
