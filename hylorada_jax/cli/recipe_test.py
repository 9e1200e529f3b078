"""Oracle: the options that a run was given."""

import dataclasses
import json
from pathlib import Path

import pytest
import tyro
import yaml

from hylorada_jax.cli.adapter import DEFAULTS, Adapter, AdapterOptions
from hylorada_jax.cli.finetune import Training, finetune
from hylorada_jax.cli.flags import options_of
from hylorada_jax.cli.reading import AS_IT_IS, DataOptions, Reading
from hylorada_jax.cli.recipe import expanded, recipe_of
from hylorada_jax.errors import ConfigError
from hylorada_jax.training.config import TrainingConfig

ADAPTER = AdapterOptions(method="dora", rank=3, lora_plus=False, targets=("q_proj", r".*\.v_proj"))
TRAINING = TrainingConfig(output="runs/a", steps=3, learning_rate=3e-5, packing=False, eval_tokens=None)
READING = DataOptions(split="train[:9]", columns=("text=body",), score="last", skip_bad_rows=True)
KNOWN = options_of(finetune)
PROMPT = "--a 'text'\n"


def parsed(*arguments):
    """What a command that has a run's options gets of a command line."""

    def command(
        *,
        training: Training,
        adapter: Adapter = DEFAULTS,
        reading: Reading = AS_IT_IS,
        start_from: Path | None = None,
        prompt: str = "",
        recipe: Path | None = None,
    ):
        return training.build(), adapter, reading, start_from, prompt

    return tyro.cli(command, args=expanded(["finetune", *arguments], KNOWN)[1:])


def test_a_runs_recipe_gives_its_options_again_and_options_beside_it_win(tmp_path):
    file = tmp_path / "recipe.json"
    options = recipe_of(
        TRAINING, ADAPTER, READING, start_from=Path("an adapter"), prompt=PROMPT, eval_data=None
    )
    file.write_text(json.dumps(options))
    where = ("--output", "runs/a")
    assert parsed("--recipe", str(file), *where) == (TRAINING, ADAPTER, READING, Path("an adapter"), PROMPT)
    training, adapter, *_ = parsed(*where, f"--recipe={file}", "--steps", "9", "--packing", "--rank", "5")
    assert (training.steps, training.packing, adapter.rank) == (9, True, 5)
    assert training.learning_rate == TRAINING.learning_rate
    # What a run is kept in is said anew.
    assert not {"output", "resume", "overwrite"} & options.keys()


def test_steps_beside_a_recipe_win_over_its_epochs_and_both_at_once_are_refused(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("epochs: 3\nwarmup-steps: 7")
    where = ("--recipe", str(file), "--output", "a")

    def counts(*beside):
        training, *_ = parsed(*where, *beside)
        return training.steps, training.epochs, training.warmup_ratio, training.warmup_steps

    default = TrainingConfig(output="a")
    steps, ratio = default.steps, default.warmup_ratio
    assert counts() == (steps, 3, ratio, 7)
    assert counts("--steps", "9", "--warmup_ratio=0.2") == (9, None, 0.2, None)
    assert counts("--epochs", "2", "--warmup-steps=4") == (steps, 2, ratio, 4)
    of_epochs = dataclasses.replace(TRAINING, epochs=2.0, warmup_steps=3)
    assert not {"steps", "warmup_ratio"} & recipe_of(of_epochs, ADAPTER, READING).keys()
    for one, other in (("steps: 5", "epochs: 3"), ("warmup_ratio: 0.1", "warmup-steps: 7")):
        (tmp_path / "both.yaml").write_text(f"{one}\n{other}")
        with pytest.raises(ConfigError, match=r"in place of[\s\S]*both.yaml"):
            parsed("--recipe", str(tmp_path / "both.yaml"), "--output", "a")
    for both in (("--epochs=1", "--steps", "2"), ("--warmup-steps", "1", "--warmup_ratio", "0.1")):
        with pytest.raises(ConfigError, match="in place of"):
            parsed("--output", "a", *both)


def test_yaml_says_the_same(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "steps: 3\nlearning_rate: 3e-5  # as text in YAML 1.1\npacking: no\ntargets: [q_proj]\nrank: 3\n"
        "daa: null\neval_tokens: null\nno_lora_plus: true\nno-progress: no"
    )
    training, adapter, *_ = parsed("--recipe", str(file), "--output", "b")
    assert (training.eval_tokens, adapter.daa) == (None, None)
    assert (training.steps, training.learning_rate, training.packing) == (3, 3e-5, False)
    assert (adapter.targets, adapter.rank, adapter.lora_plus) == (("q_proj",), 3, False)
    assert training.progress


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", b"{", "Expecting"),
        ("a.json", b"[1]", r"\[1\]"),
        ("a.json", b"[" * 10**5, "nested"),
        ("a.yaml", b"steps: [", "flow"),
        ("a.yaml", b"[" * 10**4, "a.yaml"),
        ("a.yaml", b"!!python/object/apply:os.getcwd []", "line 1, column 1: a tag"),
        ("a.yaml", b"seed: 1\nsteps: !!int ''", "line 2, column 8: a tag"),
        ("a.yaml", b"alpha: !!float ''", "a tag"),
        ("a.yaml", b"packing: !!bool maybe", "a tag"),
        ("a.yaml", b"prompt: !!timestamp x", "a tag"),
        ("a.yaml", b"!!str steps: 1", "a tag"),
        ("a.yaml", b"prompt: ! x", "a tag"),
        ("a.yaml", b"prompt: &a x", "an anchor"),
        ("a.yaml", b"<<: {steps: 1}", "a merge key"),
        ("a.yaml", b"steps: *a", "an alias"),
        ("a.yaml", b"steps: 0b_", "a.yaml: invalid literal"),
        ("a.yaml", b"steps: 1" + b":1" * 10**4, "a number of 20,001 characters"),
        ("a.yaml", b"steps: 0x" + b"f" * 10**4, "a number of 10,002 characters"),
        ("a.yaml", b"? [a]\n: 1", "unhashable"),
        ("a.yaml", b"\xff", "decode"),
        ("a.yaml", b"1: 2", "1: 2"),
        ("a.yaml", b"steps: {a: 1}", "steps"),
        ("a.yaml", b"steps: 1\nseed: 2\nsteps: 3", "a.yaml: 'steps' and 'steps'"),
        ("a.yaml", b"batch_size: 1\nbatch-size: 2", "a.yaml: 'batch_size' and 'batch-size'"),
        ("a.json", b'{"data": ["a"], "data": ["b"]}', "a.json: 'data' and 'data'"),
        ("a.yaml", b"targets: [[a]]", "targets"),
        ("a.yaml", b"targets: &a [x, x]\nexclude: &b [*a, *a]\ndata: [*b, *b]", "an anchor"),
        ("a.yaml", b"steps: 2024-01-01", "a.yaml: steps"),
        ("a.yaml", b"recipe: b.yaml", "a.yaml: 'recipe'"),
        ("a.yaml", b"output: null", "a.yaml: output: null"),
        ("a.yaml", b"prompt:", "a.yaml: prompt: null"),
        ("a.yaml", b"packing:", "a.yaml: packing: null"),
        ("a.yaml", b"packing: 'false'", "a.yaml: packing: 'false'"),
        ("a.yaml", b"no_packing: 1", "a.yaml: no_packing: 1"),
        ("a.yaml", b"daa: [a]", "a.yaml: daa"),
        ("a.yaml", b"steps: true", "a.yaml: steps: True"),
        ("a.yaml", b"learning_rte: 1", "a.yaml: 'learning_rte'[\\s\\S]*learning-rate"),
        ("a.json", b'{"a": "' + b"x" * 2**20 + b'"}', "bytes"),
        ("a.yaml", b'dtype: "\\e]0;x\\a"', r"dtype: '\\x1b\]0;x\\x07'"),
        ("a.json", b'{"dtype": "\\u001b]0;x"}', r"dtype: '\\x1b\]0;x'"),
        ("a.yaml", b'steps: "1\\n2"', "a printable line"),
        ("a.yaml", b'dtype: ["\\e[2J"]', "only options that take several values are lists"),
        ("a.yaml", b'targets: [a, "--x\\e[2J"]', r"targets: '--x\\x1b\[2J'"),
        ("a.yaml", b"#" * 2**16 + b"\n", "more than 65,536"),
    ],
)
def test_what_is_no_recipe_is_refused(tmp_path, name, content, said):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        expanded(["finetune", "--recipe", str(file)], KNOWN)


def test_keys_that_merge_doubled_mappings_are_refused_before_the_first_is_merged(tmp_path, monkeypatch):
    monkeypatch.setattr(yaml.SafeLoader, "construct_document", None)  # nothing is constructed
    file = tmp_path / "a.yaml"
    levels = [f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}" for i in range(1, 30)]
    for text in ("\n".join(["a0: &a0 {x: 1}", *levels]), "a: {<<: [{x: 1}, {x: 1}]}"):
        file.write_text(text)
        with pytest.raises(ConfigError, match="no tag, anchor, alias, merge key"):
            expanded(["finetune", "--recipe", str(file)], KNOWN)


def test_a_text_may_look_like_what_is_refused(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("prompt: '!!int &a *b <<'\ntargets: ['<<', '*', \"!x\"]")
    said = expanded(["finetune", "--recipe", str(file)], KNOWN)
    assert said[1:-2] == ["--prompt=!!int &a *b <<", "--targets", "<<", "*", "!x"]


def test_a_text_keeps_every_character_of_its_own(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text('prompt: "\\e[1m \\u202e\\n"\ndata: ["\\u200f.txt"]\noutput: "a\\tb"')
    said = expanded(["finetune", "--recipe", str(file)], KNOWN)
    assert said[1:-2] == ["--prompt=\x1b[1m \u202e\n", "--data", "\u200f.txt", "--output=a\tb"]


def test_a_recipe_that_is_not_there_is_refused():
    for arguments in (["--recipe", "nowhere.json"], ["--recipe"]):
        with pytest.raises(ConfigError, match="no such file"):
            expanded(["finetune", *arguments], KNOWN)
    assert expanded([], KNOWN) == []
    assert expanded(["merge", "--recipe", "x"], KNOWN) == ["merge", "--recipe", "x"]
