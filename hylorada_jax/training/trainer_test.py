"""Oracle of every interrupted run: the run that was never interrupted, bit for bit."""

import contextlib
import dataclasses
import errno
import itertools
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import multihost_utils

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.data.document import TokenizedDocument, as_documents
from hylorada_jax.data.mixture import Mixture
from hylorada_jax.data.packing import Rows
from hylorada_jax.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from hylorada_jax.evaluation import sweep as sweep_module
from hylorada_jax.evaluation.perplexity import evaluate_perplexity
from hylorada_jax.io import files
from hylorada_jax.io.files import any_path, temporary_name, write_whole
from hylorada_jax.io.files_test import NAMES
from hylorada_jax.model import HyLoRADAModel
from hylorada_jax.models.causal_lm import CausalLM
from hylorada_jax.models.decoder import DecoderLM
from hylorada_jax.models.decoder_config import DecoderConfig
from hylorada_jax.placement.shards import shard_rows
from hylorada_jax.saved import adapter_files
from hylorada_jax.training import loop as loop_module
from hylorada_jax.training import report
from hylorada_jax.training import trainer as trainer_module
from hylorada_jax.training.checkpoint import Checkpoints
from hylorada_jax.training.checks import check_data
from hylorada_jax.training.config import TrainingConfig
from hylorada_jax.training.optimizer import schedule
from hylorada_jax.training.report import MetricsLog, Speed, read_metrics
from hylorada_jax.training.step import make_train_step
from hylorada_jax.training.trainer import HyLoRADATrainer

STEPS = 6


def tiny_model(seed=0, method="hylorada_v1"):
    hf = {
        "model_type": "llama", "vocab_size": 29, "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 1, "num_attention_heads": 2, "tie_word_embeddings": True,
        "initializer_range": 0.3,
    }  # fmt: skip
    config = HyLoRADAConfig(
        method=method,
        lora_rank=2,
        lora_dropout=0.1,
        lora_plus_enabled=True,
        target_modules=("v_proj", "down_proj"),
    )
    base = CausalLM.from_config(DecoderConfig.from_hf(hf), jax.random.key(0))
    return HyLoRADAModel(base, config, seed)


def texts(seed=0, count=30):
    """Documents that count modulo 29: something to learn."""
    rng = np.random.default_rng(seed)
    return [np.arange(first, first + n) % 29 for first, n in rng.integers(5, 40, (count, 2))]


def settings(directory, **changes):
    defaults = {
        "output": directory, "steps": STEPS, "batch_size": 4, "microbatches": 2, "seq_len": 16,
        "learning_rate": 1e-2, "checkpoint_every": 2, "eval_every": 3,
    }  # fmt: skip
    return TrainingConfig(**defaults | changes)


def train(directory, model=None, train_data=None, eval_data=None, **changes):
    model, eval_data = model or tiny_model(), eval_data or texts(1, 4)
    trainer = HyLoRADATrainer(model, train_data or texts(), eval_data, settings(directory, **changes))
    return model, trainer.train()


def numbers(records):
    """What must be equal in two runs: everything but the speed."""
    return [{name: value for name, value in r.items() if name != "tokens_per_second"} for r in records]


def assert_same_run(directory, model, reference):
    expected_directory, expected_model, _ = reference
    jax.tree.map(np.testing.assert_array_equal, model.adapters, expected_model.adapters)
    metrics = "metrics.jsonl"
    assert numbers(read_metrics(directory / metrics)) == numbers(read_metrics(expected_directory / metrics))
    weights = Path("adapter") / "adapter_model.safetensors"
    assert (directory / weights).read_bytes() == (expected_directory / weights).read_bytes()


@pytest.fixture(scope="module", autouse=True)
def compilation_cache(tmp_path_factory):
    """All runs here are one program: compile it once, also for child processes."""
    directory = str(tmp_path_factory.mktemp("compiled"))
    values = {"jax_compilation_cache_dir": directory, "jax_persistent_cache_min_compile_time_secs": 0.2}
    before = {name: getattr(jax.config, name) for name in values}
    for name, value in values.items():
        jax.config.update(name, value)
    yield {name.upper(): str(value) for name, value in values.items()}
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A run that nothing disturbs."""
    directory = tmp_path_factory.mktemp("reference") / "run"
    return directory, *train(directory)


def test_the_speed_is_of_training_alone_and_not_of_compiling_and_saving(tmp_path, monkeypatch):
    now, seconds = [0.0], itertools.chain([100.0], itertools.repeat(1.0))
    monkeypatch.setattr(report.time, "perf_counter", lambda: now[0])
    trainer = HyLoRADATrainer(
        tiny_model(), texts(), None, settings(tmp_path / "run", steps=8, checkpoint_every=4, eval_every=None)
    )
    step, save = trainer.choice.step, Checkpoints.save

    def timed_step(*given):
        now[0] += next(seconds)
        return step(*given)

    def timed_save(*given, **more):
        now[0] += 50.0
        return save(*given, **more)

    trainer.choice = trainer.choice._replace(step=timed_step)
    monkeypatch.setattr(Checkpoints, "save", timed_save)
    trainer.train()
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    tokens = 4 * 16  # of a step, which takes a second
    speeds = {record["step"]: record["tokens_per_second"] for record in records}
    assert speeds[1] < tokens / 50
    # A step is looked at when the next has been begun, and the last before a save at once.
    assert [speeds[2], speeds[8]] == pytest.approx([tokens, tokens], rel=0.1)


def test_epochs_pass_over_the_rows(tmp_path):
    data = texts(count=6)
    rows = len(Rows(as_documents(data, 29, "training", has_encoder=False), 16))
    _, result = train(tmp_path / "run", train_data=data, epochs=2, eval_every=None)
    assert result.steps == len(result.losses) == -(-2 * rows // 4)


def test_of_a_mixture_that_is_held_out_all_counts():
    both = Mixture([(texts(), 3), (texts(1, 4), 1)])
    _, held_out = check_data(both, both, 29, HyLoRADAConfig(method="lora"), settings("run"))
    assert held_out is not None
    for document, ids in zip(held_out, texts() + texts(1, 4), strict=True):
        np.testing.assert_array_equal(document.tokens, ids)


def test_a_mixture_goes_on_with_the_same_bits_and_is_a_run_of_its_own(tmp_path, monkeypatch):
    sources = texts(count=9), texts(2, count=12)
    rows = [len(Rows(as_documents(data, 29, "training", has_encoder=False), 16)) for data in sources]

    def mixture(*weights):
        return Mixture([*zip(sources, weights, strict=True)])

    settings = {"train_data": mixture(3, 1), "epochs": 1, "eval_every": None, "checkpoint_every": 1}
    model, result = train(tmp_path / "whole", **settings)
    # Until the first source is used up, which with these weights is the first.
    assert rows[1] > rows[0] / 3
    assert result.steps == -(-(rows[0] * 4 // 3) // 4) > 2
    with dying_after(2, monkeypatch):
        train(tmp_path / "run", **settings)
    for other in (mixture(1, 1), sources[0] + sources[1]):
        with pytest.raises(CheckpointError, match=r"shares: \[\[9, 3\], \[12, 1\]\] in"):
            train(tmp_path / "run", resume=True, **settings | {"train_data": other, "epochs": None})
    again, _ = train(tmp_path / "run", resume=True, **settings)
    assert_same_run(tmp_path / "run", again, (tmp_path / "whole", model, result))


@pytest.mark.apart
def test_speed_counts_what_is_computed_and_not_what_is_scored(tmp_path, monkeypatch):
    counted: list[int] = []

    def add(self, tokens):
        counted.append(tokens)
        return 1.0

    monkeypatch.setattr(Speed, "add", add)
    data = [np.arange(16) % 29 for _ in range(8)]  # a row each, but for the last token, which follows
    half = [TokenizedDocument(ids, scored=np.arange(16) % 2 == 0) for ids in data]
    for name, documents in (("all", data), ("half", half)):
        _, result = train(tmp_path / name, train_data=documents, steps=2, eval_every=None)
        tokens = [record["tokens"] for record in read_metrics(result.metrics) if "loss" in record]
        assert tokens == ([60, 60] if name == "all" else [28, 28])
    assert counted == [60] * 4


def test_a_run_learns_and_leaves_its_files(reference):
    directory, model, result = reference
    assert result.perplexity_after < 0.9 * result.perplexity_before
    records = read_metrics(result.metrics)
    assert [r["step"] for r in records if "loss" in r] == list(range(1, STEPS + 1))
    assert [r["step"] for r in records if "eval_loss" in r] == [0, 3, STEPS]
    assert result.losses == [r["loss"] for r in records if "loss" in r]
    assert all(r["tokens_per_second"] > 0 for r in records if "loss" in r)
    assert Checkpoints(directory / "checkpoints", 3).steps == [2, 4, 6]
    assert result.loss_plot.read_bytes().startswith(b"\x89PNG")
    loaded = HyLoRADAModel.from_pretrained(model.base, result.adapter)
    jax.tree.map(np.testing.assert_array_equal, loaded.adapters, model.adapters)


def test_a_run_logs_measures_and_orders_its_rows_as_its_settings_say(tmp_path, reference):
    model, held_out = tiny_model(), texts(1, 4)
    # The adapters do nothing yet.
    at_first = evaluate_perplexity(model.base, held_out, seq_len=16, stride=5, max_tokens=40, batch_size=2)
    _, result = train(
        tmp_path / "run",
        model,
        eval_data=held_out,
        seed=1,
        steps=5,
        warmup_steps=1,
        log_every=2,
        eval_every=None,
        eval_stride=5,
        eval_tokens=40,
    )
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    rates = {record["step"]: record["learning_rate"] for record in records if "loss" in record}
    assert rates == pytest.approx({2: 1e-2, 4: 0.5e-2, 5: 0.25e-2})  # 0 in the first step, and before a sixth
    measured = next(record for record in records if "eval_loss" in record)
    assert measured["eval_tokens"] == at_first.tokens
    assert measured["eval_loss"] == pytest.approx(at_first.loss, rel=1e-5)
    assert result.losses[0] != reference[-1].losses[0]  # of other rows


def test_the_seed_decides_what_is_dropped(tmp_path):
    """Equal rows have no order, and before the first step adapters do nothing that could be dropped."""
    changes = {"train_data": [np.arange(17)] * 8, "steps": 2, "warmup_steps": 0}
    one, other = (train(tmp_path / f"{seed}", seed=seed, **changes)[1].losses for seed in (0, 1))
    assert one[0] == other[0]
    assert one[1] != other[1]


@pytest.mark.apart
def test_progress_is_shown_or_not_and_changes_nothing(tmp_path, reference, capsys):
    model, _ = train(tmp_path / "quiet", progress=False)
    assert capsys.readouterr() == ("", "")
    assert_same_run(tmp_path / "quiet", model, reference)
    train(tmp_path / "shown", steps=2)
    shown = capsys.readouterr()
    assert "training: 100%" in shown.err
    assert shown.out.count("held-out perplexity") == 2


def test_perplexities_are_those_of_the_models_before_and_after(reference):
    _, model, result = reference
    for evaluated, found in ((tiny_model(), result.perplexity_before), (model, result.perplexity_after)):
        expected = evaluate_perplexity(evaluated, texts(1, 4), seq_len=16, stride=16, batch_size=4)
        assert found == pytest.approx(
            expected.perplexity, rel=1e-6
        )  # float32 sums in batches of another size


def test_the_best_adapter_is_the_one_of_the_least_loss_in_the_log(tmp_path):
    changes = {"learning_rate": 2.0, "schedule": "constant", "steps": 6, "eval_every": 1}
    model, result = train(tmp_path / "run", keep="best", **changes)
    losses = [r["eval_loss"] for r in read_metrics(result.metrics) if "eval_loss" in r]
    assert 0 < result.kept == np.argmin(losses) < result.steps == 6
    saved = HyLoRADAModel.from_pretrained(model.base, result.adapter)
    jax.tree.map(np.testing.assert_array_equal, saved.adapters, model.adapters)
    found = evaluate_perplexity(saved, texts(1, 4), seq_len=16, stride=16, batch_size=2)
    assert found.loss == pytest.approx(min(losses), rel=1e-6)  # float32, compiled another time
    assert result.perplexity_after == math.exp(min(losses))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_saves_and_resume_ends_bit_equal(number, tmp_path, reference, monkeypatch):
    write, handler = MetricsLog.write, signal.getsignal(number)

    def interrupt_once(log, record):
        write(log, record)
        if record["step"] == 3 and "loss" in record:
            monkeypatch.setattr(MetricsLog, "write", write)
            os.kill(os.getpid(), number)

    monkeypatch.setattr(MetricsLog, "write", interrupt_once)
    with pytest.raises(KeyboardInterrupt, match=r"step 3 is saved .* resume"):
        train(tmp_path / "run")
    assert signal.getsignal(number) is handler
    assert (tmp_path / "run" / "checkpoints" / "3").exists()  # not a step that is due
    # A notice of preemption that came before the first step is met at jax's first number.
    with monkeypatch.context() as early:
        early.setattr(multihost_utils, "reached_preemption_sync_point", lambda number: number == 1)
        with pytest.raises(KeyboardInterrupt, match=r"step 4 is saved .* resume"):
            train(tmp_path / "run", resume=True)
    model, _ = train(tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", model, reference)


def test_an_interrupt_in_the_last_step_is_raised_when_the_run_is_saved(tmp_path, reference, monkeypatch):
    """So that a sweep over runs ends, too."""
    write, model = MetricsLog.write, tiny_model()

    def interrupt(log, record):
        write(log, record)
        if record["step"] == STEPS and "loss" in record:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(MetricsLog, "write", interrupt)
    with pytest.raises(KeyboardInterrupt, match="the run has ended"):
        train(tmp_path / "run", model)
    assert_same_run(tmp_path / "run", model, reference)


def test_a_run_goes_on_in_other_microbatches(tmp_path, reference, monkeypatch):
    with dying_after(5, monkeypatch):
        train(tmp_path / "run")
    with pytest.warns(UserWarning, match="microbatches 2, now 4"):
        _, result = train(tmp_path / "run", resume=True, microbatches=4)
    assert result.losses == pytest.approx(reference[2].losses, rel=1e-5)  # float32, summed in another order


def test_resuming_a_finished_run_changes_nothing(tmp_path, reference):
    directory, _, result = reference
    model, again = train(directory, resume=True)
    assert_same_run(directory, model, reference)
    assert (again.perplexity_before, again.perplexity_after, again.losses) == (
        result.perplexity_before,
        result.perplexity_after,
        result.losses,
    )


@contextlib.contextmanager
def dying_after(batches, monkeypatch):
    """Within it, a run ends with an error when it asks for one batch more."""
    left = iter(range(batches))

    def shard_or_die(batch):
        if next(left, None) is None:
            raise RuntimeError("killed")
        return shard_rows(batch)

    with monkeypatch.context() as patched:
        patched.setattr(loop_module, "shard_rows", shard_or_die)
        with pytest.raises(RuntimeError, match="killed"):
            yield


def test_a_run_in_a_bucket_goes_on_from_the_newest_checkpoint_that_is_complete(
    bucket, reference, monkeypatch
):
    place = any_path("gs://bucket/trained")
    with monkeypatch.context() as killed:
        killed.setattr(report._Rewriting, "close", lambda _: None)  # a kill writes nothing more
        with dying_after(5, monkeypatch):
            train(place)
    del bucket.objects["trained/checkpoints/4/commit_success.txt"]
    model, result = train("gs://bucket/trained", resume=True)
    assert_same_run(place, model, reference)
    assert str(result.loss_plot) == "gs://bucket/trained/loss.png"
    assert Checkpoints(place / "checkpoints", 3).steps == [2, 4, 6]
    loaded = HyLoRADAModel.from_pretrained(model.base, "gs://bucket/trained/adapter")
    jax.tree.map(np.testing.assert_array_equal, loaded.adapters, model.adapters)


# capsys keeps what is printed in memory: pytest's own file would be full too.
@pytest.mark.usefixtures("capsys")
def test_a_full_disk_names_the_last_good_checkpoint_and_resume_ends_bit_equal(
    tmp_path, reference, monkeypatch
):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    write = MetricsLog.write

    def fill_disk(log, record):
        write(log, record)
        if record["step"] == 3:
            while not (tmp_path / "run" / "checkpoints" / "2").exists():  # still being written
                time.sleep(0.01)
            # The kernel refuses every further growth of a file: a real failed write.
            resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))

    monkeypatch.setattr(MetricsLog, "write", fill_disk)
    try:
        with pytest.raises(CheckpointError, match="checkpoint of step 2"):
            train(tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    monkeypatch.setattr(MetricsLog, "write", write)
    model, _ = train(tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", model, reference)


@pytest.mark.parametrize(
    "place", ["before", "after"]
)  # of the step: a NaN in its loss, or only in its update
def test_a_non_finite_state_stops_with_step_batch_and_checkpoint(tmp_path, monkeypatch, place):
    def poisoned(*arguments):
        step = make_train_step(*arguments)

        def poison(state, at):
            return state._replace(adapters=jax.tree.map(lambda x: x * np.nan if at else x, state.adapters))

        def poisoned_step(state, frozen, batch):
            third = int(state.step) == 2
            state, metrics = step(poison(state, third and place == "before"), frozen, batch)
            state = poison(state, third and place == "after")
            return state, metrics | {"adapter_norm": optax.tree.norm(state.adapters)}

        return poisoned_step

    monkeypatch.setattr(trainer_module, "make_train_step", poisoned)
    model = tiny_model()
    initial = jax.tree.map(np.array, model.adapters)
    with pytest.raises(NonFiniteError) as error:
        train(tmp_path / "run", model, checkpoint_every=1)
    message = str(error.value)
    assert "at step 3" in message
    assert "the checkpoint of step 2" in message
    assert Checkpoints(tmp_path / "run" / "checkpoints", 3).steps == [1, 2]
    jax.tree.map(np.testing.assert_array_equal, model.adapters, initial)
    batch = np.load(tmp_path / "run" / "nonfinite_batch.npz")
    assert batch["input_ids"].shape == (4, 16)
    assert str(batch["row"].tolist()) in message
    assert not (tmp_path / "run" / "adapter").exists()
    with pytest.raises(CheckpointError, match=r"learning_rate: 0\.01 [\s\S]*in another directory\.$"):
        train(tmp_path / "run", resume=True, learning_rate=1e-3)


def test_an_evaluation_that_is_not_finite_names_its_documents_and_its_step(tmp_path, monkeypatch):
    losses = sweep_module.score
    monkeypatch.setattr(sweep_module, "score", lambda *inputs: losses(*inputs) * np.nan)
    with pytest.raises(
        NonFiniteError, match=r"in document 1, 2, in the evaluation after step 0[\s\S]*no checkpoint yet"
    ):
        train(tmp_path / "run")


def test_any_name_keeps_a_run_that_goes_on_from_the_older_checkpoint_when_the_newest_is_cut(
    tmp_path, reference, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    name = NAMES["pattern"] + NAMES["signs"]
    directory = Path(name, "..", name, "run")
    Path(name).mkdir()
    with dying_after(4, monkeypatch):
        train(directory, checkpoint_every=1)
    for path in (directory / "checkpoints" / "4").rglob("*"):
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)
    with pytest.warns(UserWarning, match=r"step 4 is damaged .* going on from step 3"):
        model, _ = train(f"{directory}/", resume=True)
    assert_same_run(directory, model, reference)
    assert (tmp_path / name / "run" / "checkpoints" / "6").exists()
    loaded = HyLoRADAModel.from_pretrained(model.base, directory / "adapter")
    jax.tree.map(np.testing.assert_array_equal, loaded.adapters, model.adapters)


@pytest.mark.parametrize("file", ["run.json", "metrics.jsonl", "adapter_model.safetensors"])
def test_a_full_disk_at_any_file_is_an_error_and_resume_ends_bit_equal(
    tmp_path, reference, monkeypatch, file
):
    def write_unless(path, content):
        if path.name == file:
            path.with_name(temporary_name()).write_bytes(content[:9])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write_whole(path, content)

    def write_all_unless(contents):
        for path, content in contents.items():
            write_unless(path, content)

    with monkeypatch.context() as full:
        for module in (files, report):
            full.setattr(module, "write_whole", write_unless)
        full.setattr(adapter_files, "write_all", write_all_unless)
        with pytest.raises(CheckpointError, match="No space left on device"):
            train(tmp_path / "run")
    assert not (tmp_path / "run" / file).exists()
    model, _ = train(tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", model, reference)


def test_a_run_is_not_overwritten_unasked_and_only_its_own_files_are_deleted(tmp_path, reference):
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "notes.txt").write_text("mine")
    model = tiny_model()
    trainer = HyLoRADATrainer(model, texts(), texts(1, 4), settings(directory, overwrite=True))
    trainer.train()
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=r"--resume.*--overwrite"):
        HyLoRADATrainer(tiny_model(), texts(), None, settings(directory))
    assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before
    trainer.train()  # from the adapters that it was made with
    assert_same_run(directory, model, reference)
    assert (directory / "notes.txt").read_text() == "mine"


def test_while_a_run_trains_no_other_trainer_gets_its_directory(tmp_path, reference, monkeypatch):
    directory, write = tmp_path / "run", MetricsLog.write
    late = HyLoRADATrainer(tiny_model(), texts(), texts(1, 4), settings(directory, overwrite=True))

    def coming_too(log, record):
        monkeypatch.setattr(MetricsLog, "write", write)
        for how in ({"resume": True}, {"overwrite": True}, {}):
            with pytest.raises(CheckpointError, match="one trainer at a time"):
                train(directory, **how)
        with pytest.raises(CheckpointError, match="one trainer at a time"):
            late.train()
        write(log, record)

    monkeypatch.setattr(MetricsLog, "write", coming_too)
    model, _ = train(directory)
    assert MetricsLog.write is write
    assert_same_run(directory, model, reference)
    late.train()


def test_output_that_nobody_reads_is_no_fault_of_the_directory(tmp_path, reference, monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    closed = os.fdopen(writing, "w", buffering=1)
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", closed)
        with pytest.raises(BrokenPipeError):
            train(tmp_path / "run")
    with contextlib.suppress(BrokenPipeError):
        closed.close()
    model, _ = train(tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", model, reference)


def test_another_run_is_not_resumed_and_both_sides_are_named(reference):
    directory, _, _ = reference
    trainer = HyLoRADATrainer(tiny_model(), texts(7), texts(1, 4), settings(directory, resume=True, seed=3))
    with pytest.raises(CheckpointError) as error:
        trainer.train()
    assert "training.seed: 0 in" in str(error.value)
    assert "3 now" in str(error.value)
    assert "train_data" in str(error.value)
    assert "this one's adapter" in str(error.value)


def other_bit(model):
    """The model with the last bit of one weight flipped."""
    embedding = np.array(model.base.params["model"]["embed_tokens"]["embedding"])
    embedding.view(np.uint32)[3, 5] ^= 1
    params = {**model.base.params["model"], "embed_tokens": {"embedding": jnp.asarray(embedding)}}
    return HyLoRADAModel(model.base.with_params({"model": params}), model.config)


def in_bfloat16(model):
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.base.params)
    return HyLoRADAModel(model.base.with_params(params), model.config)


def of_another_config(model):
    config = dataclasses.replace(model.base.config, rope_theta=5e5)
    base = CausalLM(DecoderLM(config), model.base.params, config, model.base.name)
    return HyLoRADAModel(base, model.config)


def started_elsewhere(model):
    model.adapters = jax.tree.map(lambda leaf: leaf + 1, model.adapters)
    return model


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (other_bit, "base.weights_sha256"),
        (in_bfloat16, "base.dtype: float32 in .*bfloat16 now"),
        (of_another_config, "base.config_sha256"),
        (lambda model: tiny_model(seed=1), "adapters before the first step: seed 0 in .*seed 1 now"),
        (started_elsewhere, "adapters before the first step: seed 0 in .*now"),
        (lambda model: tiny_model(method="dora"), "adapter.method"),
    ],
)
def test_what_changes_the_numbers_is_another_run(reference, change, named):
    directory, _, _ = reference
    trainer = HyLoRADATrainer(change(tiny_model()), texts(), texts(1, 4), settings(directory, resume=True))
    with pytest.raises(CheckpointError, match=named):
        trainer.train()


def test_jaxs_own_settings_are_part_of_what_a_run_is(reference):
    directory, _, _ = reference
    with jax.default_matmul_precision("highest"):
        trainer = HyLoRADATrainer(tiny_model(), texts(), texts(1, 4), settings(directory, resume=True))
        with pytest.raises(CheckpointError, match=r"matmul_precision: None in .*highest now"):
            trainer.train()


def test_a_run_of_an_older_version_is_resumed_where_what_it_did_not_know_is_off(reference):
    place = reference[0] / "run.json"
    content = place.read_text()
    record = json.loads(content)
    del record["identity"]["training"]["schedule"], record["identity"]["adapter"]["lora_A_gain"], record["id"]
    place.write_text(json.dumps(record))
    train(reference[0], resume=True)
    with pytest.raises(CheckpointError, match=r"training.schedule: linear in .*cosine now"):
        train(reference[0], resume=True, schedule="cosine")
    place.write_text(content)


def test_the_same_weights_under_another_name_are_the_same_run(tmp_path, reference):
    model = tiny_model()
    moved = HyLoRADAModel(dataclasses.replace(model.base, name="moved/model"), model.config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(reference[0], moved, resume=True)


def document_of(tokens, kinds):
    return TokenizedDocument(tokens, structure_ids=kinds and tokens % kinds)


def test_structure_ids_train_and_are_part_of_what_a_run_is(tmp_path):
    def run(directory, structure, **changes):
        model = tiny_model(method="hylorada_v2")
        train_data = [document_of(tokens, structure and 3) for tokens in texts()]
        eval_data = [document_of(tokens, structure) for tokens in texts(1, 4)]
        trainer = HyLoRADATrainer(model, train_data, eval_data, settings(directory, **changes))
        return trainer.train(), model.adapters["structure_encoder"]["structure_embeddings"]

    with_ids, trained = run(tmp_path / "a", 3)
    without, untouched = run(tmp_path / "b", None)
    assert with_ids.losses != without.losses
    moved = np.any(np.asarray(trained) != np.asarray(untouched), axis=1)
    assert moved[:3].all()  # the rows of the ids in the data
    assert not moved[3:].any()
    with pytest.raises(CheckpointError, match="eval_data"):
        run(tmp_path / "a", 2, resume=True)


def test_a_step_learns_the_mean_nll_of_the_scored_tokens_and_the_mask_is_part_of_what_a_run_is(tmp_path):
    model, rng = tiny_model(), np.random.default_rng(0)
    plain = [text[:17] for text in texts(0, 5)]  # a row each
    masks = [rng.random(len(text)) < 0.5 for text in plain[:4]] + [np.zeros(len(plain[4]), bool)]
    documents = [TokenizedDocument(text, mask) for text, mask in zip(plain, masks, strict=True)]
    padded = np.array([np.pad(text, (0, 17 - len(text))) for text in plain])  # it changes nothing before it
    logits = np.asarray(model(padded).logits, np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nll = [
        -log_p[row, i - 1, text[i]]
        for row, (text, mask) in enumerate(zip(plain, masks, strict=True))
        for i in range(1, len(text))
        if mask[i]
    ]
    _, result = train(tmp_path / "run", model, documents, eval_data=documents, packing=False)
    first = next(record for record in read_metrics(result.metrics) if "loss" in record)
    assert first["tokens"] == len(nll)  # all of them: four rows, and none of what scores nothing
    assert first["loss"] == pytest.approx(np.mean(nll), rel=1e-6)  # float32 logits
    assert result.perplexity_before == pytest.approx(np.exp(np.mean(nll)), rel=1e-5)
    for named, train_data, eval_data in (("train_data", plain, documents), ("eval_data", documents, plain)):
        with pytest.raises(CheckpointError, match=named):
            train(tmp_path / "run", None, train_data, eval_data, packing=False, resume=True)


def test_unusable_settings_and_data_are_refused_before_any_work(tmp_path):
    model = tiny_model()

    def refused(kind, match, train_data=None, eval_data=None, model=model, **changes):
        given = {"eval_every": 3 if eval_data else None, **changes}
        with pytest.raises(kind, match=match):
            HyLoRADATrainer(model, train_data or texts(), eval_data, settings(tmp_path / "run", **given))
        assert not (tmp_path / "run").exists()

    refused(DataError, "eval_every=3, .*eval_data=None", eval_every=3)
    refused(DataError, "fill a row", [np.arange(9)])
    refused(DataError, "vocabulary", [np.arange(40)])
    refused(DataError, "Tokenize", ["some text"])
    refused(DataError, "two tokens", eval_data=[[1]])
    structured = [document_of(tokens, 3) for tokens in texts()]
    refused(ConfigError, "structure encoder", structured)
    refused(ConfigError, "structure encoder", eval_data=structured)
    reads = tiny_model(method="hylorada_v2")
    refused(DataError, "29 of 30 documents", [texts()[0], *structured[1:]], model=reads)
    refused(
        DataError,
        "document 0",
        [TokenizedDocument(ids, structure_ids=ids[1:]) for ids in texts()],
        None,
        reads,
    )
    reads.chat_template = {"default": "a", "tool_use": "b"}  # as a tokenizer may have them
    refused(CheckpointError, "tool_use", model=reads)
    unscored = [TokenizedDocument(ids, np.zeros(len(ids), bool)) for ids in texts()]
    refused(DataError, "scored token", unscored)
    refused(DataError, "scored token", eval_data=unscored)
    refused(DataError, "Source 2 of the training data", Mixture([(texts(), 1), (unscored, 1)]))
    with model.disable_adapter():
        refused(ConfigError, "outside of disable_adapter")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="must be a directory"):
        HyLoRADATrainer(model, texts(), None, settings(tmp_path / "file"))
    object.__setattr__(model.base, "supports_segments", False)
    refused(ConfigError, "packing=False")


CHILD = """
import sys
from hylorada_jax.training.trainer_test import train
train(sys.argv[1], resume=True, checkpoint_every=1, **eval(sys.argv[2]))
"""


def child(directory, environment, **changes):
    variables = {**os.environ, **environment, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", CHILD, str(directory), repr(changes)]
    with errors_of(directory).open("w") as errors:
        return subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL, stderr=errors)


def errors_of(directory):
    return directory.with_suffix(".stderr")


def test_a_learning_rate_that_nothing_has_is_warned_of(tmp_path):
    model = HyLoRADAModel(tiny_model().base, HyLoRADAConfig(method="sparse", sparse_adapter_dim=4))
    with pytest.warns(UserWarning, match=r"learning_rate=0\.01 is not read[\s\S]*at most 0\.0002"):
        HyLoRADATrainer(model, texts(), None, settings(tmp_path, eval_every=None))


@pytest.mark.parametrize(
    ("warm_up", "warned"),
    [({"warmup_steps": 7}, None), ({"warmup_steps": 8}, 0.875), ({"warmup_ratio": 1}, 0.875)],
)
def test_a_warm_up_of_the_whole_run_is_warned_of(tmp_path, warm_up, warned):
    config = settings(tmp_path, eval_every=None, steps=8, **warm_up)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        HyLoRADATrainer(tiny_model(), texts(), None, config)
    factor = schedule(config)
    highest = max(float(factor(step)) for step in range(8))
    assert highest == (warned or 1.0)
    found = [str(warning.message) for warning in said if "warm-up" in str(warning.message)]
    assert [f"come to {highest:.0%} of" in message for message in found] == [True] * bool(warned)


@pytest.mark.apart
def test_kill_9_at_any_moment_then_resume_ends_bit_equal(tmp_path, compilation_cache):
    steps = 60
    # Held out is text that counts down: the better the run counts up, the worse, from some step on.
    held_out = [list(range(28, -1, -1))]
    settings = {"steps": steps, "keep": "best", "learning_rate": 0.1, "eval_data": held_out}
    expected = child(tmp_path / "whole", compilation_cache, **settings)
    assert expected.wait(timeout=600) == 0, errors_of(tmp_path / "whole").read_text()

    rng = np.random.default_rng(int(os.environ.get("KILL_SEED", "0")))
    directory, killed_at = tmp_path / "killed", []
    for _ in range(3):
        process = child(directory, compilation_cache, **settings)
        # From the first line of its log on, anything may be under way: a step, a save, a rename, the end.
        already = len(read_metrics(directory / "metrics.jsonl"))
        while process.poll() is None and len(read_metrics(directory / "metrics.jsonl")) <= already:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.6))
        process.kill()
        assert process.wait() in (-signal.SIGKILL, 0), errors_of(directory).read_text()
        killed_at.append(len(read_metrics(directory / "metrics.jsonl")))
    last = child(directory, compilation_cache, **settings)
    assert last.wait(timeout=600) == 0, errors_of(directory).read_text()
    assert len(set(killed_at)) > 1, killed_at
    for name in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        assert (directory / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    metrics = [numbers(read_metrics(run / "metrics.jsonl")) for run in (directory, tmp_path / "whole")]
    assert metrics[0] == metrics[1]
    assert 0 < min(Checkpoints(directory / "checkpoints", 3).steps) < steps - 3
