import json
import math
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from hylorada_jax import cli
from hylorada_jax.models.causal_lm import param_shapes
from hylorada_jax.models.decoder_config import DecoderConfig
from hylorada_jax.models.loading import _slots

TINY = {
    "model_type": "llama",
    "vocab_size": 257,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
TINY |= {"intermediate_size": 24, "tie_word_embeddings": True, "max_position_embeddings": 128}
QWEN = {"model_type": "qwen2", "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14}
QWEN |= {
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model directory as a user has it: config, weights, and a tokenizer of bytes."""
    path = tmp_path_factory.mktemp("tiny")
    (path / "config.json").write_text(json.dumps(TINY))
    rng = np.random.default_rng(0)
    tensors = {}
    for leaf_path, leaf in jax.tree_util.tree_leaves_with_path(param_shapes(DecoderConfig.from_hf(TINY))):
        for name, slot in _slots(tuple(key.key for key in leaf_path), leaf.shape):
            shape = leaf.shape[1:] if slot.layer is not None else leaf.shape
            tensors[name] = rng.normal(0, 0.3, shape[::-1] if slot.transpose else shape).astype(np.float32)
    save_file(tensors, path / "model.safetensors")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([*alphabet, "<end>"])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    (path / "texts.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    return path


def run(monkeypatch, capsys, *arguments):
    """(exit status, what was printed, what was reported)."""
    monkeypatch.setattr(sys, "argv", ["hylorada", *map(str, arguments)])
    status: object = 0
    try:
        cli.main()
    except SystemExit as stop:
        status = stop.code or 0
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_finetune_then_evaluate_then_generate(tiny, tmp_path, monkeypatch, capsys):
    output, data = tmp_path / "run", tiny / "texts.txt"
    common = ("--model", tiny, "--data", data, "--seq-len", 32)
    train = (
        "finetune",
        *common,
        "--output",
        output,
        "--steps",
        6,
        "--batch-size",
        2,
        "--learning-rate",
        1e-2,
    )
    status, out, _ = run(monkeypatch, capsys, *train, "--prompt", "the")
    assert status == 0
    assert "trainable params" in out
    assert {path.name for path in output.iterdir()} >= {"adapter", "checkpoints", "metrics.jsonl", "loss.png"}

    plain, adapted = (
        json.loads(run(monkeypatch, capsys, "evaluate", *common, "--json", *adapter)[1])
        for adapter in ((), ("--adapter", output / "adapter"))
    )
    assert adapted["tokens"] == plain["tokens"]
    assert adapted["perplexity"] < plain["perplexity"]
    assert adapted["perplexity"] == pytest.approx(math.exp(adapted["loss"]))

    status, out, _ = run(
        monkeypatch,
        capsys,
        "generate",
        "--model",
        tiny,
        "--adapter",
        output / "adapter",
        "--prompt",
        "the",
        "--max-new-tokens",
        4,
    )
    assert status == 0
    assert out.startswith("the")

    # Nothing of a finished run is touched unasked.
    before = (output / "metrics.jsonl").read_bytes()
    status, _, err = run(monkeypatch, capsys, *train)
    assert status == 2
    assert "--resume" in err
    assert (output / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("method", "count"), [("lora", 540_672), ("dora", 1_130_496), ("hylorada_v1", 1_130_688)]
)
def test_params_counts_what_the_method_says_from_the_config_alone(
    method, count, tmp_path, monkeypatch, capsys
):
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    _, out, _ = run(
        monkeypatch, capsys, "params", "--model", tmp_path, "--method", method, "--rank", 8, "--json"
    )
    counted = json.loads(out)
    assert counted["trainable"] == count
    assert counted["base"] == 494_032_768  # Qwen2.5-0.5B's own count


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("params", "--model", "no/such/model/here"), "no/such/model/here"),
        (("params", "--targets", "q_prj"), "q_proj"),
        (("params", "--method", "hylorada_v2"), "structure"),
        (("params", "--rank", "0"), "lora_rank"),
        (("params", "--config", "absent.json"), "absent.json"),
        (("evaluate", "--data", "absent.txt"), "absent.txt"),
        (("evaluate", "--adapter", "absent"), "absent"),
        (("generate", "--prompt", ""), "token"),
        (("finetune", "--output", "x", "--data", "absent.txt"), "absent.txt"),
        (("finetune", "--output", "x", "--steps", "0"), "steps"),
    ],
)
def test_bad_input_ends_with_its_error_before_any_work(arguments, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hylorada_jax.models.loading.load_model", lambda *_, **__: pytest.fail("work began"))
    status, _, err = run(monkeypatch, capsys, *arguments)
    assert status == 2
    assert named in err
    assert "remedy" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["finetune", "evaluate", "generate", "params"])
def test_help_explains_every_option(command, monkeypatch, capsys):
    status, out, _ = run(monkeypatch, capsys, command, "--help")
    assert status == 0
    assert "--model" in out
