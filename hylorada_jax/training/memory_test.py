"""Oracle: the compiler's figures of each setting's step, and runs with the same settings given by name."""

import itertools
import json
import logging
from typing import Any

import jax
import numpy as np
import pytest

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import ConfigError
from hylorada_jax.model import HyLoRADAModel
from hylorada_jax.models.causal_lm import CausalLM
from hylorada_jax.models.decoder_config import DecoderConfig
from hylorada_jax.placement.placement import Placement, parse_mesh
from hylorada_jax.training.config import TrainingConfig
from hylorada_jax.training.memory import Setting, beside_step, candidates, choose, needed_bytes
from hylorada_jax.training.trainer import HyLoRADATrainer

DATA = [np.arange(first, first + 40) % 29 for first in range(30)]
ORDER = [Setting("none", 1), Setting("dots", 1), Setting("full", 1), Setting("full", 2)]
VAST = 2**40


ADAPTER = HyLoRADAConfig(method="lora", lora_rank=2, lora_dropout=0.1, target_modules=("v_proj",))


def adapted(adapter=ADAPTER):
    shape = {
        "model_type": "llama", "vocab_size": 29, "hidden_size": 16, "intermediate_size": 64,
        "num_hidden_layers": 4, "num_attention_heads": 2,
    }  # fmt: skip
    base = CausalLM.from_config(DecoderConfig.from_hf(shape), jax.random.key(0))
    return HyLoRADAModel(base, adapter)


def trainer(directory, limit=VAST, recipe=None, model=None, **changes):
    given = {
        "output": directory, "steps": 4, "batch_size": 2, "microbatches": "auto", "seq_len": 64,
        "checkpoint_every": 2, "progress": False,
    }  # fmt: skip
    config = TrainingConfig(**given | changes)
    return HyLoRADATrainer(model or adapted(), DATA, None, config, recipe=recipe, memory=limit)


@pytest.fixture(scope="module")
def programs():
    """Each setting's step as the trainer compiles it, given by name."""
    return {each: trainer("unused", **each._asdict()).choice.step for each in ORDER}


class Compilers:
    """Steps that are compiled already, and how often that was asked for."""

    def __init__(self, programs):
        self.programs, self.asked = programs, []

    def __call__(self, setting):
        self.setting = setting
        return self

    def lower(self):
        return self

    def compile(self):
        self.asked.append(self.setting)
        return self.programs[self.setting]


def steps_compiled(caplog):
    return sum("Finished XLA compilation of jit(step)" in record.message for record in caplog.records)


def test_the_first_setting_that_fits_is_chosen(programs):
    """With its very bytes a setting is taken, with one less the next; the fastest costs one compilation."""
    needed = [needed_bytes(programs[each]) for each in ORDER]
    assert needed == sorted(set(needed), reverse=True)
    for number, short in itertools.product(range(len(ORDER)), (0, 1)):
        steps, limit = Compilers(programs), needed[number] - short
        if number + short == len(ORDER):
            with pytest.raises(ConfigError, match=f"full, 2 .*: {needed[-1]:,} bytes needed, 1 more than"):
                choose(ORDER, steps, tuple, limit)
            continue
        found = choose(ORDER, steps, tuple, limit)
        assert found.setting == ORDER[number + short]
        assert found.step is programs[found.setting]
        assert found.needed == needed[number + short] <= limit
        assert found.limit == limit
        assert len(set(steps.asked)) == len(steps.asked) <= (1 if found.setting == ORDER[0] else 4)


def test_what_the_model_keeps_beside_the_step_counts():
    """The adapters that a run starts with, and the base's own table where the table trains."""
    model = adapted(HyLoRADAConfig(method="lora", lora_rank=2, train_embeddings=True))
    kept = [*jax.tree.leaves(model.adapters), *jax.tree.leaves(model.base.params["model"]["embed_tokens"])]
    choice = trainer("unused", model=model, remat="none", microbatches=1).choice
    beside = sum(leaf.nbytes for leaf in kept)
    assert choice.needed == needed_bytes(choice.step) + beside
    with pytest.raises(ConfigError, match=f"{choice.needed:,} bytes needed, 1 more"):
        trainer("unused", choice.needed - 1, model=model, remat="none", microbatches=1)


def test_nothing_fits_and_nothing_is_written(tmp_path):
    remedy = "--remat full.*--microbatches auto.*smaller batch_size.*bfloat16"
    with pytest.raises(ConfigError, match=f"(?s)more than the 1,000 that there are.*{remedy}"):
        trainer(tmp_path / "run", 1000, remat="none", microbatches=1)
    assert not (tmp_path / "run").exists()


def test_a_cpu_takes_the_fastest_and_compiles_nothing_for_it(caplog):
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        found = trainer("unused", None).choice
    assert steps_compiled(caplog) == 0
    assert (found.setting, found.needed) == (ORDER[0], None)
    assert "states no limit" in str(found)


def test_what_was_chosen_trains_and_is_what_it_would_be_by_name(tmp_path, programs, caplog):
    """Bit for bit, also where the run is resumed in more memory; and no program is compiled twice."""
    beside = beside_step(adapted(), Placement(parse_mesh()))
    limit, chosen = beside + needed_bytes(programs[ORDER[3]]), ORDER[3]._asdict()
    recipe = {"microbatches": "auto", "remat": "auto", "data": ["a"]}
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        run = trainer(tmp_path / "auto", limit, recipe)
        compiled = steps_compiled(caplog)
        result = run.train()
    assert 0 < compiled == steps_compiled(caplog)
    named = trainer(tmp_path / "named", None, **chosen).train()
    assert result.losses == named.losses
    weights = "adapter_model.safetensors"
    assert (result.adapter / weights).read_bytes() == (named.adapter / weights).read_bytes()

    record = json.loads((tmp_path / "auto" / "run.json").read_text())
    assert chosen.items() <= record["recorded"].items()
    assert json.loads((tmp_path / "auto" / "recipe.json").read_text()) == recipe | chosen

    (tmp_path / "auto" / "checkpoints" / "4").rename(tmp_path / "4")
    again = trainer(tmp_path / "auto", resume=True)
    assert again.choice.setting == ORDER[3]
    assert again.train().losses == named.losses
    assert (result.adapter / weights).read_bytes() == (named.adapter / weights).read_bytes()


@pytest.mark.parametrize(
    ("given", "own", "devices", "expected"),
    [
        ({}, "none", 1, ORDER[:3]),
        ({"microbatches": "auto"}, "none", 1, [*ORDER, Setting("full", 4)]),
        ({"microbatches": "auto"}, "none", 2, ORDER),
        ({"microbatches": 2}, "none", 1, [Setting(each, 2) for each in ("none", "dots", "full")]),
        ({"microbatches": "auto", "remat": "dots"}, "none", 1, [Setting("dots", n) for n in (1, 2, 4)]),
        ({}, "full", 1, [Setting("full", 1)]),
        ({"remat": "none"}, "full", 1, [Setting("none", 1)]),
        ({"microbatches": "auto"}, None, 1, [Setting("none", n) for n in (1, 2, 4)]),
    ],
)
def test_candidates_are_what_was_left_open(given, own, devices, expected):
    config = TrainingConfig(output="unused", batch_size=4, **given)
    assert candidates(config, own=own, devices=devices) == expected


def test_a_compiler_that_gives_no_program_says_why(monkeypatch):
    """As a TPU's does where a program exceeds its memory; another fault of it is no answer."""

    class Refused:
        def __init__(self, why):
            self.why = why

        def lower(self):
            raise jax.errors.JaxRuntimeError(self.why)

    def step_of(why) -> Any:
        return lambda _: Refused(why)

    why = "RESOURCE_EXHAUSTED: Ran out of memory in hbm. Used 60.0G of 15.75G."
    with pytest.raises(ConfigError, match=r"remat full, 2 microbatches: .*60\.0G"):
        choose(ORDER, step_of(why), tuple, VAST)
    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        choose(ORDER, step_of("INTERNAL: a bug"), tuple, VAST)
