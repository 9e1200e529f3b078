"""The cuts of layers into stacks, against a list of the layers run one after another."""

import itertools

import pytest

from hylorada_jax.models.decoder_config import DecoderConfig
from hylorada_jax.models.stacks import LAYERS, layer_numbers, parts_of, patterns

SHAPE = {"model_type": "qwen3_moe", "moe_intermediate_size": 12, "num_experts": 2, "num_experts_per_tok": 1}


@pytest.mark.parametrize(
    "dense", [[], [0], [3], [0, 1], range(8), range(0, 8, 2), [0, 1, 3, 4, 6, 7], [2, 4]]
)
def test_the_stacks_run_every_layer_once_and_in_order(dense):
    config = DecoderConfig.from_hf(SHAPE | {"num_hidden_layers": 8, "mlp_only_layers": [*dense]})
    ran = []
    for repeats, stacks in parts_of(config):
        for repeat, stack in itertools.product(range(repeats), stacks):
            own = stack.numbers[repeat * stack.together :][: stack.together]
            ran += [(number, stack.config.mixture is None) for number in own]
        assert all(len(stack.numbers) == repeats * stack.together for stack in stacks)
    assert ran == [(number, number in dense) for number in range(8)]


def test_layers_of_one_shape_are_one_stack():
    for dense in ([], [*range(8)]):
        config = DecoderConfig.from_hf(SHAPE | {"num_hidden_layers": 8, "mlp_only_layers": dense})
        assert layer_numbers(config) == {LAYERS: tuple(range(8))}


@pytest.mark.parametrize(
    ("kinds", "cut"),
    [("a" * 9, [(1, 9)]), ("sssssf" * 10, [(6, 10)]), ("ssssf" * 3 + "SSSSF" * 4, [(5, 3), (5, 4)])],
)
def test_a_pattern_that_repeats_is_one_part(kinds, cut):
    assert patterns(kinds) == cut
