"""What a config, a setting or the data tells is reported before weights are read: here none can be."""

import json
import shutil
import types

import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from hylorada_jax.cli.cli_test import run
from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import ConfigError, DataError, HyLoRADAError, ModelError
from hylorada_jax.model import HyLoRADAModel
from hylorada_jax.models.causal_lm import CausalLM
from hylorada_jax.models.loading import empty_model, load_model
from hylorada_jax.models.wrapped import as_base
from hylorada_jax.saved.adapter_files import write_adapter
from hylorada_jax.saved.opening import identity
from hylorada_jax.surgery.fit import fit
from hylorada_jax.surgery.layout import tensor_shapes
from hylorada_jax.training.config import TrainingConfig
from hylorada_jax.training.run_directory_test import opened, snapshot
from hylorada_jax.training.trainer import HyLoRADATrainer

SMALL = {"vocab_size": 257, "max_position_embeddings": 32, "hidden_size": 16, "num_hidden_layers": 1}
SMALL |= {"num_attention_heads": 2, "intermediate_size": 24}
GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 257, "n_positions": 32}
GPT2 |= {"n_embd": 16, "n_layer": 1, "n_head": 2}
T5 = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "vocab_size": 257, "d_model": 16}
T5 |= {"d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
LLAMA = SMALL | {"model_type": "llama", "max_position_embeddings": 128, "tie_word_embeddings": True}
CONFIGS = {
    "llama": LLAMA,
    "one head": LLAMA | {"num_attention_heads": 1},
    "odd": LLAMA | {"num_attention_heads": 3},
    "other": LLAMA | {"hidden_size": 32},
    "few": LLAMA | {"vocab_size": 100},
    "unknown": LLAMA | {"model_type": "mamba"},
    "hostile": LLAMA,
    "gpt2": GPT2,
    "gpt2 unscaled": GPT2 | {"scale_attn_weights": False},
    "opt": SMALL
    | {"model_type": "opt", "architectures": ["OPTForCausalLM"], "ffn_dim": 24, "word_embed_proj_dim": 16},
    "bloom": {"model_type": "bloom", "architectures": ["BloomForCausalLM"], "vocab_size": 257}
    | {"hidden_size": 16, "n_layer": 1, "n_head": 2},
    "bert": SMALL | {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
    "t5": T5,
}
ADAPTERS = {"adapter": "lora", "sparse adapter": "sparse", "daa adapter": "lorada"}
OURS = ("llama", "one head", "odd", "other", "few", "unknown", "hostile")


def require_flax(name):
    if name in OURS:
        return
    transformers = pytest.importorskip("transformers", "4.57")
    if not hasattr(transformers, "FlaxGPT2LMHeadModel"):
        pytest.skip("transformers without Flax models")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Model directories with a tokenizer, but without weights; and adapters of the Llama among them."""
    root = tmp_path_factory.mktemp("models")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([*alphabet, "<end>"])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for name, config in CONFIGS.items():
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(config))
        tokenizer.save(str(root / name / "tokenizer.json"))
    (root / "hostile" / "generation_config.json").write_text('{"do_sample": true, "temperature": "hot"}')
    (root / "chat.jinja").write_text("{% for m in messages %}{{ m.content }}<end>{% endfor %}")
    (root / "wrong.jinja").write_text("{% for m in messages %}")
    base = as_base(empty_model(root / "llama"))
    for name, method in ADAPTERS.items():
        config = HyLoRADAConfig(method=method, lora_rank=1)
        modules, sites = fit(base, config)
        leaves = {leaf: np.full(shape, 2, np.float32) for leaf, shape in tensor_shapes(sites).items()}
        write_adapter(root / name, leaves, config, identity(base, modules))
    # Of a few bytes, and settings that call for many.
    config, leaves = HyLoRADAConfig(method="sparse", sparse_adapter_dim=2**16), {"a": np.ones(1, np.float32)}
    write_adapter(root / "vast adapter", leaves, config, identity(base, modules))
    wide = HyLoRADAConfig(method="longlora", s2_group_size=2**16)
    (root / "wide.json").write_text(wide.to_json())
    # The shift is 29 tokens of 100: no group can be smaller.
    (root / "coarse.json").write_text(HyLoRADAConfig(method="longlora", s2_shift_ratio=0.29).to_json())
    return root


@pytest.fixture(params=["missing", "broken"])
def weights(place, request):
    """Every model's weights: not there, or not what they should be."""
    for name in CONFIGS:
        (place / name / "model.safetensors").unlink(missing_ok=True)
        if request.param == "broken":
            (place / name / "model.safetensors").write_bytes(b"\xff" * 64)


PACKED, ALONE = (), ("--no-packing",)
FINETUNE = [
    ("llama", ("--targets", "q_prj"), "q_proj"),
    ("llama", ("--structure", "code"), "hylorada_v2"),
    ("llama", ("--batch-size", "3", "--microbatches", "2"), "microbatches must divide"),
    ("llama", ("--seq-len", "4000"), "must fill a row"),
    ("llama", ("--config", "wide.json"), "must not be longer than a row"),
    ("llama", ("--config", "coarse.json", "--seq-len", "64"), "groups of 100 tokens for rows of 64"),
    ("llama", ("--config", "wide.json", "--rank", "0"), "--rank must be"),
    ("llama", ("--method", "sparse", "--rank", "4", "--no-lora-plus"), "--rank, --lora-plus"),
    ("llama", ("--columns", "text=a", "text=b"), "--columns text=a text=b"),
    ("few", (), "must be in the model's vocabulary, 0 … 99"),
    ("odd", (), "even head_dim"),
    ("unknown", (), "mamba"),
    ("one head", ("--s2-attn",), "halves the heads"),
    ("other", ("--start-from", "adapter"), "An adapter fits only the base model"),
    ("llama", ("--start-from", "vast adapter"), "The adapter's tensors must be"),
    ("gpt2", ("--s2-attn", "--seq-len", "64"), "Positions of this model lie below 32"),
    ("gpt2", ("--remat", "full"), "Rematerialisation"),
    ("gpt2 unscaled", (), "scale_attn_weights"),
    ("opt", PACKED, "Packed documents need"),
    ("opt", (*ALONE, "--s2-attn"), "Shifted sparse attention needs"),
    ("opt", (*ALONE, "--daa"), "daa_enabled needs"),
    ("opt", (*ALONE, "--seq-len", "64"), "Positions of this model lie below 32"),
    (
        "bloom",
        (*ALONE, "--method", "hylorada_v2", "--targets", "query_key_value"),
        "input_ids and position_ids",
    ),
    ("bert", ("--seq-len", "32"), "The built-in loss needs a causal language model"),
    ("t5", (*ALONE, "--method", "hylorada", "--no-daa"), "belong to one sequence"),
]
TEMPLATE = ("--chat-template", "chat.jinja")
OTHERS = [
    ("evaluate", "llama", ("--batch-size", "0"), "A batch must have a row"),
    ("evaluate", "few", (), "must be in the model's vocabulary, 0 … 99"),
    ("evaluate", "other", ("--adapter", "adapter"), "An adapter fits only the base model"),
    ("evaluate", "llama", ("--adapter", "vast adapter"), "The adapter's tensors must be"),
    ("evaluate", "opt", ("--seq-len", "64"), "Positions of this model lie below 32"),
    ("evaluate", "bert", ("--seq-len", "16"), "The built-in loss needs a causal language model"),
    ("generate", "llama", ("--max-new-tokens", "0"), "max_new_tokens must be an integer, at least 1"),
    ("generate", "llama", ("--temperature", "-1"), "temperature must be"),
    ("generate", "llama", ("--top-p", "0.9"), "--top-p 0.9 at temperature 0"),
    ("generate", "llama", TEMPLATE, "A chat template is of a conversation"),
    ("generate", "few", (), "vocabulary, 0 … 99"),
    ("generate", "other", ("--adapter", "adapter"), "An adapter fits only the base model"),
    ("generate", "llama", ("--adapter", "vast adapter"), "The adapter's tensors must be"),
    ("generate", "opt", ("--max-new-tokens", "30"), "Positions of this model lie below 32"),
    ("generate", "bert", ("--max-new-tokens", "1"), "Text is generated by a model"),
    ("generate", "llama", ("--chat",), "needs a model with a chat template"),
    ("generate", "llama", ("--chat", "--chat-template", "wrong.jinja"), "TemplateSyntaxError"),
    ("generate", "llama", ("--output", "missing/answers.jsonl"), "Answers to messages"),
    ("generate", "hostile", ("--chat", *TEMPLATE), "temperature: 'hot'"),
    ("chat", "llama", (), "needs a model with a chat template"),
    ("chat", "llama", ("--chat-template", "missing.jinja"), "missing.jinja: no such file"),
    ("chat", "hostile", TEMPLATE, "temperature: 'hot'"),
    ("chat", "llama", (*TEMPLATE, "--max-context", "1"), "A context must hold"),
    ("chat", "opt", (*TEMPLATE, "--max-context", "33"), "33 for 32 positions"),
    ("chat", "llama", (*TEMPLATE, "--min-p", "2", "--temperature", "1"), "min_p must be"),
    ("chat", "llama", (*TEMPLATE, "--top-k", "5"), "--top-k 5 at temperature 0"),
    ("chat", "other", ("--adapter", "adapter"), "An adapter fits only the base model"),
    ("chat", "bert", TEMPLATE, "Text is generated by a model"),
    ("export-peft", "other", ("--adapter", "adapter"), "An adapter fits only the base model"),
    ("export-peft", "llama", ("--adapter", "vast adapter"), "The adapter's tensors must be"),
    ("export-peft", "llama", ("--adapter", "sparse adapter"), "which adapts none"),
    ("export-peft", "llama", ("--adapter", "daa adapter"), "daa: "),
    ("params", "one head", ("--s2-attn",), "halves the heads"),
    ("params", "opt", ("--s2-attn",), "Shifted sparse attention needs"),
    ("params", "t5", ("--method", "hylorada", "--no-daa"), "belong to one sequence"),
]


@pytest.mark.usefixtures("weights")
@pytest.mark.parametrize(
    ("command", "model", "options", "said"), [("finetune", *case) for case in FINETUNE] + OTHERS
)
def test_a_mistake_is_reported_and_not_the_weights(
    command, model, options, said, place, tmp_path, monkeypatch, capsys
):
    require_flax(model)
    monkeypatch.chdir(place)
    (tmp_path / "texts.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    own = {
        "finetune": ("--data", tmp_path / "texts.txt", "--output", tmp_path / "out"),
        "evaluate": ("--data", tmp_path / "texts.txt"),
        "generate": ("--prompt", "the quick"),
        "chat": (),
        "export-peft": ("--output", tmp_path / "out"),
        "params": (),
    }
    before = set(place.rglob("*"))
    status, _, err = run(monkeypatch, capsys, command, "--model", f"./{model}", *own[command], *options)
    assert (status, said in err) == (2, True), err
    assert "remedy" in err
    assert not (tmp_path / "out").exists()
    assert set(place.rglob("*")) == before


@pytest.fixture
def finished(place, tmp_path):
    """A run whose files serve as all that another run may read."""
    finished = opened(tmp_path / "runs" / "a")
    shutil.copytree(place / "adapter", finished.adapter)
    finished.metrics.write_text('{"text": "the quick brown fox"}\n' * 60)
    shutil.copy(place / "chat.jinja", finished.nonfinite_batch)
    shutil.copy(place / "wide.json", finished.loss_plot)
    finished.recipe.write_text(json.dumps({"model": str(place / "llama"), "data": ["texts.txt"]}))
    (tmp_path / "texts.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    (tmp_path / "linked").symlink_to(finished.adapter)
    return finished


@pytest.mark.parametrize(("options", "read"), [
    (("--start-from", "runs/a/adapter"), "a/adapter"),
    (("--start-from", "linked"), "linked, linked/adapter_config"),
    (("--data", "runs/a/metrics.jsonl"), "metrics.jsonl"), (("--data", "runs/**/*.jsonl"), "metrics.jsonl"),
    (("--data", "texts.txt=0.5", "runs/a/metrics.jsonl=0.5"), "metrics.jsonl"),
    (("--data", "texts.txt", "--eval-data", "runs/a/*.jsonl"), "metrics.jsonl"),
    (("--chat-template", "runs/a/nonfinite_batch.npz"), "nonfinite_batch"),
    (("--config", "runs/a/loss.png"), "loss.png"), (("--model", "runs/a/adapter"), "a/adapter"),
])  # fmt: skip
def test_a_run_is_not_overwritten_by_one_that_reads_its_files(
    options, read, finished, place, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    options = (*options, *(() if "--model" in options else ("--model", place / "llama")))
    options = (*options, *(() if "--data" in options else ("--data", "texts.txt")))
    before = snapshot(tmp_path)
    status, _, err = run(
        monkeypatch, capsys, "finetune", *options, "--output", finished.path, "--overwrite", "--seq-len", 8
    )
    assert (status, "not overwritten by one that reads its files" in err) == (2, True), err
    assert f"received: {read}" in err or f"/{read}" in err
    assert "remedy:   Choose another output directory" in err
    assert snapshot(tmp_path) == before


def test_a_run_can_be_overwritten_by_its_own_recipe(finished, tmp_path, monkeypatch, capsys):
    """Which says that again: here the weights are all that is missing."""
    monkeypatch.chdir(tmp_path)
    command = (
        "finetune",
        "--recipe",
        finished.recipe,
        "--output",
        finished.path,
        "--overwrite",
        "--seq-len",
        8,
    )
    status, _, err = run(monkeypatch, capsys, *command)
    assert (status, "safetensors" in err) == (2, True), err


def test_data_of_which_no_row_is_left_are_an_error(place, tmp_path, monkeypatch, capsys):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "the quick", "completion": " brown fox"}\n')
    command = ("data", "--model", place / "llama", "--data", tmp_path / "rows.jsonl", "--seq-len", 4)
    for options, why in (((), "without a scored token"), (("--overlength", "drop"), "beyond --seq-len 4")):
        status, out, err = run(monkeypatch, capsys, *command, *options)
        assert (status, f"1 left out {why}" in out) == (2, True), out
        assert "The data must have a document" in err


@pytest.mark.parametrize("command", ["finetune", "evaluate", "generate"])
def test_texts_longer_than_the_model_has_seen_are_announced(command, place, tmp_path, monkeypatch, capsys):
    (tmp_path / "texts.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    own = {
        "finetune": ("--data", tmp_path / "texts.txt", "--seq-len", 130, "--output", tmp_path / "out"),
        "evaluate": ("--data", tmp_path / "texts.txt", "--seq-len", 130),
        "generate": ("--prompt", "it", "--max-new-tokens", 128),
    }
    with pytest.warns(UserWarning, match="the model has seen up to 128 tokens, and may get 130"):
        status, *_ = run(monkeypatch, capsys, command, "--model", place / "llama", *own[command])
    assert status == 2  # there are no weights


def test_new_tokens_that_nobody_counted_fit_the_models_positions(place, monkeypatch, capsys):
    require_flax("gpt2")
    command = ("generate", "--model", place / "gpt2", "--prompt")
    for options, said in (
        (("a" * 20,), "safetensors"),  # there are no weights
        (("a" * 20, "--chat", "--chat-template", place / "chat.jinja"), "safetensors"),
        (("a" * 33,), "Cut the rows to 32 tokens"),
        (("a" * 20, "--max-new-tokens", 13), "Ask for 12 new tokens at most"),
    ):
        status, _, err = run(monkeypatch, capsys, *command, *options)
        assert (status, said in err) == (2, True), err


@pytest.mark.usefixtures("weights")
def test_an_adapter_of_peft_that_does_not_fit_is_reported_and_not_the_weights(
    place, tmp_path, monkeypatch, capsys
):
    from safetensors.numpy import save_file

    prefix = "base_model.model.model.layers.5.self_attn.q_proj."
    leaves = {f"{prefix}lora_A.weight": np.ones((1, 16)), f"{prefix}lora_B.weight": np.ones((16, 1))}
    save_file(leaves, tmp_path / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    command = ("import-peft", "--model", place / "llama", "--adapter", tmp_path, "--output", tmp_path / "out")
    assert "linear layers of the model" in run(monkeypatch, capsys, *command)[2]
    assert "LoRA goes on as lora" in run(monkeypatch, capsys, *command, "--method", "dora")[2]


@pytest.mark.usefixtures("weights")
@pytest.mark.parametrize(
    ("model", "settings", "said"),
    [
        ("llama", {"remat": "some"}, "remat must be one of"),
        ("llama", {"dtype": jnp.int32}, "floating-point"),
        ("odd", {}, "even head_dim"),
        ("unknown", {}, "mamba"),
        ("gpt2", {"remat": "full"}, "Rematerialisation"),
        ("gpt2 unscaled", {}, "scale_attn_weights"),
    ],
)
def test_load_model_reports_the_config_before_the_weights(model, settings, said, place):
    require_flax(model)
    with pytest.raises(HyLoRADAError, match=said):
        load_model(place / model, **settings)


@pytest.mark.usefixtures("weights")
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_weights_are_reported_where_nothing_else_is_wrong(model, place):
    require_flax(model)
    with pytest.raises(ModelError, match=r"as \*.safetensors|safetensors file"):
        load_model(place / model)


def test_the_weights_of_a_hub_model_that_is_not_read_are_not_fetched(place, tmp_path, monkeypatch):
    import huggingface_hub

    def fetched(name, *, allow_patterns, **_):
        assert not any("safetensors" in pattern for pattern in allow_patterns)
        shutil.copy(place / "unknown" / "config.json", tmp_path)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    with pytest.raises(ModelError, match="mamba"):
        load_model("owner/model")


@pytest.mark.parametrize(
    ("model", "changes", "error"),
    [
        ("gpt2", {"seq_len": 33}, DataError),
        ("opt", {"seq_len": 33, "packing": False}, DataError),
        ("opt", {}, ConfigError),
        ("bert", {}, ModelError),
    ],
)
def test_the_trainer_refuses_before_it_looks_at_data_or_weights(model, changes, error, place, tmp_path):
    require_flax(model)
    settings = TrainingConfig(**{"output": tmp_path / "run", "steps": 1, "seq_len": 8} | changes)
    unread = types.SimpleNamespace(disabled=False, base=as_base(empty_model(place / model)))
    with pytest.raises(error):
        HyLoRADATrainer(unread, [], None, settings)  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("model", ["t5", "bloom"])
@pytest.mark.parametrize("method", ["hylorada", "hylorada_v2"])
def test_a_model_without_positions_is_refused_when_it_is_adapted(model, method, place):
    require_flax(model)
    settings = HyLoRADAConfig(method=method, daa_enabled=False, target_modules="all-linear")
    with pytest.raises(HyLoRADAError, match=r"called with input_ids|belong to one sequence"):
        HyLoRADAModel(empty_model(place / model), settings)


def test_an_empty_model_is_the_model_but_for_its_numbers(place):
    empty = empty_model(place / "llama", dtype=jnp.bfloat16, remat="dots")
    assert isinstance(empty, CausalLM)
    assert empty.module.remat == "dots"
    embedding = empty.params["model"]["embed_tokens"]["embedding"]
    assert (embedding.shape, embedding.dtype) == ((257, 16), jnp.bfloat16)
