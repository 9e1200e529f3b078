"""What `hylorada generate` and the samples of `finetune` give a model, and what they print of its answer."""

import json
import shutil
from types import SimpleNamespace

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from hylorada_jax.cli.answer_rows import asked
from hylorada_jax.cli.cli_test import run
from hylorada_jax.cli.sample import sample_of, samples
from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import DataError
from hylorada_jax.model import HyLoRADAModel
from hylorada_jax.models.loading import load_model
from hylorada_jax.models.positions import check_range
from hylorada_jax.models.tokenizer import Tokenizer, load_tokenizer

WORDS = ["<unk>", "<s>", "</s>", "▁The", "▁capital", "▁of", "▁France", "▁", "T", "h", "e"]


def llama2(path):
    """A directory with config and tokenizer as of Llama 2, and no weights."""
    backend = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    steps = [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.save(str(path / "tokenizer.json"))
    settings = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": "{{ bos_token }}{{ messages[0].content }}",
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    (path / "config.json").write_text('{"model_type": "llama", "eos_token_id": [2, 7]}')
    return path


class Answering:
    """A model that writes what it was made to, and keeps what it was given."""

    def __init__(self, *tokens):
        self.tokens, self.asked = list(tokens), []

    def generate(self, prompts, **settings):
        self.asked.append((prompts, settings["eos_token_id"]))
        return [self.tokens for _ in prompts]


def test_a_prompt_goes_in_as_in_training_and_comes_out_with_its_continuation(tmp_path, monkeypatch, capsys):
    path, model = llama2(tmp_path), Answering(4, 5, 6, 2)
    monkeypatch.setattr("hylorada_jax.cli.generate.loaded", lambda *_, **__: model)
    for prompt, chat, expected in (
        ("The", (), "The capital of France\n"),
        ("<s>The", (), "<s>The capital of France\n"),
        ("The", ("--chat",), " capital of France\n"),
        ("", (), "capital of France\n"),
    ):
        status, out, err = run(monkeypatch, capsys, "generate", "--model", path, "--prompt", prompt, *chat)
        assert (status, out) == (0, expected), err
    assert model.asked == [([[1, 3]], (2, 7))] * 3 + [([[1]], (2, 7))]


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_every_end_token_of_the_model_ends_a_text(file, tiny, tmp_path, monkeypatch, capsys):
    path = tmp_path / "model"
    shutil.copytree(tiny, path)
    prompt = load_tokenizer(path).encode_prompt("the").ids
    (free,) = load_model(path).generate([prompt], max_new_tokens=24, eos_token_id=())
    assert len(free) == 24
    end = free[12]
    saved = json.loads((path / file).read_text()) if (path / file).is_file() else {}
    (path / file).write_text(json.dumps(saved | {"eos_token_id": [1, end]}))
    expected = free[: free.index(end) + 1]
    assert len(expected) < 24

    model = load_model(path)
    adapted = HyLoRADAModel(model, HyLoRADAConfig(method="lora", lora_rank=2))
    assert [each.generate([prompt], max_new_tokens=24) for each in (model, adapted)] == [[expected]] * 2
    tokenizer = load_tokenizer(path)
    assert set(tokenizer.end_token_ids) == {1, end, 256}  # and training's own, <end>
    assert tokenizer.encode_documents(["x"])[0].ids[-1] == 256
    arguments = ("generate", "--model", path, "--prompt", "the", "--max-new-tokens", 24)
    assert (
        run(monkeypatch, capsys, *arguments)[1] == f"the{tokenizer.decode_continuation(prompt, expected)}\n"
    )


def test_a_model_of_transformers_generates_without_an_adapter(tmp_path, monkeypatch, capsys):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    if not hasattr(transformers, "FlaxGPT2LMHeadModel"):
        pytest.skip("transformers without Flax")
    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(models.BPE(alphabet, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(tmp_path / "tokenizer.json"))
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=1, n_head=2, n_embd=8, vocab_size=256, n_positions=16, initializer_range=0.5,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    oracle = transformers.GPT2LMHeadModel(config).eval()
    ids, settings = torch.tensor([backend.encode("the").ids]), {"do_sample": False, "pad_token_id": 0}
    free = oracle.generate(ids, max_new_tokens=6, **settings)[0].tolist()
    # Of several end tokens, as in generation_config.json, one comes before the room is used.
    oracle.generation_config.eos_token_id = [255, next(token for token in free[4:] if token not in free[:4])]
    oracle.save_pretrained(tmp_path)
    arguments = ("generate", "--model", tmp_path, "--prompt", "the", "--max-new-tokens", 6)
    status, out, err = run(monkeypatch, capsys, *arguments)
    assert status == 0, err
    expected = oracle.generate(ids, max_new_tokens=6, **settings)[0].tolist()
    assert out == backend.decode(expected) + "\n"
    assert len(expected) < len(free)


class Limited:
    """A model of 32 positions, which goes on with the word that its adapters are."""

    base = SimpleNamespace(position_limit=32)

    def __init__(self):
        self.adapters = 9

    def generate(self, prompts, *, max_new_tokens, eos_token_id):
        check_range((1, len(prompts[0]) + max_new_tokens), limit=32)
        self.prompt = prompts[0]
        return [[self.adapters] * max_new_tokens]


@pytest.mark.parametrize("words", [1, 3, 30, 31, 32, 50])
def test_a_sample_ends_where_the_positions_of_the_model_do(words):
    names = ["<s>", *(f"w{i}" for i in range(1, 10))]
    backend = tokenizers.Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, "w1"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend.add_special_tokens(["<s>"])
    tokenizer, model = Tokenizer(backend, {"bos_token": "<s>"}), Limited()
    text = " ".join(f"w{1 + i % 8}" for i in range(words))
    before, after = samples(model, 8, sample_of(text, tokenizer, None), tokenizer)
    # The text whole where it fits, its end where it does not, and at least a word more.
    kept = words if words < 31 else 15
    assert model.prompt == [0, *tokenizer.encode(text)[-kept:]]
    begun = text if kept == words else "…" + tokenizer.decode(model.prompt)
    assert (before, after) == (begun + " w8" * (31 - kept), begun + " w9" * (31 - kept))
    assert model.adapters == 9


def test_what_is_answered_is_refused_by_the_row_that_is_no_conversation(tmp_path):
    said = [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}]
    rows = [{"prompt": said[0], "completion": said[1]}, {"prompt": "c", "completion": "d"}]
    file = tmp_path / "mixed.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"mixed\.jsonl:2: a completion"):
        asked(str(file), {})
    file.write_text(json.dumps(rows[0]))
    assert [chat.messages for chat in asked(str(file), {})] == [said[0]]
