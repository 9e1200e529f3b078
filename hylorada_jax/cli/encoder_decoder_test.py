"""`hylorada generate` and `chat` with encoder-decoders: what these read and write, as in transformers."""

import io
import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

transformers = pytest.importorskip("hylorada_jax.models.hf.loading", exc_type=ImportError).transformers
torch = pytest.importorskip("torch")

from hylorada_jax.cli.cli_test import run  # noqa: E402
from hylorada_jax.models.hf.base_test import BART  # noqa: E402
from hylorada_jax.models.tokenizer import load_tokenizer  # noqa: E402

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *(f"▁w{i}" for i in range(4, 50))]
TEMPLATE = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
MODELS = {
    "bart": (
        "BartForConditionalGeneration",
        transformers.BartConfig(**BART, **IDS, init_std=0.5, tie_word_embeddings=False),
        "<s> $A </s>",
    ),
    "t5": (
        "T5ForConditionalGeneration",
        transformers.T5Config(
            vocab_size=50,
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=1,
            num_heads=2,
            initializer_factor=3.0,
            **IDS,
        ),
        "$A </s>",
    ),
}


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
    """A directory as of transformers, and torch's model and the tokenizer of it."""
    path = tmp_path_factory.mktemp(request.param)
    kind, config, single = MODELS[request.param]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    special = [("<s>", 1), ("</s>", 2)]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    roles = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=TEMPLATE, **roles
    ).save_pretrained(path)
    torch.manual_seed(1)
    oracle = getattr(transformers, kind)(config).eval()
    oracle.save_pretrained(path)
    return path, oracle, transformers.AutoTokenizer.from_pretrained(path)


def words(count):
    return " ".join(f"w{4 + 3 * i % 46}" for i in range(count))


def answer_of(oracle, tokenizer, ids, new):
    ids = torch.tensor([ids])
    (row,) = oracle.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, num_beams=1
    )
    return tokenizer.decode(row, skip_special_tokens=True)


def test_the_encoder_reads_a_whole_text_and_the_answer_is_shown_alone(pair, monkeypatch, capsys):
    path, oracle, tokenizer = pair
    for text in (words(3), words(20), "", f"{words(2)}</s>"):
        ids = tokenizer(text.removesuffix("</s>"))["input_ids"]  # an end that is written is not doubled
        assert ids[-1] == tokenizer.eos_token_id
        assert load_tokenizer(path).encode_prompt(text).ids == ids
    for text in (words(3), words(20)):
        expected = answer_of(oracle, tokenizer, tokenizer(text)["input_ids"], 8)
        arguments = ("generate", "--model", path, "--prompt", text, "--max-new-tokens", 8)
        assert run(monkeypatch, capsys, *arguments)[:2] == (0, expected + "\n")
        assert expected.startswith("w")


def test_the_same_tokenizer_beside_a_decoder_leaves_a_text_open(pair, tmp_path):
    path, _, tokenizer = pair
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((path / file).read_bytes())
    config = json.loads((path / "config.json").read_text())
    bart = {"model_type": "bart", "architectures": ["BartForCausalLM"]}
    gpt2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    for change in (gpt2, bart | {"is_encoder_decoder": False}, bart | {"is_encoder_decoder": None}):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        ids = load_tokenizer(tmp_path).encode_prompt(words(3)).ids
        assert ids == tokenizer(words(3))["input_ids"][:-1]


def test_a_prompt_and_its_answer_need_not_fit_into_one_table(pair, monkeypatch, capsys):
    path, oracle, tokenizer = pair
    text = words(30)
    ids = tokenizer(text)["input_ids"]
    expected = answer_of(oracle, tokenizer, ids, 8)
    arguments = ("generate", "--model", path, "--max-new-tokens", 8, "--prompt")
    assert run(monkeypatch, capsys, *arguments, text)[:2] == (0, expected + "\n")
    status, _, err = run(monkeypatch, capsys, *arguments, words(31))
    if oracle.config.model_type == "bart":
        assert len(ids) == 32
        assert (status, "received: 33 tokens in a row" in err) == (2, True)
    else:
        assert status == 0


def test_an_answer_in_a_chat_is_a_text_of_its_own(pair, monkeypatch, capsys):
    path, oracle, tokenizer = pair
    said = [{"role": "user", "content": words(25)}]
    ids = tokenizer.apply_chat_template(said, add_generation_prompt=True)
    expected = answer_of(oracle, tokenizer, ids, 8)
    settings = ("--model", path, "--max-new-tokens", 8)
    out = run(monkeypatch, capsys, "generate", *settings, "--chat", "--prompt", words(25))[1]
    assert out == expected + "\n"
    rows = path / "rows.jsonl"
    rows.write_text(json.dumps({"messages": said}))
    answered = run(monkeypatch, capsys, "generate", *settings, "--messages", rows)[1]
    assert json.loads(answered)["messages"][-1] == {"role": "assistant", "content": expected}
    monkeypatch.setattr("sys.stdin", io.StringIO(words(25) + "\n"))
    assert run(monkeypatch, capsys, "chat", *settings)[1] == expected + "\n"
