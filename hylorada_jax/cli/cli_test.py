import dataclasses
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import pytest
import tyro
from safetensors.numpy import load_file, save_file

from hylorada_jax.cli.adapter import AdapterOptions
from hylorada_jax.cli.answer_rows import answers, write
from hylorada_jax.cli.main import COMMANDS, main, unwrapped
from hylorada_jax.cli.prompts import chat_of, chats_of
from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.data.answered import answer_text
from hylorada_jax.data.examples import Conversation
from hylorada_jax.data.formats import read_row
from hylorada_jax.data.tokenization_test import byte_tokenizer
from hylorada_jax.errors import ConfigError, NonFiniteError
from hylorada_jax.models import generate as generation
from hylorada_jax.models.loading import load_model
from hylorada_jax.models.tokenizer import load_tokenizer
from hylorada_jax.saved import opening, saved_adapter
from hylorada_jax.saved.saved_adapter import open_adapter

QWEN = {"model_type": "qwen2", "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14}
QWEN |= {
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}


def run(monkeypatch, capsys, *arguments):
    """(exit status, what was printed, what was reported)."""
    monkeypatch.setattr(sys, "argv", ["hylorada", *map(str, arguments)])
    status: object = 0
    try:
        main()
    except SystemExit as stop:
        status = stop.code or 0
    printed = capsys.readouterr()
    return status, printed.out, printed.err


@pytest.mark.main_job
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
        "--eval-data",
        data,
    )
    status, out, _ = run(monkeypatch, capsys, *train, "--prompt", "the")
    assert status == 0
    assert "trainable params" in out
    assert {path.name for path in output.iterdir()} >= {"adapter", "checkpoints", "metrics.jsonl", "loss.png"}
    by_recipe = ("--recipe", output / "recipe.json", "--output", tmp_path / "repeated", "--prompt", "")
    status, out, _ = run(monkeypatch, capsys, "finetune", *by_recipe, "--eval-every", 2, "--keep", "best")
    assert status == 0
    printed = re.findall(r"^held-out perplexity  before (\S+)  after (\S+)$", out, re.MULTILINE)
    assert "\nkept     step 6 of 6, the best on the held-out data\nadapter  " in out  # it learns to the end
    weights = "adapter/adapter_model.safetensors"
    assert (tmp_path / "repeated" / weights).read_bytes() == (output / weights).read_bytes()

    plain, adapted = (
        json.loads(run(monkeypatch, capsys, "evaluate", *common, "--json", *adapter)[1])
        for adapter in ((), ("--adapter", output / "adapter"))
    )
    assert adapted["tokens"] == plain["tokens"]
    assert adapted["perplexity"] < plain["perplexity"]
    assert adapted["perplexity"] == pytest.approx(math.exp(adapted["loss"]))
    windows = ("--stride", 32, "--max-tokens", 8192, "--adapter", output / "adapter", "--json")
    of_the_run = json.loads(run(monkeypatch, capsys, "evaluate", *common, *windows)[1])
    assert printed[0][1] == f"{of_the_run['perplexity']:.3f}"  # README.md: finetune's windows

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

    # Merged, and by way of PEFT's files, it is the same model; from there it is trained on.
    merged, theirs, ours, again = (tmp_path / name for name in ("merged", "peft", "ours", "again"))
    taken = ("--adapter", output / "adapter", "--output")
    assert run(monkeypatch, capsys, "merge", *taken, merged)[0] == 0
    assert run(monkeypatch, capsys, "export-peft", *taken, theirs)[0] == 0
    back = ("import-peft", "--model", tiny, "--adapter", theirs, "--method", "hylorada_v1", "--output", ours)
    assert run(monkeypatch, capsys, *back)[0] == 0
    for where in (
        ("--model", merged, *common[2:]),
        (*common, "--adapter", ours),
    ):
        same = json.loads(run(monkeypatch, capsys, "evaluate", *where, "--json")[1])
        assert same["perplexity"] == pytest.approx(adapted["perplexity"], rel=1e-5)
    on = (*train[:5], *train[5:7], "--output", again, *train[9:], "--start-from", ours, "--prompt", "")
    with monkeypatch.context() as watched:
        opened = mock.Mock(wraps=open_adapter)
        for module in (saved_adapter, opening):
            watched.setattr(module, "open_adapter", opened)
        assert run(monkeypatch, capsys, *on)[0] == 0
    opened.assert_called_once_with(ours)
    first = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    second = [json.loads(line) for line in (again / "metrics.jsonl").read_text().splitlines()]
    assert second[0]["eval_loss"] == pytest.approx(first[-1]["eval_loss"], rel=1e-5)

    # What is there is not touched, and an adapter keeps its settings.
    for command in (("merge", *taken, merged), ("export-peft", *taken, theirs), back):
        assert run(monkeypatch, capsys, *command)[0] == 2
    status, _, err = run(monkeypatch, capsys, *on, "--overwrite", "--rank", 4)
    assert (status, "--rank" in err) == (2, True)


@pytest.mark.apart
def test_a_quantised_base_is_tuned_and_its_adapter_merged_into_it(tiny, tmp_path, monkeypatch, capsys):
    pytest.importorskip("qwix")
    common = ("--model", tiny, "--data", tiny / "texts.txt", "--seq-len", 32)
    train = (
        "finetune",
        *common,
        "--output",
        tmp_path / "run",
        "--steps",
        2,
        "--batch-size",
        2,
        "--prompt",
        "",
    )
    adapter = ("--adapter", tmp_path / "run" / "adapter", "--check-weights")
    assert run(monkeypatch, capsys, *train, "--method", "dora", "--base-dtype", "nf4")[0] == 0
    options = ("evaluate", *common, "--base-dtype", "nf4", *adapter, "--json")
    adapted = json.loads(run(monkeypatch, capsys, *options)[1])
    assert run(monkeypatch, capsys, "merge", *adapter, "--output", tmp_path / "merged")[0] == 0
    merged = ("evaluate", "--model", tmp_path / "merged", *common[2:], "--json")
    assert json.loads(run(monkeypatch, capsys, *merged)[1])["loss"] == pytest.approx(
        adapted["loss"], rel=1e-5
    )


def test_a_run_and_its_adapter_know_the_weights_they_were_trained_on(tiny, tmp_path, monkeypatch, capsys):
    model, output = tmp_path / "model", tmp_path / "lr=[1e-4,2e-4]" / "-run"
    shutil.copytree(tiny, model)
    common = ("--model", model, "--data", tiny / "texts.txt", "--seq-len", 32)
    train = ("finetune", *common, f"--output={output}/", "--steps", 2, "--batch-size", 2, "--prompt", "")
    adapter = ("--adapter", output / "adapter", "--check-weights")
    assert run(monkeypatch, capsys, *train)[0] == 0
    assert run(monkeypatch, capsys, *train, "--resume")[0] == 0
    evaluated = json.loads(run(monkeypatch, capsys, "evaluate", *common, *adapter, "--json")[1])
    assert run(monkeypatch, capsys, "merge", *adapter, "--output", tmp_path / "merged")[0] == 0

    status, _, err = run(monkeypatch, capsys, *train, "--resume", "--dtype", "bfloat16")
    assert (status, "base.dtype: float32 in" in err) == (2, True)
    status, _, err = run(monkeypatch, capsys, "evaluate", *common, *adapter, "--dtype", "bfloat16")
    assert (status, "dtype: adapter float32, model bfloat16" in err) == (2, True)
    status, _, err = run(monkeypatch, capsys, "evaluate", *common, "--check-weights")
    assert (status, "--adapter" in err) == (2, True)

    status, _, err = run(monkeypatch, capsys, "evaluate", *common, *adapter, "--base-dtype", "int8")
    assert (status, "dtype: adapter float32, model float32+int8" in err) == (2, True)

    # Other weights at the same path: nothing but their digest tells.
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1e-3
    save_file(tensors, model / "model.safetensors")
    for command in (
        (*train, "--resume"),
        ("evaluate", *common, *adapter),
        ("merge", *adapter, "--output", tmp_path / "other"),
    ):
        status, _, err = run(monkeypatch, capsys, *command)
        assert (status, "weights_sha256" in err) == (2, True)
    assert not (tmp_path / "other").exists()
    unchecked = json.loads(run(monkeypatch, capsys, "evaluate", *common, *adapter[:2], "--json")[1])
    assert unchecked["loss"] != evaluated["loss"]


# Runs one command after another. Before each, files become the first bytes of another; and where a limit is
# given, no file grows beyond it once the checkpoint of step 2 is there: the kernel refuses real writes.
CHILD = """
import json, resource, sys, time
from pathlib import Path
from hylorada_jax.cli.main import main
from hylorada_jax.training.report import MetricsLog

write = MetricsLog.write

def fill_disk(log, record):
    write(log, record)
    if limit and record["step"] == 3:
        while not Path(second).exists():
            time.sleep(0.01)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

MetricsLog.write = fill_disk
second, commands = json.loads(sys.argv[1])
for limit, cut, sys.argv in commands:
    for path, (source, length) in cut.items():
        content = Path(source).read_bytes()
        Path(path).write_bytes(content[:length])
    status = 0
    try:
        main()
    except SystemExit as stop:
        status = stop.code
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print("status", status, file=sys.stderr)
"""


@pytest.mark.main_job
def test_a_full_disk_and_damage_print_our_message_alone(tiny, tmp_path):
    """In a process of its own, for all that its threads and its end may write is captured."""
    output = tmp_path / "run"
    train = [
        *("hylorada", "finetune", "--model", str(tiny), "--data", str(tiny / "texts.txt"), "--seq-len", "32"),
        *("--steps", "4", "--batch-size", "2", "--checkpoint-every", "2", "--prompt", ""),
        *("--output", str(output)),
    ]
    resume = [*train, "--resume"]
    second, fourth = (str(output / "checkpoints" / f"{step}/state/manifest.ocdbt") for step in (2, 4))
    commands = [
        (2048, {}, train),
        (0, {}, resume),
        (0, {fourth: (second, 40), str(output / "metrics.jsonl"): (second, 0)}, resume),
        (0, {second: (second, 0), fourth: (second, 0)}, resume),
    ]
    found = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps([second, commands])],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        timeout=600,
    )
    assert found.returncode == 0, found.stderr
    # Without the progress bars.
    lines = [line for line in found.stderr.split("\n") if line.strip(" \x1b[A") and "%|" not in line]
    assert lines[0] == "error: A checkpoint must be written completely."
    assert lines[1].startswith("  received: ")
    assert "File too large" in lines[1]
    assert lines[2:4] == [
        "  remedy:   Free some space, then go on with resume (--resume) from the checkpoint of step 2 in "
        f"{output}/checkpoints.",
        "status 2",
    ]
    assert lines[4] == "status 0"
    assert lines[5].startswith("warning: the checkpoint of step 4 is damaged (")
    assert "going on from step 2" in lines[5]
    assert lines[6] == "status 0"
    assert found.stdout.count("before unknown  after ") == 1  # a log that was lost
    assert lines[7].startswith(f"error: One of the checkpoints in {output}/checkpoints must be readable")
    assert lines[8].startswith("  received: step 4: ")
    assert "; step 2: " in lines[8]
    assert "--overwrite" in lines[9]
    assert lines[10:] == ["status 2"]


@pytest.mark.parametrize(
    ("method", "count"),
    [("lora", 540_672), ("dora", 1_130_496), ("lorada", 1_082_016), ("hylorada_v1", 1_130_688)],
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


def counts(monkeypatch, capsys, *arguments):
    status, out, err = run(monkeypatch, capsys, "params", *arguments, "--json")
    assert status == 0, err
    return json.loads(out)


def test_every_component_can_be_switched_on_its_own(tiny, monkeypatch, capsys):
    def components(*arguments):
        return counts(monkeypatch, capsys, "--model", tiny, "--rank", 2, *arguments)["components"]

    d, layers, heads, buckets, vocab = 16, 2, 2, 64, 257
    linear = layers * (2 * 2 * (d + d))  # q and v
    assert components("--method", "lora") == {"linear": linear}
    assert components("--method", "lora", "--daa") == {"linear": linear, "daa": layers * 2 * heads}
    both = components("--method", "lora", "--daa", "--daa-position-bias")
    assert both["daa"] == layers * (2 + buckets) * heads
    # down, up and gate_scores of 128 units
    assert components("--method", "lora", "--sparse")["sparse"] == layers * (2 * 128 * d + 128)
    assert components("--method", "lora", "--train-embeddings")["unfrozen"] == vocab * d
    assert components("--method", "lora", "--train-norms")["unfrozen"] == (2 * layers + 1) * d
    assert components("--method", "lora", "--s2-attn") == {"linear": linear}
    assert components("--position-bias")["position_bias"] == buckets
    off = ("--no-s2-attn", "--no-train-embeddings", "--no-train-norms")
    assert components("--method", "longlora", *off) == {"linear": 2 * linear}  # q, k, v and o
    assert "position_bias" not in components("--method", "hylorada", "--no-position-bias")


def test_unfrozen_leaves_are_not_counted_as_frozen_too(tiny, monkeypatch, capsys):
    _, out, _ = run(monkeypatch, capsys, "params", "--model", tiny, "--method", "lora", "--train-embeddings")
    counted = counts(monkeypatch, capsys, "--model", tiny, "--method", "lora", "--train-embeddings")
    assert f"beside {counted['base'] - 257 * 16:,} frozen" in out


def test_the_scale_of_the_update_stays_where_only_the_rank_is_given(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(HyLoRADAConfig(method="dora", lora_rank=8, lora_alpha=12.0).to_json())
    recommended = HyLoRADAConfig.preset("recommended")
    assert AdapterOptions().build() == recommended
    assert AdapterOptions(rank=4).build() == dataclasses.replace(recommended, lora_rank=4, lora_alpha=8.0)
    assert AdapterOptions(method="lora").build() == HyLoRADAConfig(method="lora")
    assert AdapterOptions(preset="documented").build() == HyLoRADAConfig.preset("documented")
    with pytest.raises(ConfigError, match="--preset documented"):
        AdapterOptions(config=path, preset="documented").build()
    assert AdapterOptions(position_bias=True).build().method == "hylorada"
    assert AdapterOptions(lora_A_init="kaiming").build().lora_A_gain == 1
    started = AdapterOptions(lora_A_init="kaiming", lora_A_gain=0.5).build()
    assert started == dataclasses.replace(recommended, lora_A_init="kaiming", lora_A_gain=0.5)
    on_file = AdapterOptions(config=path, rank=4).build()
    assert on_file == HyLoRADAConfig(method="dora", lora_rank=4, lora_alpha=6.0)
    assert AdapterOptions(config=path, rank=4, alpha=1.0).build().lora_alpha == 1
    assert AdapterOptions(config=path, sparse=True).build() == dataclasses.replace(
        HyLoRADAConfig.load(path), sparse_enabled=True
    )


@pytest.mark.apart
def test_structure_of_code_goes_through_training_evaluation_and_generation(
    tiny, tmp_path, monkeypatch, capsys
):
    for number in range(6):
        (tmp_path / f"{number}.py").write_text(f"def f{number}(x):\n    return [x, {number}]\n" * 12)
    (tmp_path / "broken.py").write_text("def f(:\n  pass\n" * 12)
    data, output = tmp_path / "*.py", tmp_path / "run"
    with pytest.warns(UserWarning, match=r"structure: 1 of 7 documents do not parse.*broken\.py"):
        status, out, err = run(
            monkeypatch,
            capsys,
            *("finetune", "--model", tiny, "--data", data, "--eval-data", data, "--output", output),
            *("--method", "hylorada_v2", "--structure", "code", "--steps", 4, "--batch-size", 2),
            *("--seq-len", 32, "--learning-rate", 1e-2, "--prompt", "def f(x):"),
        )
    assert status == 0, err
    adapter = ("--model", tiny, "--adapter", output / "adapter")
    # The adapter reads what it was trained to read.
    losses = [
        json.loads(run(monkeypatch, capsys, "evaluate", *adapter, "--data", data, *more, "--json")[1])["loss"]
        for more in ((), ("--structure", "code"), ("--structure", "none"))
    ]
    assert losses[0] == losses[1] != losses[2]
    status, out, err = run(monkeypatch, capsys, "generate", *adapter, "--prompt", "def f(")
    assert status == 0, err
    assert out.startswith("def f(")
    further = tmp_path / "further"
    status, _, err = run(
        monkeypatch,
        capsys,
        *("finetune", "--model", tiny, "--data", tmp_path / "0.py", "--output", further, "--prompt", ""),
        *("--eval-data", data, "--start-from", output / "adapter", "--steps", 1, "--batch-size", 1),
        *("--seq-len", 32),
    )
    assert status == 0, err
    assert open_adapter(further / "adapter").structure == "code"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("params", "--model", "no/such/model/here"), "no/such/model/here"),
        (("params", "--targets", "q_prj"), "q_proj"),
        (("params", "--rank", "0"), "--rank must be"),
        (("params", "--config", "absent.json"), "absent.json"),
        (("evaluate", "--data", "absent.txt"), "absent.txt"),
        (("evaluate", "--adapter", "absent"), "absent"),
        (("generate", "--prompt", ""), "token"),
        (("finetune", "--output", "x", "--data", "absent.txt"), "absent.txt"),
        (("finetune", "--output", "x", "--steps", "0"), "steps"),
        (("finetune", "--output", "x", "--targets", "q_prj"), "q_proj"),
        (("finetune", "--output", "x", "--position-bias", "--method", "lora"), "hylorada"),
        (("finetune", "--output", "x", "--structure", "code"), "hylorada_v2"),
        (("evaluate", "--structure", "code"), "no adapter"),
        (("generate", "--prompt", "x", "--structure", "code"), "no adapter"),
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


def test_text_that_an_encoding_has_not_is_read_and_printed_all_the_same(tiny, monkeypatch, capfd):
    # What Python makes of the arguments "caf\xe9" and "\xf0\x9f\x98", which are not UTF-8.
    prompt = b"caf\xe9 \xf0\x9f\x98".decode(errors="surrogateescape")
    monkeypatch.setattr(sys, "argv", ["hylorada", "generate", "--model", str(tiny), "--prompt", prompt])
    with open(1, "w", encoding="ascii", closefd=False) as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        main()
    assert capfd.readouterr().out.startswith("caf\\")


@pytest.mark.filterwarnings("ignore:get_parser")
@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_option(command):
    parser = tyro.extras.get_parser(unwrapped(COMMANDS[command]))
    options = [option for group in parser._action_groups for option in group._group_actions]
    assert len(options) > 1
    for option in options:
        explanation = re.sub(r"\(default: .*|\(required\)", "", str(option.help))
        assert re.search("[a-z]{3}", explanation), option.option_strings
        # Of the options that have a value by default, --eval-tokens alone can be without.
        assert (
            "None" not in f"{option.metavar or ''} {option.help}" or "--eval-tokens" in option.option_strings
        )


def chats(number):
    return [
        {
            "messages": [
                {"role": "user", "content": f"say {word}"},
                {"role": "assistant", "content": f"{word}!"},
                {"role": "user", "content": "again"},
                {"role": "assistant", "content": word, "train": False},
            ]
        }
        for word in (f"w{n}" for n in range(number))
    ]


@pytest.fixture(scope="module")
def chats_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats(40)))
    return path


def test_conversations_are_shown_trained_on_and_evaluated_by_their_answers(
    chatting, chats_file, tmp_path, monkeypatch, capsys
):
    common = ("--model", chatting, "--data", chats_file, "--seq-len", 48)
    status, out, _ = run(monkeypatch, capsys, "data", *common, "--rows", 1)
    assert status == 0
    # The last turn is not to be trained on, and nothing comes after the other one's end. A byte is a token.
    scored = sum(len(f"w{n}!") + 1 for n in range(40))
    tokens = scored + sum(len(f"user: say w{n}\nassistant: ") + 1 for n in range(40))
    assert out.splitlines()[1] == f"rows     conversations: 40 rows, {tokens:,} tokens, {scored} scored"
    assert "user: say w0<end>\nassistant: ⟦w0!<end>⟧\n" in out.replace("\n\n", "\n") + "\n"
    train = ("finetune", *common, "--output", tmp_path / "run", "--steps", 12, "--learning-rate", 5e-2)
    status, out, err = run(monkeypatch, capsys, *train, "--batch-size", 4, "--prompt", "say w3")
    assert status == 0, err
    assert "train    conversations: " in out
    assert "say w3\n\n" in out
    assert "held-out perplexity of the answers  before " in out
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["score"] == "answers"
    plain, adapted = (
        json.loads(run(monkeypatch, capsys, "evaluate", *common, "--json", *adapter)[1])
        for adapter in ((), ("--adapter", tmp_path / "run" / "adapter"))
    )
    assert plain["tokens"] == adapted["tokens"] == scored
    assert adapted["perplexity"] < 0.7 * plain["perplexity"]


@pytest.mark.apart
@pytest.mark.parametrize("weights", [(), (0.7, 0.3)], ids=["one set", "mixed"])
def test_several_sources_are_counted_each_and_a_recipe_repeats_them(
    chatting, chats_file, tmp_path, monkeypatch, capsys, weights
):
    (tmp_path / "texts.csv").write_text("text\n" + "".join(f"some text of {n}\n" for n in range(30)))
    sources = [str(chats_file), str(tmp_path / "texts.csv")]
    given = (
        [f"{source}={weight}" for source, weight in zip(sources, weights, strict=True)]
        if weights
        else sources
    )
    options = ("--model", chatting, "--data", *given, "--seq-len", 48, "--batch-size", 4, "--prompt", "")
    run_of = ("finetune", *options, "--steps", 3, "--output", tmp_path / "run")
    status, out, err = run(monkeypatch, capsys, *run_of)
    assert status == 0, err
    said = [
        line.split(":")[0] for line in out.splitlines() if line[:8].strip() in ("data", "train", "held out")
    ]
    named = [f"data     {source}" for source in sources]
    if weights:
        named = [f"{line}, weight {weight}" for line, weight in zip(named, weights, strict=True)]
    sides = [[f"{side:<8} {form}" for side in ("train", "held out")] for form in ("conversations", "texts")]
    assert said == [named[0], *sides[0], named[1], *sides[1]]
    assert "held-out perplexity of the answers and texts  before " in out
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["data"] == given
    by_recipe = ("--recipe", tmp_path / "run" / "recipe.json", "--output", tmp_path / "again")
    assert run(monkeypatch, capsys, "finetune", *by_recipe)[0] == 0
    both = [tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("run", "again")]
    assert both[0].read_bytes() == both[1].read_bytes()
    status, out, err = run(monkeypatch, capsys, "data", "--model", chatting, "--data", *given, "--rows", 1)
    assert [line for line in out.splitlines() if line.startswith("data")] == named
    measured = run(monkeypatch, capsys, "evaluate", "--model", chatting, "--data", *sources, "--json")[1]
    alone = [
        run(monkeypatch, capsys, "evaluate", "--model", chatting, "--data", s, "--json")[1] for s in sources
    ]
    assert json.loads(measured)["tokens"] == sum(json.loads(each)["tokens"] for each in alone)


@pytest.mark.parametrize(
    ("row", "options", "said"),
    [
        ('{"messages": [{"role": "user"}]}', (), r"data\.jsonl:3: messages\[0\]: a message of user"),
        ("{", (), r"data\.jsonl:3: Expecting property name"),
        ('{"body": 1}', (), r"data\.jsonl:3: columns body"),
        ("", ("--format", "alpaca"), r"column instruction[\s\S]*data\.jsonl:1: columns messages"),
        ("", ("--columns", "content"), r"--columns content"),
        ("", ("--score", "first"), "invalid choice"),
        ("", ("--overlength", "error", "--seq-len", "8"), r"must fit into 8 tokens[\s\S]*data\.jsonl:\d+: "),
        ("", ("--overlength", "drop", "--seq-len", "8"), "must have a document"),
    ],
)
def test_a_bad_row_is_named_before_the_model_is_loaded(
    chatting, tmp_path, monkeypatch, capsys, row, options, said
):
    monkeypatch.setattr("hylorada_jax.models.loading.load_model", lambda *_, **__: pytest.fail("loaded"))
    lines = [json.dumps(chat) for chat in chats(6)]
    (tmp_path / "data.jsonl").write_text("\n".join([*lines[:2], row, *lines[2:]]))
    common = ("--model", chatting, "--data", tmp_path / "data.jsonl", "--output", tmp_path / "run")
    status, _, err = run(monkeypatch, capsys, "finetune", *common, *options)
    assert status == 2
    assert re.search(said, err)
    assert not (tmp_path / "run").exists()


def test_bad_rows_are_skipped_and_listed_where_that_is_asked_for(chatting, tmp_path, monkeypatch, capsys):
    refused = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b<end>c"}]}
    lines = ["{", json.dumps({"messages": []}), json.dumps(refused), *map(json.dumps, chats(5))]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    common = ("--model", chatting, "--data", tmp_path / "data.jsonl", "--skip-bad-rows")
    status, out, err = run(monkeypatch, capsys, "data", *common)
    assert status == 0
    assert [re.findall(r"data\.jsonl:(\d)", line) for line in err.splitlines()] == [["1"], ["2"], ["3"]]
    assert "conversations: 6 rows" in out


def test_what_was_answered_before_an_interrupt_is_in_the_file(tmp_path):
    output = tmp_path / "said.jsonl"
    asked = [Conversation("", [{"role": "user", "content": text}], [False]) for text in "abc"]
    asked[1] = asked[1]._replace(tools=[{"name": "f \ud83d"}], variables={"enable_thinking": False})
    turn = [{"role": "assistant", "content": "?"}, *asked[0].messages]
    asked[0] = asked[0]._replace(messages=asked[0].messages + turn, answers=[False] * 3)

    def answers():
        yield "A"
        yield "B"
        assert len(output.read_text().splitlines()) == 2  # while the third is awaited
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(asked, answers(), output)
    # What was asked, whole, with its answer.
    for chat, line, text in zip(asked, output.read_text().splitlines(), "AB", strict=False):
        said = [*chat.messages, {"role": "assistant", "content": text}]
        assert read_row(json.loads(line), "", "messages") == chat._replace(
            messages=said, answers=[*chat.answers, True]
        )


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", "utf-16"])
def test_answers_are_json_in_whatever_stdout_is_encoded(encoding, monkeypatch):
    written = io.BytesIO()
    stdout = io.TextIOWrapper(written, encoding=encoding, errors="backslashreplace")
    monkeypatch.setattr(sys, "stdout", stdout)
    write([Conversation("", [{"role": "user", "content": "é 😀"}], [False])], ["ü \ud83d"], None)
    stdout.flush()
    said = json.loads(written.getvalue().decode(encoding))["messages"]
    assert [message["content"] for message in said] == ["é 😀", "ü \ud83d"]


@pytest.mark.parametrize("before", [0, 1])
def test_a_file_of_answers_is_there_when_it_has_one(tmp_path, before):
    output = tmp_path / "said.jsonl"
    asked = [Conversation("", [{"role": "user", "content": text}], [False]) for text in "ab"]

    def answers():
        yield from ["A"] * before
        raise generation.not_finite("at new token 1 of prompt 1")

    with pytest.raises(NonFiniteError):
        write(asked, answers(), output)
    assert [*tmp_path.iterdir()] == [output] * before  # else the run that is corrected would be refused
    assert not before or len(output.read_text().splitlines()) == before


def test_each_of_several_conversations_has_its_structure():
    template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    tokenizer = dataclasses.replace(byte_tokenizer(), chat_template=template)
    texts = ("say w3", "```python\nif a:\n    b(c)\n```", "say w5")
    asked = [Conversation("", [{"role": "user", "content": text}], [False]) for text in texts]
    prompts, depths = chats_of(asked, tokenizer, "code")
    assert depths is not None
    assert [*zip(prompts, depths, strict=True)] == [chat_of(a.messages, tokenizer, "code") for a in asked]
    assert [max(some) for some in depths] == [0, 2, 0]

    generating = mock.Mock()
    generating.generate.side_effect = lambda some, **_: [[]] * len(some)
    settings = {"max_new_tokens": 1, "eos_token_id": None}
    inputs = {"structure_ids": depths}
    assert len([*answers(generating, prompts, inputs, tokenizer, 2, jax.random.key(0), **settings)]) == 3
    given = [call.kwargs["structure_ids"] for call in generating.generate.call_args_list]
    assert given == [depths[:2], [depths[2]] * 2]

    generating.generate.side_effect = [[[]] * 2, generation.not_finite("at new token 4 of prompt 1")]
    with pytest.raises(NonFiniteError, match=r"answers 3 to 3: .*new token 4 of prompt 1"):
        [*answers(generating, prompts, inputs, tokenizer, 2, jax.random.key(0), **settings)]


def test_a_last_batch_of_fewer_compiles_nothing_and_its_answers_are_the_same(chatting):
    model, tokenizer = load_model(chatting), load_tokenizer(chatting)
    prompts = [tokenizer.encode(f"say w{n}") for n in range(5)]
    key = jax.random.key(0)
    settings: dict[str, Any] = {"max_new_tokens": 8, "temperature": 1.0, "eos_token_id": None}
    expected = [
        answer_text(tokenizer, prompt, tokens, ())
        for first in (0, 2, 4)
        for prompt, tokens in zip(
            prompts[first : first + 2],
            model.generate(prompts[first : first + 2], rng=jax.random.fold_in(key, first), **settings),
            strict=True,
        )
    ]

    def programs():
        return generation._begin._cache_size(), generation._go_on._cache_size()  # type: ignore[attr-defined]

    for few in (1, 5):  # one alone is filled up with nothing
        jax.clear_caches()
        found = [*answers(model, prompts[:few], {}, tokenizer, 2, key, **settings)]
        assert programs() == (1, 1)
        assert found == expected[:few]
    assert len(set(expected)) == 5


def test_conversations_are_answered_row_by_row_as_one_alone(chatting, tmp_path, monkeypatch, capsys):
    rows = [{"messages": [{"role": "user", "content": f"say w{n}"}]} for n in (3, 12, 5)]
    rows[1]["messages"] += [{"role": "assistant", "content": "w12!"}]  # which is answered anew
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ("generate", "--model", chatting, "--max-new-tokens", 5)
    asked = (*command, "--messages", tmp_path / "asked.jsonl", "--batch-size", 2)
    assert run(monkeypatch, capsys, *asked, "--output", tmp_path / "said.jsonl")[0] == 0
    said = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    status, out, _ = run(monkeypatch, capsys, *asked)
    assert [json.loads(line) for line in out.splitlines()] == said
    for row, answered in zip(rows, said, strict=True):
        *before, last = answered["messages"]
        assert before == row["messages"][:1]
        prompt = before[0]["content"]
        assert last["content"] + "\n" == run(monkeypatch, capsys, *command, "--prompt", prompt, "--chat")[1]
    status, _, err = run(monkeypatch, capsys, *asked, "--output", tmp_path / "said.jsonl")
    assert (status, "not overwritten" in err) == (2, True)
    for wrong in (("--prompt", "a", "--messages", tmp_path / "asked.jsonl"), ()):
        assert "Either a prompt or messages" in run(monkeypatch, capsys, *command, *wrong)[2]
    status, _, err = run(monkeypatch, capsys, *command, "--messages", chatting / "texts.txt")
    assert (status, "texts.txt: a document" in err) == (2, True), err


def test_an_answer_has_the_room_of_one_in_a_chat_and_those_that_are_cut_are_counted(
    chatting, tmp_path, monkeypatch, capsys
):
    rows = [{"messages": [{"role": "user", "content": f"say w{n}"}]} for n in range(3)]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    room, ended = [], False

    def generate(prompts, *, max_new_tokens, eos_token_id, **_):
        room.append(max_new_tokens)
        answer = [97] * (max_new_tokens - 1)
        last = [*eos_token_id] if ended else [97]
        return [[*answer, *last], [*answer, *eos_token_id], answer[1:]][: len(prompts)]

    monkeypatch.setattr("hylorada_jax.cli.generate.loaded", lambda *_, **__: mock.Mock(generate=generate))
    asked, one = ("--messages", tmp_path / "asked.jsonl"), ("--prompt", "say w0")
    prompt = len("user: say w0_\nassistant: ")
    for seen in (4096, 128):  # the positions that the model has seen
        model = shutil.copytree(chatting, tmp_path / f"{seen}")
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": seen}))
        in_chat = min(1024, seen - prompt)
        for options, most, cut in (
            (asked, in_chat, "1 of 3"),
            ((*one, "--chat"), in_chat, "1 of 1"),
            ((*asked, "--max-new-tokens", 5), 5, "1 of 3"),
            (one, 64, ""),
        ):
            status, _, err = run(monkeypatch, capsys, "generate", "--model", model, *options)
            assert (status, room.pop()) == (0, most)
            lines = [line for line in err.splitlines() if line.startswith("cut: ")]
            said = f"cut: {cut} answers stopped at {most:,} tokens, before their end; --max-new-tokens"
            assert [line[: len(said)] for line in lines] == [said] * bool(cut)
    ended = True
    assert "cut: " not in run(monkeypatch, capsys, "generate", "--model", model, *asked)[2]
