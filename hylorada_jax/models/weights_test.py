import json
import struct

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from hylorada_jax.errors import ModelError
from hylorada_jax.models.weights import SafetensorsWeights, Slot, check_match, load_tree

LEAVES: dict[tuple[str, ...], tuple[int, ...]] = {
    ("a", "kernel"): (2, 3),
    ("layers", "kernel"): (2, 3, 4),
    ("norm", "scale"): (3,),
}
SLOTS = {
    "a.weight": Slot(("a", "kernel"), transpose=True),
    "layers.0.weight": Slot(("layers", "kernel"), (0,), transpose=True),
    "layers.1.weight": Slot(("layers", "kernel"), (1,), transpose=True),
    "norm.weight": Slot(("norm", "scale")),
}


def tensors(dtype=np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"a.weight": (3, 2), "layers.0.weight": (4, 3), "layers.1.weight": (4, 3), "norm.weight": (3,)}
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def test_tensors_go_where_their_slots_say(tmp_path):
    given = tensors()
    names = list(given)
    save_file({name: given[name] for name in names[:2]}, tmp_path / "1.safetensors")
    save_file({name: given[name] for name in names[2:]}, tmp_path / "2.safetensors")
    weights = SafetensorsWeights([tmp_path / "1.safetensors", tmp_path / "2.safetensors"])
    check_match(LEAVES, SLOTS, weights, lambda name: False, tmp_path)
    tree = load_tree(LEAVES, SLOTS, weights, np.dtype(np.float32))
    np.testing.assert_array_equal(tree["a"]["kernel"], given["a.weight"].T)
    stacked = np.stack([given["layers.0.weight"].T, given["layers.1.weight"].T])
    np.testing.assert_array_equal(tree["layers"]["kernel"], stacked)
    np.testing.assert_array_equal(tree["norm"]["scale"], given["norm.weight"])


@pytest.mark.parametrize("stored", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("wanted", [np.float32, ml_dtypes.bfloat16])
def test_each_tensor_is_cast_as_numpy_casts_it(tmp_path, stored, wanted):
    given = tensors(stored)
    save_file(given, tmp_path / "m.safetensors")
    tree = load_tree(LEAVES, SLOTS, SafetensorsWeights([tmp_path / "m.safetensors"]), np.dtype(wanted))
    np.testing.assert_array_equal(tree["norm"]["scale"], given["norm.weight"].astype(wanted))
    assert tree["norm"]["scale"].dtype == wanted


def test_on_cpu_the_buffer_that_was_read_into_is_the_jax_array(tmp_path, monkeypatch):
    save_file(tensors(), tmp_path / "m.safetensors")
    pointers = {}
    put = jax.device_put

    def watch(leaf):
        pointers[leaf.shape] = leaf.ctypes.data
        return put(leaf)

    monkeypatch.setattr(jax, "device_put", watch)
    tree = load_tree(LEAVES, SLOTS, SafetensorsWeights([tmp_path / "m.safetensors"]), np.dtype(np.float32))
    for leaf in jax.tree.leaves(tree):
        assert leaf.unsafe_buffer_pointer() == pointers[leaf.shape]


def test_a_mismatch_is_reported_from_both_sides(tmp_path):
    given = tensors()
    given["typo.weight"] = given.pop("a.weight")
    given["norm.weight"] = np.ones(5, np.float32)
    save_file(given, tmp_path / "m.safetensors")
    weights = SafetensorsWeights([tmp_path / "m.safetensors"])
    with pytest.raises(ModelError) as caught:
        check_match(LEAVES, SLOTS, weights, lambda name: False, tmp_path)
    assert "missing (1): a.weight" in str(caught.value)
    assert "unexpected (1): typo.weight" in str(caught.value)
    assert "wrong shape (1): norm.weight (5,) instead of (3,)" in str(caught.value)


def test_only_extras_known_to_be_harmless_pass(tmp_path):
    save_file(tensors() | {"inv_freq": np.ones(2, np.float32)}, tmp_path / "m.safetensors")
    weights = SafetensorsWeights([tmp_path / "m.safetensors"])
    check_match(LEAVES, SLOTS, weights, lambda name: name == "inv_freq", tmp_path)
    with pytest.raises(ModelError, match=r"unexpected \(1\): inv_freq"):
        check_match(LEAVES, SLOTS, weights, lambda name: False, tmp_path)


@pytest.mark.parametrize(("value", "dtype"), [(np.nan, np.float32), (np.inf, np.float32), (1e6, np.float16)])
def test_a_weight_that_is_or_becomes_infinite_is_named(tmp_path, value, dtype):
    given = tensors()
    given["layers.1.weight"][2, 1] = value
    save_file(given, tmp_path / "m.safetensors")
    weights = SafetensorsWeights([tmp_path / "m.safetensors"])
    with pytest.raises(ModelError, match=r"layers\.1\.weight in .*m\.safetensors has NaN or infinite"):
        load_tree(LEAVES, SLOTS, weights, np.dtype(dtype))


def entry(shape: object = (2,), offsets: object = (0, 8), dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


# Of a file with eight bytes of data: its header, as JSON or as it stands, and the length that it claims.
HEADERS: dict[str, tuple[object, int | None]] = {
    "no JSON": (b"{{{", None),
    "a list": ([], None),
    "nested deeply": (b'{"a":' + b"[" * 100_000, None),
    "no UTF-8": (b'{"\xff": 1}', None),
    "half a character": (rb'{"\ud800": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', None),
    "shorter than it claims": ({"a": entry()}, 10**6),
    "longer than a file can be": ({"a": entry()}, 2**64 - 1),
    "empty": (b"", None),
    "too large": ({f"{i:07}" * 9: entry((0,), (0, 0)) for i in range(75_000)}, None),
    "no such dtype": ({"a": entry(dtype="X9")}, None),
    "a dtype that is a number": ({"a": entry(dtype=3)}, None),
    "no tensor": ({"a": 3}, None),
    "a negative size": ({"a": entry((-2,))}, None),
    "no values": ({"a": entry((0,), (0, 0)), "b": entry()}, None),
    "no values, of a size that numpy has not": ({"a": entry((2**62, 0), (0, 0)), "b": entry()}, None),
    "sizes whose product wraps": ({"a": entry((2**33, 2**33))}, None),
    "more axes than numpy has": ({"a": entry((1,) * 200 + (2,))}, None),
    "overlapping": ({"a": entry(), "b": entry()}, None),
    "a gap": ({"a": entry((1,), (4, 8))}, None),
    "beyond the end": ({"a": entry((4,), (0, 16))}, None),
    "the end before the beginning": ({"a": entry((2,), (8, 0))}, None),
    "bytes left over": ({"a": entry((1,), (0, 4))}, None),
    "metadata that is not a text": ({"__metadata__": {"format": 3}, "a": entry()}, None),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_damaged_header_is_refused(tmp_path, case):
    header, length = HEADERS[case]
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = struct.pack("<Q", len(header) if length is None else length)
    (tmp_path / "m.safetensors").write_bytes(size + header + bytes(8))
    with pytest.raises(ModelError, match=r"m\.safetensors"):
        SafetensorsWeights([tmp_path / "m.safetensors"])


def test_a_truncated_file_is_named(tmp_path):
    save_file(tensors(), tmp_path / "m.safetensors")
    whole = (tmp_path / "m.safetensors").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "m.safetensors").write_bytes(whole[:length])
        with pytest.raises(ModelError, match=r"m\.safetensors: .*[\s\S]*download it again"):
            SafetensorsWeights([tmp_path / "m.safetensors"])


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    for name in ("1.safetensors", "2.safetensors"):
        save_file({"a.weight": np.ones(2, np.float32)}, tmp_path / name)
    with pytest.raises(ModelError, match="in one shard only"):
        SafetensorsWeights([tmp_path / "1.safetensors", tmp_path / "2.safetensors"])


@pytest.mark.parametrize(
    ("kind", "code"), [(np.int8, "I8"), (np.bool_, "BOOL"), (ml_dtypes.float8_e4m3fn, "F8_E4M3")]
)
def test_quantised_weights_are_refused_by_name(tmp_path, kind, code):
    save_file(tensors() | {"norm.weight": np.ones(3, kind)}, tmp_path / "m.safetensors")
    weights = SafetensorsWeights([tmp_path / "m.safetensors"])
    with pytest.raises(ModelError, match=rf"norm\.weight is {code}"):
        load_tree(LEAVES, SLOTS, weights, np.dtype(jnp.float32))
