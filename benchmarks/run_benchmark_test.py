"""Oracles: the evaluation functions, the records' own statistics, and what a kill leaves."""

import json
import re
import shlex
import shutil
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from benchmarks import budgets, command, report, run_benchmark, trial
from benchmarks.benchmark import Benchmark
from benchmarks.experiment import Experiment
from benchmarks.rows import read
from benchmarks.trainables import Full
from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.data.corpus import load_documents
from hylorada_jax.data.tokenization import tokenize
from hylorada_jax.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    ModelError,
    NonFiniteError,
    TargetError,
)
from hylorada_jax.evaluation.perplexity import evaluate_perplexity
from hylorada_jax.model import HyLoRADAModel
from hylorada_jax.models.loading import load_model
from hylorada_jax.models.tokenizer import load_tokenizer

pytestmark = pytest.mark.slow
METHODS = {
    "base": {},
    "full": {"grid": {"learning_rate": [1e-3]}},
    "lora": {},
    "orthogonal": {"method": "hylorada_v1", "lora_rank": 2},
    "kaiming": {"method": "hylorada_v1", "lora_rank": 2, "lora_A_init": "kaiming"},
}
EXPERIMENTS = sorted((Path(__file__).parent / "experiments").glob("*.json"))
CHOOSING = (Path(__file__).parents[1] / "docs" / "choosing.md").read_text("utf-8")
ADAPTER = {"lora_plus_enabled": True}


def experiment(directory, **changes):
    settings = {
        "name": "tiny", "model": str(directory), "train_data": "texts.txt", "test_data": "test.txt",
        "other_data": "texts.txt", "methods": METHODS, "adapter": ADAPTER,
        "grid": {"learning_rate": [1e-2, 1e-4]}, "seeds": [3, 4],
        "steps": 3, "seq_len": 24, "dev_tokens": 48, "test_tokens": 96,
    }  # fmt: skip
    return settings | changes


@pytest.fixture(scope="module", autouse=True)
def held_back(tiny):
    (tiny / "test.txt").write_text("a lazy cat sleeps under the brown bridge\n" * 20)


@pytest.fixture(scope="module")
def done(tiny, held_back, tmp_path_factory):
    """The directory of a benchmark that ran to its end."""
    output = tmp_path_factory.mktemp("results")
    run(tiny, output)
    return output / "tiny"


def run(model, output, **changes):
    settings = Experiment(**experiment(model, **changes))
    Benchmark(settings, output / settings.name, model, "a test").run()


def records(directory):
    return {path.name: json.loads(path.read_text()) for path in directory.glob("*.json")}


def test_every_method_tries_each_rate_and_goes_on_with_its_best(done):
    found = records(done)
    assert len(found) == 1 + 2 + 3 * 3
    for row in read(done):
        if row.label in ("lora", "orthogonal", "kaiming"):
            losses = {
                rate: found[f"{row.label}-3steps-learning_rate{rate:g}-seed3.json"]["result"]["dev_loss"]
                for rate in (1e-2, 1e-4)
            }
            assert row.rate == min(losses, key=losses.__getitem__)
            assert [run["settings"]["seed"] for run in row.runs] == [3, 4]
    assert len({json.dumps(record["settings"]["sha256"]) for record in found.values()}) == 1


def test_the_first_loss_is_the_base_models_for_every_method_of_a_seed(done):
    for seed in (3, 4):
        first = {
            name: record["result"]["losses"][0]
            for name, record in records(done).items()
            if name.endswith(f"seed{seed}.json")
        }
        assert len(first) >= 4
        assert max(first.values()) - min(first.values()) < 1e-4, first  # float32, and rounded to 1e-5
    # But the starts differ.
    second = {
        label: records(done)[f"{label}-3steps-learning_rate0.01-seed3.json"]
        for label in ("orthogonal", "kaiming")
    }
    assert len({record["result"]["losses"][2] for record in second.values()}) == 2


def test_the_base_models_numbers_are_those_of_the_evaluation(done, tiny):
    base = load_model(tiny)
    tokens = tokenize(load_documents(tiny / "test.txt"), load_tokenizer(tiny))
    expected = evaluate_perplexity(base, tokens, seq_len=24, max_tokens=96, progress=False)
    found = records(done)["base.json"]["result"]
    assert found["perplexity"] == pytest.approx(expected.perplexity, rel=1e-6)
    other = tokenize(load_documents(tiny / "texts.txt", "eval"), load_tokenizer(tiny))
    expected = evaluate_perplexity(base, other, seq_len=24, stride=24, max_tokens=48, progress=False)
    assert found["other_perplexity"] == pytest.approx(expected.perplexity, rel=1e-6)


def test_a_benchmark_goes_on_where_it_was_killed(done, tiny, tmp_path, monkeypatch):
    trained: list[object] = []
    train = trial.Runner.train

    def dies(self, trainable, training, on_step=None):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(training)
        return train(self, trainable, training, on_step)

    changes = {"methods": {name: METHODS[name] for name in ("base", "lora")}}
    with monkeypatch.context() as patch:
        patch.setattr(trial.Runner, "train", dies)
        with pytest.raises(KeyboardInterrupt):
            run(tiny, tmp_path, **changes)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "tiny").glob("*.json")}
    assert len(before) == 3
    run(tiny, tmp_path, **changes)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    for name, record in records(tmp_path / "tiny").items():
        # Every number but those of time, to the bit: float32 sums in the same order.
        expected = records(done)[name]["result"]
        for key in ("losses", "dev_loss", "perplexity", "lim_buckets"):
            assert record["result"].get(key) == expected.get(key), (name, key)


def test_runs_of_another_order_of_the_data_are_refused(done, tiny, tmp_path, monkeypatch):
    shutil.copytree(done, tmp_path / "tiny")
    changes: dict[str, object] = {"methods": {"lora": {}}}
    draw = trial.mixed_batches
    monkeypatch.setattr(trial, "mixed_batches", lambda shares, size, seed: draw(shares, size, seed + 7))
    with pytest.raises(CheckpointError, match="order"):
        run(tiny, tmp_path, **changes)
    # The first records do not name theirs.
    for name, record in records(tmp_path / "tiny").items():
        record["settings"].pop("order", None)
        (tmp_path / "tiny" / name).write_text(json.dumps(record))
    run(tiny, tmp_path, **changes)


@pytest.mark.parametrize(
    ("error", "kept"),
    [
        (NonFiniteError("A loss must be finite", "nan at step 2", ""), {"diverged": "nan at step 2"}),
        (RuntimeError("RESOURCE_EXHAUSTED: 9 GB"), {"out_of_memory": "RESOURCE_EXHAUSTED: 9 GB"}),
        (MemoryError(), {"out_of_memory": ""}),
    ],
)
def test_a_run_that_does_not_end_is_kept_and_not_chosen(tiny, tmp_path, monkeypatch, error, kept):
    train = trial.Runner.train

    def fails(self, trainable, training, on_step=None):
        if training.learning_rate == 1e-2:
            raise error
        return train(self, trainable, training, on_step)

    monkeypatch.setattr(trial.Runner, "train", fails)
    run(tiny, tmp_path, methods={"lora": {}})
    failed = records(tmp_path / "tiny")["lora-3steps-learning_rate0.01-seed3.json"]
    assert failed["result"] == kept
    (row,) = read(tmp_path / "tiny")
    assert (row.label, row.rate, len(row.runs)) == ("lora", 1e-4, 2)


HALVING = {
    "report_on": "chosen",
    "steps": [2, 4],
    "keep": 0.5,
    "methods": {"lora": {}, "hylorada_v1": {"grid": {"lora_A_gain": [0.5, 1.0]}}},
    "grid": {
        "learning_rate": [1e-2, 1e-4],
        "lora_plus_ratio": [1, 4],
        "schedule": ["constant"],
        "warmup_steps": [0],
    },
}


@pytest.fixture(scope="module")
def halved(tiny, held_back, tmp_path_factory):
    """The directory of a benchmark of two budgets, and how many steps were compiled."""
    output = tmp_path_factory.mktemp("halving")
    compiled: list[object] = []
    make = trial.make_train_step

    def counted(*arguments):
        compiled.append(arguments)
        return make(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trial, "make_train_step", counted)
        run(tiny, output, **HALVING)
    return output / "tiny", len(compiled)


def test_the_better_half_of_the_settings_goes_on_to_the_next_budget(halved):
    found = records(halved[0]).values()
    for label, tried in (("lora", 4), ("hylorada_v1", 8)):
        losses, seeds = {}, {}
        for steps in (2, 4):
            own = {"label": label, "steps": steps}
            runs = [run for run in found if own.items() <= run["settings"].items()]
            point = {id(run): tuple(run["settings"]["point"].items()) for run in runs}
            losses[steps] = {
                point[id(run)]: run["result"]["dev_loss"] for run in runs if run["settings"]["seed"] == 3
            }
            seeds[steps] = [point[id(run)] for run in runs if run["settings"]["seed"] == 4]
            assert seeds[steps] == [min(losses[steps], key=losses[steps].__getitem__)]
            measured = [point[id(run)] for run in runs if "perplexity" in run["result"]]
            assert measured == seeds[steps] * 2  # the search's winner, with both seeds
        assert len(losses[2]) == tried
        assert set(losses[4]) == set(sorted(losses[2], key=losses[2].__getitem__)[: tried // 2])


def test_a_winner_whose_test_measures_a_kill_prevented_is_trained_again(halved, tiny, tmp_path):
    shutil.copytree(halved[0], tmp_path / "tiny")
    (winner,) = (
        name
        for name, run in records(halved[0]).items()
        if "perplexity" in run["result"]
        and {"label": "lora", "steps": 4, "seed": 3}.items() <= run["settings"].items()
    )
    file = tmp_path / "tiny" / winner
    before = json.loads(file.read_text())
    measures = ("perplexity", "passages", "lim_buckets")
    searched = {name: value for name, value in before["result"].items() if name not in measures}
    file.write_text(json.dumps(before | {"result": searched}))
    run(tiny, tmp_path, **HALVING)
    after = json.loads(file.read_text())["result"]
    for name in ("losses", "dev_loss", *measures):
        assert after[name] == before["result"][name], name


def test_settings_that_are_numbers_share_a_program(halved):
    assert halved[1] == 2 * 2  # of methods and budgets


def test_at_a_constant_rate_a_short_run_is_the_beginning_of_a_long_one(halved):
    short, long = (
        {
            (run["settings"]["label"], str(run["settings"]["point"]), run["settings"]["seed"]): run["result"]
            for run in records(halved[0]).values()
            if run["settings"]["steps"] == steps
        }
        for steps in (2, 4)
    )
    both = short.keys() & long.keys()
    assert len(both) >= 6
    for key in both:
        assert long[key]["losses"][:2] == short[key]["losses"]
        assert list(long[key]["held_out"]) == ["2", "4"]
        assert long[key]["held_out"]["2"] == pytest.approx(short[key]["dev_loss"], rel=1e-6)  # float32
        assert long[key]["held_out"]["4"] == long[key]["dev_loss"]


def test_the_budgets_table_has_the_differences_of_the_runs(halved):
    directory, _ = halved
    budgets.main(directory, against="lora")
    lines = (directory / "budgets.md").read_text().splitlines()
    line = next(line for line in lines if line.startswith("| hylorada_v1"))
    for at, steps in ((2, 2), (5, 4)):
        perplexities = {row.label: row.values("perplexity") for row in read(directory, steps=steps)}
        expected = statistics.mean(
            a - b for a, b in zip(perplexities["hylorada_v1"], perplexities["lora"], strict=True)
        )
        assert float(line.split("|")[at + 1].split()[0]) == pytest.approx(expected, abs=0.006)
    ranks = next(line.split("|") for line in reversed(lines) if line.startswith("| hylorada_v1"))
    rank = HyLoRADAConfig().lora_rank
    assert float(ranks[2].split()[0]) == rank  # its A starts with orthogonal rows of one length
    for line in lines[-2:]:
        assert all(0 < float(cell.split()[0]) <= rank for cell in line.split("|")[2:5])
    tried = (directory / "search.md").read_text()
    assert tried.count("| learning_rate") == 4 + 8
    # Of two rates the better one is an end, whatever stands beside it.
    assert tried.count(" †,") == 2 + 4
    assert tried.count(" |  |\n") == 2 + 4  # were dropped
    runs = list(records(directory).values())
    base = {"settings": {"label": "base", "kind": "base", "seed": 0, "steps": 0, "point": {}}}
    assert budgets.search([base, *runs]) == budgets.search(runs)  # its seed, always 0, is none of theirs
    counts = "of 4 combinations, hylorada_v1 of 8.", "of 8 combinations, lora of 4."  # of the first budget
    assert any(count in " ".join(lines) for count in counts)
    assert "lora of 4 → 2" in " ".join(lines)
    assert "hylorada_v1 of 8 → 4" in " ".join(lines)
    for name in ("budgets.png", "held_out.png"):
        assert (directory / name).stat().st_size > 5_000
    with pytest.raises(ConfigError, match="hylorada_v1"):
        budgets.main(directory, against="dora")
    absent = directory / "absent.md"
    with pytest.raises(ConfigError, match=r"absent\.md"):
        budgets.main(directory, against="lora", page=absent)
    with pytest.raises(CheckpointError, match="passage"):
        budgets.main(EXPERIMENTS[0].parents[1] / "results" / "wikitext-2", against="lora")


@pytest.mark.parametrize(
    ("numbers", "losses", "tokens"),
    [([0, 0, 1, 1], [3, 7], [30, 70]), ([5, 5, 5, 5], [1, 2, 3, 4], [10, 20, 30, 40])],
    ids=["documents", "windows of one document"],
)
def test_errors_over_texts_are_of_documents_or_of_the_windows_of_a_single_one(numbers, losses, tokens):
    passages = [[n, at + 1.0, 10 * (at + 1)] for at, n in enumerate(numbers)]
    found = budgets._losses([{"result": {"passages": passages}}] * 2)
    assert [part.tolist() for part in found] == [[losses] * 2, tokens]


def test_both_tables_count_the_whole_grid_and_say_where_seeds_lack(halved, tmp_path):
    directory = tmp_path / "tiny"
    shutil.copytree(halved[0], directory)
    assert "of 4 combinations" in (caption := report.caption(read(directory)))
    assert "of 8" in caption
    (file,) = (
        directory / name
        for name, run in records(directory).items()
        if "perplexity" in run["result"]
        and {"label": "hylorada_v1", "steps": 4, "seed": 3}.items() <= run["settings"].items()
    )
    record = json.loads(file.read_text())
    del record["result"]["perplexity"]
    file.write_text(json.dumps(record))
    budgets.main(directory, against="lora")
    lines = (directory / "budgets.md").read_text().splitlines()
    found, ranks = (line for line in lines if line.startswith("| hylorada_v1"))
    cells = zip(lines[0].split(" | "), found.split(" | "), strict=True)
    assert [head for head, cell in cells if "(1 of 2 seeds)" in cell] == ["PPL, 4 steps"]
    assert ranks.startswith("| hylorada_v1 (1 of 2 seeds) |")
    assert "of 2 seeds" in report.table(read(directory))


@pytest.mark.parametrize("name", re.findall(r"--config benchmarks/experiments/([\w-]+)\.json", CHOOSING))
def test_the_commands_of_the_page_train_the_methods_of_its_tables(name):
    words = shlex.split(CHOOSING.split(f"experiments/{name}.json")[1].split("\npython")[0])
    if "--methods" in words:
        methods = words[words.index("--methods") + 1 :]
    else:
        methods = list(Experiment.load(EXPERIMENTS[0].parent / f"{name}.json").methods)
    table = CHOOSING.split(f"<!-- results:{name} -->\n")[1].split("\n\n")[0]
    rows = [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()[2:]]
    assert sorted(rows) == sorted(methods)


@pytest.mark.parametrize("wrong", [{"steps": 77}, {"rate": 0.5}], ids=str)
def test_what_no_run_has_is_refused_though_there_is_a_base(done, wrong):
    before = {file: file.read_bytes() for file in done.iterdir()}
    with pytest.raises(
        CheckpointError, match=r"There are budgets of 3 steps, and rates of 0\.0001, 0\.001, 0"
    ):
        report.main(done, **wrong)
    assert before == {file: file.read_bytes() for file in done.iterdir()}


def test_other_files_among_the_runs_are_named():
    results = EXPERIMENTS[0].parents[1] / "results"
    for directory, name in ((results, "base-dtypes-cpu"), (results / "recall", "base-seed0")):
        with pytest.raises(CheckpointError, match=f"records of run_benchmark(.|\n)*{name}"):
            report.main(directory)


def test_of_completions_the_answers_count(tiny, tmp_path):
    for name in ("train", "test"):
        lines = [
            {"prompt": f"the quick brown {n}", "completion": " jumps over the lazy dog"} for n in range(30)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    changes: dict[str, object] = {
        "train_data": "train.jsonl", "test_data": "test.jsonl", "other_data": None, "test_tokens": 10**6,
        "methods": {"base": {}, "lora": {}},
    }  # fmt: skip
    settings = Experiment(**experiment(tiny, **changes))
    Benchmark(settings, tmp_path / "tiny", tmp_path, "a test", keep_adapters=True).run()
    documents = tokenize(load_documents(tmp_path / "test.jsonl"), load_tokenizer(tiny))
    (adapter,) = (tmp_path / "tiny" / "adapters").glob("lora-*rate0.01-seed4")
    found = records(tmp_path / "tiny")[f"{adapter.name}.json"]["result"]
    model = HyLoRADAModel.from_pretrained(load_model(tiny), adapter)
    expected = evaluate_perplexity(model, documents, seq_len=24, progress=False)
    assert found["perplexity"] == pytest.approx(expected.perplexity, rel=1e-6)
    assert found["scored_tokens"] == expected.tokens
    assert sum(tokens for _, _, tokens in found["passages"]) == expected.tokens
    assert "LiM" not in report.table(read(tmp_path / "tiny"))


def test_what_always_diverges_has_a_row_that_says_so(tiny, tmp_path, monkeypatch):
    train = trial.Runner.train

    def diverges(self, trainable, training, on_step=None):
        if isinstance(trainable, Full):
            raise NonFiniteError("A loss must be finite", "nan at step 2", "")
        return train(self, trainable, training, on_step)

    monkeypatch.setattr(trial.Runner, "train", diverges)
    run(tiny, tmp_path, methods={"full": {}, "lora": {}}, grid={"learning_rate": [1e-2]})
    text = report.table(read(tmp_path / "tiny"), against="full")
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1
    assert "| full |  | 0.01 | did not end |" in text
    report.main(tmp_path / "tiny", against="lora")
    for file in (tmp_path / "tiny").glob("lora*.json"):
        file.unlink()
    with pytest.raises(CheckpointError, match="ended"):
        read(tmp_path / "tiny")


def test_weights_that_the_last_update_broke_are_no_result(tiny, tmp_path, monkeypatch):
    train = trial.Runner.train

    def breaks(self, trainable, training, on_step=None):
        adapters, result = train(self, trainable, training, on_step)
        return jax.tree.map(lambda x: x * float("nan"), adapters), result

    monkeypatch.setattr(trial.Runner, "train", breaks)
    run(tiny, tmp_path, methods={"lora": {"grid": {"learning_rate": [1e-2]}}}, seeds=[3])
    (record,) = records(tmp_path / "tiny").values()
    assert record["result"] == {"diverged": "NaN or infinite ones in document 1"}


def test_a_caption_says_how_much_was_trained_on_and_of_how_many_seeds(done):
    rows = read(done)
    assert "Mean ± standard deviation over 2 seeds" in report.caption(rows)
    for row in rows:
        del row.runs[1:]
        row.runs[0]["settings"]["train_tokens"] = 48
    assert "texts.txt (about 48 of " in report.caption(rows)
    assert ". Of one seed, not over" in report.caption(rows)


def test_all_can_be_compared_at_one_rate(done):
    rows = {row.label: row for row in read(done, rate=1e-4)}
    assert {row.rate for label, row in rows.items() if label != "base"} == {1e-4}
    for row in rows.values():
        for found in row.runs:
            assert found["settings"]["learning_rate"] in (0, 1e-4)
    report.main(done, rate=1e-4, against="lora")
    assert "all with the learning rate 0.0001" in (done / "table-rate0.0001.md").read_text()


def test_differences_to_the_base_model_are_those_of_every_seed(done):
    rows = {row.label: row for row in read(done)}
    base, lora = (rows[label].values("perplexity") for label in ("base", "lora"))
    for text, ours, theirs in (
        (report._difference(rows["lora"], rows["base"]), lora, base * 2),
        (report._difference(rows["base"], rows["lora"]), base * 2, lora),
    ):
        differences = [a - b for a, b in zip(ours, theirs, strict=True)]
        assert text == f"{statistics.mean(differences):,.2f} ± {statistics.stdev(differences):.2f}"


def test_the_table_has_the_mean_and_deviation_of_the_runs(done):
    text = report.table(read(done), against="lora")
    runs = next(row.runs for row in read(done) if row.label == "orthogonal")
    values = [run["result"]["perplexity"] for run in runs]
    line = next(line for line in text.splitlines() if line.startswith("| orthogonal |"))
    assert f"{statistics.mean(values):,.2f} ± {statistics.stdev(values):.2f}" in line
    lora = {
        run["settings"]["seed"]: run["result"]["perplexity"]
        for row in read(done)
        if row.label == "lora"
        for run in row.runs
    }
    differences = [run["result"]["perplexity"] - lora[run["settings"]["seed"]] for run in runs]
    assert f"{statistics.mean(differences):,.2f} ± {statistics.stdev(differences):.2f}" in line
    assert "test.txt" in text


def test_times_are_in_the_table_if_they_are_of_one_machine_without_other_work(done):
    rows = read(done)
    runs = [run for row in rows for run in row.runs]
    for run in runs:
        run["environment"]["cpu"], run["result"]["load_per_core"] = "one", 1.0
    timed = report.table(rows)
    assert f"| {statistics.median(rows[-1].values('seconds_per_step')):,.2f} |" in timed
    assert "Step, tokens/s: medians; memory: of the compiled step. On one. " in timed
    runs[-1]["environment"]["cpu"] = "another"
    of_two = report.table(rows)
    assert "Memory: of the compiled step. On another and one. " in of_two
    runs[-1]["environment"]["cpu"], runs[-1]["result"]["load_per_core"] = "one", 4.0
    for untimed in (of_two, report.table(rows)):
        assert "step, s" not in untimed
        assert "tokens/s" not in untimed
        assert len({line.count("|") for line in untimed.splitlines() if "|" in line}) == 1


def test_the_pages_table_is_replaced_and_nothing_else(done, tmp_path):
    page = tmp_path / "results.md"
    page.write_text("before\n<!-- results:tiny -->\nold\n<!-- end -->\nafter <!-- end -->\n")
    report.main(done, page=page)
    text = page.read_text()
    assert text.startswith("before\n<!-- results:tiny -->\n| method")
    assert text.endswith("<!-- end -->\nafter <!-- end -->\n")
    assert "old" not in text
    assert (done / "by_place.png").stat().st_size > 10_000
    with pytest.raises(ConfigError, match="results:other"):
        report.replaced(text, "other", "")


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"seq_len": 4000}, DataError, "4000"),
        ({"model": "./nowhere"}, ModelError, "nowhere"),
        ({"methods": {"lora": {"target_modules": ["nothing"]}}}, TargetError, "nothing"),
        ({"train_data": "absent.txt"}, DataError, "absent.txt"),
        ({"seq_len": 9}, ConfigError, "seq_len"),
        ({"grid": {"learning_rate": [0.0]}}, ConfigError, "learning_rate"),
        ({"seeds": [-1]}, ConfigError, "seed"),
        ({"steps": 2.5}, ConfigError, "steps"),
        ({"retrieval_samples": 1}, DataError, "context"),
    ],
)
def test_bad_input_is_refused_before_a_model_is_loaded(tiny, tmp_path, changes, error, match):
    # A Benchmark loads a model when it runs.
    settings = Experiment(**experiment(tiny, **changes))
    with pytest.raises(error, match=match):
        Benchmark(settings, tmp_path, tiny, "")


def test_a_model_without_a_tokenizer_is_refused(tiny, tmp_path):
    for name in ("config.json", "model.safetensors", "texts.txt"):
        (tmp_path / name).write_bytes((tiny / name).read_bytes())
    settings = Experiment(**experiment(tmp_path, test_data="texts.txt"))
    with pytest.raises(ModelError, match="tokenizer"):
        Benchmark(settings, tmp_path / "results", tmp_path, "")


@pytest.mark.parametrize("path", EXPERIMENTS, ids=[path.stem for path in EXPERIMENTS])
def test_a_file_of_experiments_is_called_as_its_experiment(path):
    assert Experiment.load(path).name == path.stem


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"methods": {"lora": {}, "dorra": {}}}, "dora"),
        ({"methods": {"lora": {"lora_rnk": 2}}}, "lora_rank"),
        ({"methods": {"lora": {"structure": "code"}}}, "structure"),
        ({"epochs": 1.0}, "epochs"),
        ({"steps": [4, 2]}, "steps must grow"),
        ({"keep": 0}, "keep"),
        ({"report_on": "best"}, "report_on"),
        ({"grid": {"lora_ranc": [2]}}, "lora_rank"),
        ({"grid": {"lora_plus_ratio": [2]}, "adapter": {}}, "LoRA"),
        ({"seeds": [1, 1]}, "seeds"),
        ({"seeds": [1, 0]}, "seeds must grow"),
        ({"grid": {"learning_rate": []}}, "learning_rate"),
    ],
)
def test_an_experiment_that_says_what_cannot_be_is_refused(changes, match):
    with pytest.raises(ConfigError, match=match):
        Experiment(**experiment("tiny", **changes))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"seeds": 3}, "seeds: Expected `array`"),
        ({"methods": ["lora"]}, "methods: Expected `object`"),
        ({"grid": {"learning_rate": 0.001}}, "grid: Expected `array`"),
        ({"steps": "3"}, "steps: Expected"),
        ({"keep": None}, "keep: Expected `float`"),
    ],
)
def test_a_file_whose_values_have_other_types_is_refused(changes, match, tmp_path):
    (tmp_path / "own.json").write_text(json.dumps(experiment("tiny", **changes)))
    with pytest.raises(ConfigError, match=match):
        Experiment.load(tmp_path / "own.json")


def test_the_sparse_adapter_whose_rate_is_its_own_is_trained_once_a_seed(tmp_path):
    sparse, lora = Experiment(**experiment("tiny", methods={"sparse": {}, "lora": {}})).variants
    rates = [[candidate.point["learning_rate"] for candidate in one.candidates] for one in (sparse, lora)]
    assert rates == [[2e-4], [1e-2, 1e-4]]


def test_the_command_ends_with_the_table_and_the_plots(tiny, tmp_path, monkeypatch, capsys):
    (tmp_path / "long.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 800)
    options = {
        "--methods": ("base", "lora"), "--model": (tiny,), "--train-data": ("long.txt",),
        "--test-data": ("long.txt",),
        "--data-dir": (tmp_path,), "--steps": ("2",), "--learning-rates": ("1e-3",), "--seeds": ("0", "1"),
        "--seq-len": ("900",), "--dev-tokens": ("900",), "--test-tokens": ("900",),
        "--retrieval-samples": ("1",), "--output": (tmp_path,),
    }  # fmt: skip
    words = [str(word) for name, values in options.items() for word in (name, *values)]
    monkeypatch.setattr(sys, "argv", ["run_benchmark.py", *words])
    command.run(run_benchmark.main)
    table = (tmp_path / "benchmark" / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert "| found |" in table.splitlines()[0]
    assert len(list((tmp_path / "benchmark").glob("*.png"))) == 3


def test_a_model_that_lets_packed_documents_see_each_other_is_refused():
    trainable = SimpleNamespace(
        model=SimpleNamespace(base=SimpleNamespace(name="opt", supports_segments=False))
    )
    with pytest.raises(ConfigError, match="received: opt"):
        trial.Runner([]).train(trainable, None)  # type: ignore[arg-type]


def test_runs_of_other_settings_are_not_overwritten(done, tiny):
    with pytest.raises(CheckpointError, match="batch_size 2, now 3"):
        run(tiny, done.parent, batch_size=3)


def test_the_command_reads_a_file_and_what_is_given_beside_it(tmp_path, monkeypatch, capsys):
    file = tmp_path / "experiment.json"
    file.write_text(json.dumps(experiment("tiny")))
    found = run_benchmark._experiment(file, {"epochs": 2.0, "methods": ("base", "dora")})
    assert (found.epochs, found.steps, list(found.methods)) == (2.0, None, ["base", "dora"])
    found = run_benchmark._experiment(file, {"learning_rates": (0.5,), "steps": (2, 8)})
    assert (found.grid, found.steps) == ({"learning_rate": (0.5,)}, (2, 8))
    own = {"full": {"grid": {"learning_rate": [0.1, 0.2], "weight_decay": [0.0, 0.1]}}}
    file.write_text(json.dumps(experiment("tiny", methods=own)))
    (full,) = run_benchmark._experiment(file, {"learning_rates": (0.5,)}).variants
    points = [candidate.point for candidate in full.candidates]
    assert points == [{"learning_rate": 0.5, "weight_decay": decay} for decay in (0.0, 0.1)]
    monkeypatch.setattr(sys, "argv", ["run_benchmark.py", "--methods", "lorra"])
    with pytest.raises(SystemExit) as stop:
        command.run(run_benchmark.main)
    assert stop.value.code == 2
    assert "lora" in capsys.readouterr().err
    file.write_text(json.dumps(experiment("tiny") | {"stepz": 1}))
    with pytest.raises(ConfigError, match="steps"):
        Experiment.load(file)
