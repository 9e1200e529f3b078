import re
import sys

import jax
import pytest

from hylorada_jax.cli.main import main
from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import ConfigError
from hylorada_jax.model import HyLoRADAModel
from hylorada_jax.seeds import check_seed


@pytest.mark.parametrize("seed", [-1, 2**32, 10**23, 1.0, True, "0"])
def test_what_is_no_seed_is_refused_whatever_takes_one(seed):
    takers = (
        check_seed,
        lambda seed: HyLoRADAModel(None, HyLoRADAConfig(), seed),
        lambda seed: HyLoRADAModel.init_adapters(None, seed),  # type: ignore[arg-type]
    )
    for take in takers:
        with pytest.raises(ConfigError, match=rf"seed .*\n.*{re.escape(repr(seed))}"):
            take(seed)


def test_all_seeds_in_range_give_different_keys():
    seeds = (0, 1, 2**31 - 1, 2**31, 2**32 - 1)
    for seed in seeds:
        check_seed(seed)
    assert len({tuple(jax.random.key_data(jax.random.key(seed)).tolist()) for seed in seeds}) == len(seeds)


@pytest.mark.parametrize("command", [["generate", "--prompt", "a"], ["chat"]])
@pytest.mark.parametrize("seed", [-1, 2**32 + 5, 10**23])
def test_the_commands_refuse_it_before_they_look_for_a_model(command, seed, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["hylorada", *command, "--model", "./missing", "--seed", str(seed)])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert f"received: {seed}\n" in capsys.readouterr().err
