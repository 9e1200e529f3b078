"""Checkpoints in bitsandbytes' 4 bits, against the numbers that bitsandbytes makes of them."""

import json
import shutil
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hylorada_jax.errors import ModelError
from hylorada_jax.math.quantized import as_array, quantized
from hylorada_jax.models.bitsandbytes import BitsAndBytesWeights
from hylorada_jax.models.loading import load_model, open_weights
from hylorada_jax.models.source import find_source
from hylorada_jax.models.weights_digest import files_digest, tree_digest
from parity_tests.fixtures.make_bitsandbytes import BITSANDBYTES, EXPECTED, TENSORS, digest
from parity_tests.tolerances import MODEL, UNIT_ROUNDOFF, relative_error

KEPT = json.loads(EXPECTED.read_text("utf-8"))


@pytest.mark.parametrize("name", KEPT["tensors"])
def test_numbers_are_those_of_bitsandbytes_bit_for_bit(name):
    weights, expected = BitsAndBytesWeights([TENSORS]), KEPT["tensors"][name]
    values = weights.read(name)
    assert values.dtype == expected["dtype"]
    assert values.shape == weights.shapes[name] == tuple(expected["shape"])
    assert digest(values) == expected["sha256"]
    for part in [(slice(1, 3),), (slice(2, 3), slice(5, 20)), (slice(0, 3), slice(7, None))]:
        np.testing.assert_array_equal(weights.read(name, part), values[part])


def test_a_checkpoint_is_the_model_that_transformers_dequantises():
    base = load_model(BITSANDBYTES)
    logits = base(jnp.asarray(KEPT["inputs"])).logits
    assert relative_error(np.asarray(logits), np.asarray(KEPT["logits"])) <= MODEL["float32"]
    assert files_digest(find_source(BITSANDBYTES), "float32") == tree_digest(base.params)


Q = "model.layers.0.self_attn.q_proj.weight"


def test_in_nf4_again_every_code_stays_as_it_was():
    pytest.importorskip("qwix")
    weights = open_weights(find_source(BITSANDBYTES))
    values = jnp.asarray(weights.read(Q).T, jnp.float32)
    again = jax.jit(quantized, static_argnums=(1, 2))(values, "nf4", "bfloat16")
    packed = load_file(BITSANDBYTES / "model.safetensors")[Q]
    theirs = np.hstack([packed >> 4, packed & 15]).reshape(values.T.shape)
    np.testing.assert_array_equal(again.qvalue, theirs.T)
    # Of a scale and of the sixteen values bfloat16 keeps eight bits, and of their product.
    assert relative_error(as_array(again), values) <= 3 * UNIT_ROUNDOFF["bfloat16"]


ABSMAX, MAP, STATE = Q + ".absmax", Q + ".quant_map", Q + ".quant_state.bitsandbytes__nf4"
BESIDE = ("absmax", "nested_absmax", "nested_quant_map", "quant_map", "quant_state.bitsandbytes__nf4")


def state(**changes):
    tensors = load_file(BITSANDBYTES / "model.safetensors")
    said = json.loads(tensors[STATE].tobytes()) | changes
    return np.frombuffer(json.dumps({k: v for k, v in said.items() if v is not ...}).encode(), np.uint8)


def write(directory, changed):
    tensors = load_file(BITSANDBYTES / "model.safetensors") | changed
    save_file({n: x for n, x in tensors.items() if x is not None}, directory / "model.safetensors")
    shutil.copy(BITSANDBYTES / "config.json", directory)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({STATE: None}, rf"{STATE}: nothing"),
        ({f"{Q}.{part}": None for part in BESIDE}, rf"{STATE}: nothing"),
        ({Q: None}, rf"{Q}: nothing instead of U8 \(2048, 1\)"),
        ({Q: np.zeros((2047, 1), np.uint8)}, rf"{Q}: U8 \(2047, 1\) instead of U8 \(2048, 1\)"),
        ({Q: np.zeros((64, 64), np.float32)}, rf"{Q}: F32 \(64, 64\) instead"),
        ({ABSMAX: np.zeros(63, np.uint8)}, rf"{ABSMAX}: U8 \(63,\) instead of U8 \(64,\)"),
        ({ABSMAX: np.zeros(64, np.float32)}, rf"{ABSMAX}: F32 \(64,\) instead of U8"),
        ({Q + ".nested_absmax": np.zeros(2, np.float32)}, r"F32 \(2,\) instead of F32 \(1,\)"),
        ({Q + ".SCB": np.zeros(64, np.float32)}, r"SCB: F32 \(64,\) instead of nothing"),
        ({MAP: np.linspace(-1, 1, 16, dtype=np.float32)}, rf"{MAP} in .*-0\.8.*not those of nf4"),
        ({STATE: np.frombuffer(b"{", np.uint8)}, rf"{STATE} in .*Expecting"),
        ({STATE: np.zeros(5000, np.uint8)}, r"U8 \(5000,\)"),
        ({STATE: state(quant_type="int4")}, "quant_type: 'int4'"),
        ({STATE: state(quant_type="fp4")}, "bitsandbytes__fp4: nothing"),
        ({STATE: state(blocksize=0)}, "blocksize: 0"),
        ({STATE: state(dtype="float64")}, "dtype: 'float64'"),
        ({STATE: state(shape=[2**30, 2**30])}, rf"{Q}: U8 \(2048, 1\) instead of"),
        ({STATE: state(nested_offset=...)}, "nested_blocksize and nested_offset"),
    ],
)
def test_a_damaged_checkpoint_is_refused(changed, said, tmp_path):
    write(tmp_path, changed)
    with pytest.raises(ModelError, match=said):
        open_weights(find_source(tmp_path))


@pytest.mark.parametrize("size", [64, 2**22, 2**31 - 1])
def test_a_block_of_more_scales_than_there_are_takes_no_memory_for_them(size, tmp_path):
    """The 64 scales are in one block, also where a file says that it has 2³¹ of them, which take 8 GB."""
    expected = open_weights(find_source(BITSANDBYTES)).read(Q)
    write(tmp_path, {STATE: state(nested_blocksize=size)})
    weights = open_weights(find_source(tmp_path))
    tracemalloc.start()
    try:
        values = weights.read(Q)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(values, expected)
    assert peak < 2**20  # numbers and their copies in float32: 24 KB


def test_codes_may_be_stored_as_other_elements(tmp_path):
    packed = load_file(BITSANDBYTES / "model.safetensors")[Q]
    expected = open_weights(find_source(BITSANDBYTES)).read(Q)
    for storage in (jnp.bfloat16, np.float32):
        write(tmp_path, {Q: packed.reshape(-1).view(storage)[:, None]})
        weights = open_weights(find_source(tmp_path))
        np.testing.assert_array_equal(weights.read(Q), expected)
        np.testing.assert_array_equal(weights.read(Q, (slice(5, 9),)), expected[5:9])


def test_a_shape_that_is_not_the_configs_is_refused(tmp_path):
    write(tmp_path, {STATE: state(shape=[32, 128])})
    with pytest.raises(ModelError, match=rf"wrong shape.*{Q} \(32, 128\) instead of \(64, 64\)"):
        load_model(tmp_path)
