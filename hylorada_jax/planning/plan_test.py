"""Oracles: bytes counted by hand, and a compiler whose answers are known."""

import dataclasses

import jax
import pytest

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import ConfigError
from hylorada_jax.models.decoder_config import DecoderConfig
from hylorada_jax.planning.cases import Figures
from hylorada_jax.planning.chips import CHIPS, parse_topology
from hylorada_jax.planning.plan import Devices, argument_bytes, best, plan, sensible_meshes
from hylorada_jax.planning.programs import base_of_shapes
from hylorada_jax.planning.shapes import SHAPES

SHAPE = {
    "model_type": "llama", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True,
}  # fmt: skip
LORA = HyLoRADAConfig(method="lora", lora_rank=2, target_modules=("q_proj",))
CHIP = CHIPS["v5e"]
START = 4 * 3 * 2 * (16 + 16) // 8  # A and B that a run starts with, of three layers, over eight chips


@pytest.fixture(scope="module")
def base():
    return base_of_shapes(DecoderConfig.from_hf(SHAPE))


def devices(memory, count=8):
    return Devices("v5e:2x4", count, CHIP, memory)


def test_arguments_are_counted_by_shards(base):
    cut, whole = 2 * (32 * 16 + 3 * (4 * 16 * 16 + 3 * 16 * 24)), 2 * 7 * 16
    # Of W ‖W‖² of three rows of 16, and s of three layers; A, B and two moments of each, all of rank 2.
    constants, adapters = 4 * (3 * 16 + 3), 4 * 3 * 3 * 2 * (16 + 16)
    one, four = (argument_bytes(base, LORA, mesh, 4) for mesh in ("data=4", "fsdp=4"))
    small = one - cut - whole - adapters
    assert constants <= small < constants + 100  # and a few counters
    assert four == one - 3 * (cut + adapters) / 4


def test_codes_of_four_bits_are_half_a_byte(base):
    pytest.importorskip("qwix")
    kernels, scales = 3 * (4 * 16 * 16 + 3 * 16 * 24), 3 * (4 * 16 + 2 * 24 + 3 * 16)
    coded = base_of_shapes(DecoderConfig.from_hf(SHAPE), "nf4")
    expected = argument_bytes(base, LORA, "", 1) - 2 * kernels + kernels // 2 + 2 * scales
    assert argument_bytes(coded, LORA, "", 1) == expected


@pytest.mark.parametrize("mesh", ["fsdp=2,tensor=2", "fsdp=4", "data=4", "fsdp=3"])
def test_a_mesh_of_devices_that_are_not_there_is_checked(base, mesh):
    if mesh == "fsdp=3":
        with pytest.raises(ConfigError, match="on 4 devices"):
            argument_bytes(base, LORA, mesh, 4)
    else:
        assert argument_bytes(base, LORA, mesh, 4) > 0
    with pytest.raises(ConfigError, match="must divide the model's attention heads"):
        argument_bytes(base, LORA, "tensor=8", 8)


@pytest.mark.parametrize(
    ("room", "meshes"),
    [
        (2.1, ["data=8,fsdp=1", "fsdp=8", "fsdp=4,tensor=2", "fsdp=2,tensor=4"]),
        (1.9, ["data=4,fsdp=2", "fsdp=8", "fsdp=4,tensor=2", "fsdp=2,tensor=4"]),
        (0.1, ["fsdp=8", "fsdp=4,tensor=2", "fsdp=2,tensor=4"]),
    ],
)
def test_meshes_leave_room_where_they_copy(base, room, meshes):
    memory = int(room * argument_bytes(base, LORA, "data=8", 8))
    assert sensible_meshes(base, LORA, devices(memory)) == meshes


def compiler(needed):
    """Answers by remat, and says what it was asked."""
    asked = []

    def compiled(case):
        asked.append(case)
        temporary = needed[case.remat]
        figures = Figures(case, 8 * case.rows, needed_bytes=temporary, temp_bytes=temporary)
        if temporary > 1000:
            return dataclasses.replace(figures, refused=True, needed_bytes=None, limit_bytes=1000)
        recomputed = {"full": 4, "dots": 3.5, "none": 3}[case.remat]
        sent = {"all-gather": 2 * CHIP.links}
        return dataclasses.replace(
            figures, flops=recomputed * CHIP.flops, bytes_accessed=CHIP.bandwidth, sent_bytes=sent
        )

    return asked, compiled


def test_less_is_computed_again_while_it_fits(base):
    asked, compiled = compiler({"full": 500, "dots": 900, "none": 1100})
    memory = 10**9
    rows = [*plan(base, LORA, devices(memory), compiled, seq_len=16, meshes=["fsdp=8"], rows=(1, 2))]
    assert [(case.remat, case.rows) for case in asked] == [
        (remat, number) for number in (1, 2) for remat in ("full", "dots", "none")
    ]
    least = START + argument_bytes(base, LORA, "fsdp=8", 8)
    assert [(row.fits, row.excess) for row in rows] == [(True, 0), (True, 0), (False, 100 + least)] * 2
    assert [row.seconds for row in rows] == [4, 3.5, None] * 2
    winner = best(rows)
    assert winner is not None
    assert (winner.figures.case.remat, winner.figures.case.rows, winner.bound) == ("dots", 2, "flops")
    assert winner.tokens_per_second == 8 * 2 * 16 / 3.5

    # Without an estimate what is cut more is no better.
    plain = [dataclasses.replace(row, seconds=None, tokens_per_second=None) for row in rows]
    cut = [
        dataclasses.replace(
            row, figures=dataclasses.replace(row.figures, case=row.figures.case._replace(mesh="tensor=8"))
        )
        for row in plain
    ]
    assert best([*plain, *cut]) == plain[4]


def test_nothing_is_compiled_where_weights_alone_do_not_fit(base):
    asked, compiled = compiler({})
    memory = START + argument_bytes(base, LORA, "fsdp=8", 8) - 1
    (row,) = plan(base, LORA, devices(memory), compiled, seq_len=16, meshes=["fsdp=8"])
    assert not asked
    assert (row.fits, row.excess) == (False, 1)
    assert best([row]) is None


@pytest.mark.parametrize(
    ("text", "count"), [("v5e:4x4", 16), ("v5p:2x2x4", 16), ("v6e:2x4", 8), ("v5e:1x1", 1)]
)
def test_a_topology_has_as_many_chips_as_its_axes_multiply_to(text, count):
    assert parse_topology(text)[1] == count


@pytest.mark.parametrize("text", ["v5e", "v5e:4", "v5e:2x2x2", "v5p:4x4", "v9:2x2", "v5e:0x2", "v5e:2x2 "])
def test_another_topology_is_refused(text):
    with pytest.raises(ConfigError, match="A topology must be"):
        parse_topology(text)


@pytest.mark.parametrize(("name", "billions"), [("1b", 1.236), ("8b", 8.030), ("32b", 32.76), ("70b", 70.55)])
def test_shapes_have_the_parameters_of_the_models_that_they_are_of(name, billions):
    """As the models' cards count them; the biases of Qwen's q, k and v are few."""
    params = base_of_shapes(DecoderConfig.from_hf(SHAPES[f"llama-{name}"])).params
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e9 == pytest.approx(billions, rel=1e-3)
