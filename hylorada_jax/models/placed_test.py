"""Laws of a model that is cut over devices: each holds its share, and the numbers are those of one device."""

import gc
import importlib.util
import json
import math
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

import hylorada_jax.model
from hylorada_jax.adapter_bank import AdapterBank
from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.evaluation.perplexity import evaluate_perplexity
from hylorada_jax.math.quantized import plain
from hylorada_jax.model import HyLoRADAModel
from hylorada_jax.models import decoder_layer
from hylorada_jax.models.causal_lm import CausalLM
from hylorada_jax.models.decoder_config import DecoderConfig
from hylorada_jax.models.loading import empty_model, load_model
from hylorada_jax.models.placed import default_mesh
from hylorada_jax.models.quantize import quantize
from hylorada_jax.models.weights import SafetensorsWeights, Slot, load_tree
from hylorada_jax.models.weights_digest import tree_digest
from hylorada_jax.placement.axes import mesh_sizes
from hylorada_jax.placement.placement import Placement, parse_mesh

MESHES = ["data=8", "fsdp=8", "fsdp=2,tensor=2", "fsdp=2,tensor=4"]
COMPUTED = MESHES[-2:]
CONFIG = HyLoRADAConfig(method="hylorada", lora_rank=2, target_modules=("k_proj", "down_proj"))
SHAPE = {
    "model_type": "qwen2", "vocab_size": 40, "hidden_size": 16, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3,
    "tie_word_embeddings": False,
}  # fmt: skip


def write(directory):
    """A model's files."""
    (directory / "config.json").write_text(json.dumps(SHAPE))
    base = CausalLM.from_config(DecoderConfig.from_hf(SHAPE), jax.random.key(0), dtype=np.float32)
    tensors = {}
    for (*path, leaf), value in flatten_dict(base.params).items():
        name = lambda at, leaf=leaf: ".".join([*at, "bias" if leaf == "bias" else "weight"])
        turn = lambda x, leaf=leaf: np.ascontiguousarray(x.T if leaf == "kernel" else x)
        if "layers" not in path:
            tensors[name(path)] = turn(np.asarray(value))
            continue
        for number, layer in enumerate(np.asarray(value)):
            tensors[name([*path[:2], str(number), *path[2:]])] = turn(layer)
    save_file(tensors, directory / "model.safetensors")


def shares(tree):
    """For each leaf, how many bytes the device with most of them has, and how many there are."""
    return {
        "/".join(path): (max(part.data.nbytes for part in leaf.addressable_shards), leaf.nbytes)
        for path, leaf in flatten_dict(tree).items()
    }


def held():
    """The bytes of all arrays on each device, by their shardings: to look at a part makes another array."""
    gc.collect()
    bytes_on = dict.fromkeys(jax.devices(), 0)
    for array in jax.live_arrays():
        for device in array.sharding.device_set:
            bytes_on[device] += math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
    return np.array([*bytes_on.values()])


def largest_read(load):
    """What a call gives, and the numbers of the largest array that it read from a file."""
    sizes, read = [0], SafetensorsWeights.read

    def counted(*arguments):
        sizes.append((tensor := read(*arguments)).size)
        return tensor

    with mock.patch.object(SafetensorsWeights, "read", counted):
        return load(), max(sizes)


def facts(directory, placement=None, *, computed=True):
    """What one placement makes of the files."""
    before = held()
    base, read = largest_read(lambda: load_model(directory, dtype=np.float32, placement=placement))
    most = int((held() - before).max())
    model = HyLoRADAModel(base, CONFIG)
    adapters = shares(model.adapters)
    rng = np.random.default_rng(1)
    model.adapters = jax.tree.map(
        lambda x: jax.device_put(np.asarray(x) + 0.1 * rng.normal(size=x.shape), x.sharding), model.adapters
    )
    documents = [np.random.default_rng(n).integers(0, 40, 30) for n in range(5)]
    prompts = [[1, 2, 3], [4, 5], [6], [7, 8, 9, 10]]
    found = {"read": read, "held": most, "params": shares(base.params), "adapters": adapters}
    found["digest"] = tree_digest(base.params)
    if model.placement is not None:
        found["undivided"] = model.placement.undivided(base.params)
    found["norms"] = np.asarray(
        model.frozen["constants"]["model"]["layers"]["mlp"]["down_proj"]["norm"]
    ).tolist()
    model.save_pretrained(Path(directory) / "adapter", overwrite=True)
    again = HyLoRADAModel.from_pretrained(base, Path(directory) / "adapter")
    found["again"] = shares(again.adapters) == adapters
    if not computed:
        return found
    found["loss"] = evaluate_perplexity(model, documents, seq_len=16, batch_size=3, progress=False).loss
    found["tokens"] = model.generate(prompts, max_new_tokens=6)
    found["streamed"] = [token for some in model.stream(prompts[0], max_new_tokens=6) for token in some]
    found["logits"] = np.asarray(model(jnp.array([[1, 2, 3, 4]])).logits).tolist()
    return found


def in_use_facts(directory, placement):
    """The mesh that a layer, and adapters that are resolved, find in use in each kind of call."""
    model = HyLoRADAModel(load_model(directory, dtype=np.float32, placement=placement), CONFIG)
    seen, ids = [], jnp.ones((2, 6), int)

    def noting(function):
        def noted(*arguments, **options):
            mesh = jax.sharding.get_abstract_mesh()
            seen.append(",".join(f"{axis}={size}" for axis, size in mesh.shape.items()))
            return function(*arguments, **options)

        return noted

    def during(call, *arguments):
        seen.clear()
        return np.asarray(call(*arguments)).tolist(), sorted({*seen})

    bank = AdapterBank(model)
    bank.stack()  # resolved under the mesh, once
    logits = lambda ids: model(ids).logits

    def disabled(ids):
        with model.disable_adapter():
            return logits(ids)

    def measured(ids):
        return evaluate_perplexity(model, ids, seq_len=6, batch_size=2, progress=False).loss

    def merged(ids):
        return model.merge_and_unload()(ids).logits

    def within(ids):
        with jax.set_mesh(parse_mesh(COMPUTED[0])):
            return jax.jit(lambda adapters, ids: model.apply(adapters, ids).logits)(model.adapters, ids)

    calls = {"called": logits, "disabled": disabled, "measured": measured, "merged": merged, "within": within}
    calls["by row"] = lambda ids: bank(ids, ["default", None]).logits
    calls["compiled by the user"] = jax.jit(lambda ids: model(ids).logits)
    with (
        mock.patch.object(decoder_layer, "attend", noting(decoder_layer.attend)),
        mock.patch.object(hylorada_jax.model, "resolve", noting(hylorada_jax.model.resolve)),
    ):
        found = {}
        for name, call in calls.items():
            jax.clear_caches()  # what is compiled already is not traced
            found[name] = during(call, ids)
    programs = [model(ids) and model._jitted._cache_size() for _ in range(2)]  # type: ignore[attr-defined]
    found["compiled anew"] = programs[1] - programs[0]
    return found


def several_facts(directory, placement=None):
    """What one placement makes of them with two adapters, by row and merged."""
    base = load_model(directory, dtype=np.float32, placement=placement)
    model = HyLoRADAModel(base, HyLoRADAConfig(method="dora", lora_rank=2))
    rng = np.random.default_rng(1)
    noisy = lambda: jax.tree.map(lambda x: np.asarray(x) + 0.1 * rng.normal(size=x.shape), model.adapters)
    bank = AdapterBank(model)
    bank.add("noisy", noisy())
    bank.switch("noisy")
    model.save_pretrained(Path(directory) / "noisy", overwrite=True)
    bank.load("loaded", Path(directory) / "noisy")
    bank.switch("loaded")
    ids = jnp.array([[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]])
    merged = model.merge_and_unload()
    model.adapters = jax.tree.map(jnp.copy, model.adapters)  # as a trainer leaves them
    by_row = lambda ids: bank(ids, ["noisy", "default", None, "loaded"]).logits
    return {
        "compiled around": np.asarray(jax.jit(by_row)(ids)).tolist(),
        "shares": shares(model.adapters),
        "rows": np.asarray(by_row(ids)).tolist(),
        "alone": np.asarray(model(ids).logits).tolist(),
        "merged": np.asarray(merged(ids).logits).tolist(),
        "params": shares(merged.params) == shares(base.params),
    }


def quantised_facts(directory, placement=None):
    """What one placement makes of them in nf4, the head too."""
    base = load_model(directory, base_dtype="nf4+head", placement=placement)
    codes = base.params["model"]["layers"]["mlp"]["up_proj"]["kernel"].qvalue
    afterwards = quantize(load_model(directory, placement=placement).params, "nf4+head")
    pairs = zip(jax.tree.leaves(afterwards), jax.tree.leaves(base.params), strict=True)
    return {
        "cut alike": all(code.sharding.is_equivalent_to(other.sharding, code.ndim) for code, other in pairs),
        "digest": tree_digest(base.params),
        "share": codes.size // codes.addressable_shards[0].data.size,
        "logits": np.asarray(base(jnp.array([[1, 2, 3, 4]])).logits).tolist(),
    }


def odd_tiles_facts(placement):
    """How the numbers of a kernel of five tiles are cut, and how the kernel was."""
    params = placement.put({"q_proj": {"kernel": jnp.ones((2, 20, 8))}})
    kernels = params, plain(quantize(params, "nf4"))
    return [kernel["q_proj"]["kernel"].addressable_shards[0].data.shape for kernel in kernels]


def turned_facts(directory, placement):
    """Whether tensors [experts, out, in] are read as their leaf has them, and the largest part read."""
    tensors = np.arange(2 * 3 * 8 * 16, dtype=np.float32).reshape(2, 3, 8, 16)
    save_file({str(layer): tensor for layer, tensor in enumerate(tensors)}, directory / "experts.safetensors")
    weights, path = SafetensorsWeights([directory / "experts.safetensors"]), ("experts", "gate_up_proj")
    slots = {name: Slot(path, (int(name),), transpose=True) for name in weights.shapes}
    tree, read = largest_read(lambda: load_tree({path: (2, 3, 16, 8)}, slots, weights, np.float32, placement))
    return bool(np.array_equal(tree["experts"]["gate_up_proj"], tensors.swapaxes(2, 3))), read


def measure(directory):
    """What is found on eight devices, as JSON on stdout."""
    write(Path(directory))
    found = {}
    for mesh in MESHES:
        found[mesh] = facts(directory, Placement(parse_mesh(mesh)), computed=mesh in COMPUTED)
    found["alone"] = facts(directory)
    found["several"] = [
        several_facts(directory, place) for place in (Placement(parse_mesh(COMPUTED[0])), None)
    ]
    found["in use"] = [in_use_facts(directory, place) for place in (Placement(parse_mesh(COMPUTED[0])), None)]
    found["quantised"] = None
    if importlib.util.find_spec("qwix"):
        placement = Placement(parse_mesh(COMPUTED[0]))
        found["quantised"] = [quantised_facts(directory, place) for place in (placement, None)]
        found["odd tiles"] = odd_tiles_facts(Placement(parse_mesh("fsdp=2,tensor=2,data=2")))
    found["turned"] = turned_facts(Path(directory) / "adapter", Placement(parse_mesh("fsdp=2,tensor=4")))
    found["default"] = {}
    params = load_model(directory).params
    for name, spare in (("roomy", 0), ("small", -1)):
        memory = 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(params)) + spare
        found["default"][name] = default_mesh(empty_model(directory), memory)
    found["default"]["unknown"] = default_mesh(empty_model(directory), None)
    odd = {
        "q_proj": {
            "kernel": jax.ShapeDtypeStruct((6, 8), "float32"),
            "lora_A": jax.ShapeDtypeStruct((2, 16), "f4"),
        }
    }
    found["undivided"] = Placement(parse_mesh("fsdp=4,tensor=2")).undivided(odd)
    print(json.dumps(found))


@pytest.fixture(scope="module")
def found(tmp_path_factory, run_on_devices):
    program = f"import sys\nfrom {__name__} import measure\nmeasure(sys.argv[1])"
    return json.loads(run_on_devices(8, program, tmp_path_factory.mktemp("model")))


on_each_mesh = pytest.mark.parametrize("mesh", MESHES)


@on_each_mesh
def test_weights_are_the_files_bit_by_bit(mesh, found):
    assert found[mesh]["digest"] == found["alone"]["digest"]


@on_each_mesh
def test_fresh_and_loaded_adapters_are_those_of_one_device(mesh, found):
    np.testing.assert_allclose(found[mesh]["norms"], found["alone"]["norms"], rtol=1e-6)
    assert found[mesh]["again"]


# Of the weights; norms, biases, gates are whole, and over tensor what cuts heads.
SHARES = {"data=8": 1, "fsdp=8": 8, "fsdp=2,tensor=2": 4, "fsdp=2,tensor=4": 8}


@pytest.mark.parametrize(("mesh", "share"), SHARES.items(), ids=SHARES)
def test_no_device_holds_more_than_its_share(mesh, share, found):
    params, adapters = found[mesh]["params"], found[mesh]["adapters"]
    for path, (held, whole) in params.items():
        if path.endswith(("kernel", "embedding")):
            heads = mesh == "fsdp=2,tensor=4" and ("k_proj" in path or "v_proj" in path)
            assert held == whole // (2 if heads else share), path
        else:
            assert held == whole, path
    for path, (held, whole) in adapters.items():
        assert held == whole // (mesh_sizes(mesh, 8)["fsdp"] if path.endswith(("lora_A", "lora_B")) else 1), (
            path
        )
    # At no time: what loading leaves is on the device, and nothing beside it.
    assert found[mesh]["held"] == sum(held for held, _ in params.values())
    assert found[mesh]["read"] <= 48 * 16 // (2 if mesh == "fsdp=2,tensor=4" else share)


@pytest.mark.parametrize("mesh", COMPUTED)
def test_a_model_on_a_mesh_computes_what_it_does_on_one_device(mesh, found):
    ours, alone = found[mesh], found["alone"]
    # float32, and sums in another order; logits are of order 10.
    np.testing.assert_allclose(ours["loss"], alone["loss"], rtol=1e-6)
    np.testing.assert_allclose(ours["logits"], alone["logits"], rtol=0, atol=1e-4)
    assert ours["tokens"] == alone["tokens"]
    assert ours["streamed"] == alone["tokens"][0]


def test_the_mesh_of_a_model_is_in_use_where_it_is_called_measured_and_merged(found):
    """Also for the base alone; what a user compiles has the mesh that the user has in use."""
    for calls, mesh in zip(found["in use"], ("data=2,fsdp=2,tensor=2", ""), strict=True):
        for name in ("called", "disabled", "merged"):
            assert calls[name][1] == [mesh], name
        assert calls["measured"][1] == [mesh or "data=8,fsdp=1,tensor=1"]  # rows, over copies of the weights
        assert calls["within"][1] == ["data=2,fsdp=2,tensor=2"]
        assert calls["by row"][1] == calls["compiled by the user"][1] == [""]
        assert calls["compiled anew"] == 0
    for name in ("called", "by row", "disabled", "measured", "merged", "within", "compiled by the user"):
        ours, alone = (calls[name][0] for calls in found["in use"])
        np.testing.assert_allclose(ours, alone, rtol=0, atol=1e-4, err_msg=name)


def test_adapters_by_row_and_merged_on_a_mesh_are_those_of_one_device(found):
    ours, alone = found["several"]
    for name in ("compiled around", "rows", "alone", "merged"):
        np.testing.assert_allclose(ours[name], alone[name], rtol=0, atol=1e-4)
    np.testing.assert_allclose(ours["merged"], ours["alone"], rtol=0, atol=1e-4)
    assert ours["params"]
    for path, (held, whole) in ours["shares"].items():
        assert held == whole // (2 if path.endswith(("lora_A", "lora_B")) else 1), path


def test_a_quantised_model_on_a_mesh_is_that_on_one_device(found):
    if found["quantised"] is None:
        pytest.skip("qwix is not installed")
    ours, alone = found["quantised"]
    assert ours["digest"] == alone["digest"]
    assert (ours["share"], alone["share"]) == (4, 1)
    assert ours["cut alike"]
    np.testing.assert_allclose(ours["logits"], alone["logits"], rtol=0, atol=1e-4)
    assert found["odd tiles"] == [[2, 10, 4]] * 2


def test_of_turned_experts_each_device_reads_its_share(found):
    assert found["turned"] == [True, 3 * 16 * 8 // 8]


@pytest.mark.parametrize(
    ("memory", "mesh", "why"),
    [
        ("roomy", "", "data=8: each device has the weights, 0.0 of the 0.0 GiB of each device"),
        (
            "small",
            "fsdp=8",
            "fsdp=8: the weights are cut, for a copy would take 0.0 of the 0.0 GiB of each device",
        ),
        ("unknown", "", "data=8: each device has the weights, for none states its memory"),
    ],
)
def test_weights_are_copied_where_that_leaves_half_of_the_memory(memory, mesh, why, found):
    assert found["default"][memory] == [mesh, why]


def test_what_does_not_divide_is_listed(found):
    assert found["undivided"] == ["q_proj/kernel (6, 8), not over fsdp"]
    for mesh in MESHES:  # two key-value heads, of which no device gets a part
        heads = ["k", "v"] if mesh == "fsdp=2,tensor=4" else []
        lines = found[mesh]["undivided"]
        assert [line.split(" ")[0].split("/")[-2] for line in lines] == [f"{name}_proj" for name in heads]
        assert all(line.endswith(", not over tensor") for line in lines)
