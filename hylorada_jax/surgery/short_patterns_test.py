import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.surgery import patterns
from hylorada_jax.surgery.short_patterns import patterns_of, shortest_targets
from hylorada_jax.surgery.targets import by_pattern, layer_ranks, select_targets
from hylorada_jax.surgery.targets_test import LLAMA

EXPERTS = [f"model.layers.{i}.mlp.experts.{e}.w{w}" for i in range(3) for e in range(4) for w in (1, 2)]
# Names that are the ending, or the beginning, of others.
WITHIN = ["h.0", "h.0.f", "h.1.f", "h.1.g", "h.x.f", "a.h.0.f", "a.h.1.f", "h.0.h.1.f", "fc", "a.fc"]


@given(st.dictionaries(st.sampled_from([*LLAMA[:-1], *EXPERTS, *WITHIN]), st.integers(1, 3), min_size=1))
def test_patterns_give_each_layer_its_value_as_here_so_in_peft(values):
    found = patterns_of(values, 2)
    here = by_pattern(found, [*values])
    # peft.utils.other.get_pattern_key
    peft = {
        name: next((value for key, value in found.items() if re.match(rf"(.*\.)?({key})$", name)), 2)
        for name in values
    }
    assert {name: here.get(name, 2) for name in values} == peft == values


def test_patterns_are_few_where_many_layers_have_a_value():
    values = {name: 8 if name.startswith("model.layers.0") else 4 for name in [*LLAMA[:-1], *EXPERTS]}
    assert patterns_of(values, 8) == {r"^model\.layers\.(?:1|2)\..*": 4}
    of_down = {name: 2 if name.endswith("w2") else value for name, value in values.items()}
    assert len(patterns_of(of_down, 8)) == 1 + 6  # w2, and in layers 1 and 2 the other six as one each


@pytest.mark.parametrize("own", [{}, {"down_proj": 2}], ids=["by depth", "and by part"])
def test_patterns_of_a_mixture_of_experts_are_matched_at_a_small_part_of_the_bound(own, monkeypatch):
    """Qwen3-30B-A3B's layers: 48 of 128 experts. Listing its experts took more than all the work allowed."""
    block = [f"self_attn.{part}_proj" for part in "qkvo"]
    block += [f"mlp.experts.{e}.{part}_proj" for e in range(128) for part in ("gate", "up", "down")]
    names = [f"model.layers.{layer}.{part}" for layer in range(48) for part in block]
    config = HyLoRADAConfig(
        lora_rank=8, rank_strategy="decreasing", target_modules="all-linear", rank_pattern=own
    )
    ranks = layer_ranks(names, names, config)
    found = patterns_of(ranks, 8)
    monkeypatch.setattr(patterns, "MAX_WORK", patterns.MAX_WORK // 2)
    got: dict[str, int] = {}
    for rank, matching in zip(found.values(), patterns.matches(found, names, endings=True), strict=True):
        got = dict.fromkeys(matching, rank) | got
    assert {name: got.get(name, 8) for name in names} == ranks
    # PEFT's own rule, by Python's engine, for the first and the last of the experts.
    for name in (name for name in names if ".experts." not in name or re.search(r"\.(0|127)\.\w+$", name)):
        peft = next((rank for key, rank in found.items() if re.match(rf"(.*\.)?({key})$", name)), 8)
        assert peft == ranks[name]
    assert shortest_targets(names, [*names, "lm_head"]) == tuple(
        f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")
    )


@pytest.mark.parametrize("endings", [("gate_proj", "up_proj", "down_proj"), ("up_proj",)])
def test_few_patterns_select_the_experts_of_some_layers(endings):
    """Qwen1.5-MoE's layers, as PEFT's layers_to_transform selects them: 2,160 names of 24 layers of 60."""
    names = [
        f"model.layers.{layer}.{part}_proj"
        for layer in range(24)
        for part in (
            "self_attn.q",
            *(f"mlp.experts.{e}.{p}" for e in range(60) for p in ("gate", "up", "down")),
        )
    ]
    chosen = [n for n in names if int(n.split(".")[2]) >= 12 and "experts" in n and n.endswith(endings)]
    targets = tuple(patterns_of({name: name in chosen for name in names}, False))
    assert len(targets) <= 12
    assert select_targets(names, HyLoRADAConfig(target_modules=targets)) == chosen
