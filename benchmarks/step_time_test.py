import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

from benchmarks import random_model, step_time  # noqa: E402
from benchmarks.contenders import in_jax  # noqa: E402
from benchmarks.contenders.roster import CONTENDERS, check  # noqa: E402
from benchmarks.contenders.setting import TARGETS, Setting  # noqa: E402
from benchmarks.step_time import BASELINE, NAMES, check_agreement, measure, ratios, summary, table  # noqa: E402
from hylorada_jax.errors import HyLoRADAError, ModelError  # noqa: E402

ROUNDS = 2
SHAPE = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The directory of a small random Llama."""
    directory = tmp_path_factory.mktemp("base") / "llama"
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).save_pretrained(directory)
    return str(directory)


def setting_of(model):
    return Setting(model, batch_size=2, seq_len=9, dtype="float32", steps=4, torch_threads=1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:'VariableState' was removed")  # of flax, which qwix still names
def test_every_contender_is_timed_at_the_same_model(llama):
    pytest.importorskip("qwix")
    record = measure(setting_of(llama), NAMES, ROUNDS, memory=False)
    found = record["contenders"]
    assert list(found) == list(NAMES) == list(CONTENDERS)
    assert {len(one["seconds"]) for one in found.values()} == {ROUNDS}
    assert all(second > 0 for one in found.values() for second in one["seconds"])
    first = found[BASELINE]["first_loss"]
    for one in found.values():
        assert one["first_loss"] == pytest.approx(first, rel=1e-4)
        assert one["last_loss"] < one["first_loss"]  # they train, each of them
    trainable = {name: one["trainable_parameters"] for name, one in found.items()}
    assert trainable["lora"] == trainable["peft lora"] == trainable["qwix lora"] > 0
    assert trainable["dora"] == trainable["peft dora"] > trainable["lora"]
    for name, one in found.items():
        compiled = not name.startswith("peft")
        assert (one["program_bytes"] is not None) is (one["compile_seconds"] is not None) is compiled
    assert found[BASELINE]["ratio_to_lora"] == found[BASELINE]["paired_ratio_to_lora"] == 1
    assert len(table(found).splitlines()) == 1 + len(NAMES)
    json.dumps(record, allow_nan=False)


@pytest.mark.slow
def test_all_layers_are_adapted_alike_under_remat_at_a_shape_of_random_weights(tmp_path):
    random_model.main("llama-3-8b", output=tmp_path / "base", shrink=64)
    own = 3, 6.0, TARGETS["all"], True
    setting = Setting(str(tmp_path / "base"), 1, 5, "float32", 3, 1, *own)
    found = measure(setting, ["lora", "peft lora"], 1, memory=False, peak_tflops=1e-6)["contenders"]
    # The widths of 8B, divided by 64, and one layer.
    d, kv, mlp, vocab = 64, 16, 224, 2004
    trained = 3 * (2 * (d + d) + 2 * (d + kv) + 3 * (d + mlp))
    assert {one["trainable_parameters"] for one in found.values()} == {trained}
    weights = 2 * vocab * d + 2 * d * (d + kv) + 3 * d * mlp + 3 * d
    for one in found.values():
        (seconds,) = one["seconds"]
        assert one["tokens_per_second"] == pytest.approx(5 / seconds)
        assert one["mfu"] == pytest.approx(4 * weights * 5 / seconds / 1e6)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_the_command_writes_what_it_measured(llama, tmp_path):
    script = Path(step_time.__file__)
    sizes = ["--batch-size", "1", "--seq-len", "5", "--rounds", "1", "--threads", "1"]
    chosen = ["--contenders", "peft lora", "--model", llama, "--output", tmp_path / "results"]
    run = subprocess.run(
        [sys.executable, script, *sizes, *chosen], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    (file,) = (tmp_path / "results").glob("step-time-*.json")
    record = json.loads(file.read_text())
    assert record["settings"]["torch_threads"] == 1
    assert {"jax", "torch", "peft"} <= set(record["environment"]["versions"])
    assert list(record["contenders"]) == ["peft lora"]
    one = record["contenders"]["peft lora"]
    assert "memory_error" not in one
    assert one["libraries_resident_bytes"] > 0
    assert one["peak_resident_bytes"] > 0
    assert "peft lora" in run.stdout


@pytest.mark.parametrize("seq_len", [256, 1024, 4096])
def test_the_page_has_the_table_of_the_recorded_run(seq_len):
    root = Path(step_time.__file__).parents[1]
    record = json.loads((root / f"benchmarks/results/step-time-{seq_len}-cpu.json").read_text())
    table_of_record = f"<!-- results:step-time-{seq_len} -->\n{ratios(record)}<!-- end -->"
    assert table_of_record in (root / "docs/results.md").read_text("utf-8")


def test_losses_that_differ_are_refused():
    check_agreement({"lora": 2.0, "dora": 2.00001, "peft lora": 2.0}, 1e-4)
    for other in (2.001, float("nan")):
        with pytest.raises(HyLoRADAError, match="peft lora"):
            check_agreement({"lora": 2.0, "dora": 2.0, "peft lora": other}, 1e-4)


def test_ratios_within_rounds_leave_out_what_slows_a_whole_round():
    own, other = {"seconds": [2.0, 20.0, 2.0, 2.0]}, {"seconds": [1.0, 10.0, 1.0, 1.0]}
    found = summary(own | {"cpu_seconds": [3.0] * 4}, other | {"cpu_seconds": [1.0] * 4})
    assert found["paired_ratio_to_lora"] == found["ratio_to_lora"] == 2
    assert found["paired_cpu_ratio_to_lora"] == 3
    assert summary({"seconds": [2.0], "cpu_seconds": [2.0]}, None) == {
        "median_seconds": 2.0,
        "iqr_seconds": 0.0,
        "ratio_to_lora": None,
        "paired_ratio_to_lora": None,
        "paired_cpu_ratio_to_lora": None,
    }


def test_a_table_shows_between_which_ratios_the_rounds_were():
    assert step_time._between([2.0, 9.0, 4.0], [1.0, 3.0, 8.0]) == " [0.50, 3.00]"


def test_bad_input_is_refused_before_a_model_is_loaded(llama, monkeypatch, tmp_path):
    monkeypatch.setattr(in_jax, "load_model", None)
    with pytest.raises(HyLoRADAError, match=r"qwix lora.*\n.*loha"):
        check(["lora", "loha"], setting_of(llama), ROUNDS)
    for names in ([], ["lora", "lora"]):
        with pytest.raises(HyLoRADAError, match="each once"):
            check(names, setting_of(llama), ROUNDS)
    with pytest.raises(HyLoRADAError, match="rounds=0"):
        check(["lora"], setting_of(llama), 0)
    with pytest.raises(ModelError):
        check(["lora"], setting_of(str(tmp_path / "nowhere")), ROUNDS)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelError, match="gpt2"):
        check(["lora"], setting_of(str(tmp_path)), ROUNDS)

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "qwix" else found(name))
    check(["lora"], setting_of(llama), ROUNDS)
    with pytest.raises(HyLoRADAError, match=r"no package qwix\n.*pip install"):
        check(NAMES, setting_of(llama), ROUNDS)
