import dataclasses
import functools
import itertools
import json
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from hylorada_jax.cli.merge import merge  # noqa: E402
from hylorada_jax.config import HyLoRADAConfig  # noqa: E402
from hylorada_jax.errors import CheckpointError, HyLoRADAError, ModelError  # noqa: E402
from hylorada_jax.exchange.merged import write_merged  # noqa: E402
from hylorada_jax.exchange.merged_tensors import cast  # noqa: E402
from hylorada_jax.model import HyLoRADAModel  # noqa: E402
from hylorada_jax.models.generation_config import generation_defaults  # noqa: E402
from hylorada_jax.models.gguf_test import KEYS, write_gguf  # noqa: E402
from hylorada_jax.models.loading import load_model  # noqa: E402
from hylorada_jax.models.sampling import sampling  # noqa: E402
from hylorada_jax.models.tokenizer import load_tokenizer  # noqa: E402
from hylorada_jax.saved.adapter_files import write_adapter  # noqa: E402
from hylorada_jax.saved.saved_adapter import open_adapter  # noqa: E402
from hylorada_jax.surgery import layout  # noqa: E402
from parity_tests.memory import needs_proc, peak_memory  # noqa: E402

VOCAB = 37
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
FAMILIES = {
    # Conv1D, biases everywhere, tied; c_proj and wpe are square: no shape shows their orientation.
    "gpt2": transformers.GPT2Config(
        vocab_size=VOCAB, n_layer=2, n_head=2, n_embd=16, n_positions=16, initializer_range=0.2
    ),
    "llama": transformers.LlamaConfig(**LLAMA, tie_word_embeddings=False),
    "qwen2": transformers.Qwen2Config(**LLAMA, tie_word_embeddings=True),
}
CONFIGS = {
    "lora": HyLoRADAConfig(method="lora", lora_rank=2, target_modules=("all-linear",)),
    "dora": HyLoRADAConfig(method="dora", lora_rank=4, rank_strategy="decreasing", use_rslora=True),
    "v1": HyLoRADAConfig(
        method="hylorada_v1", lora_rank=2, target_modules=("all-linear",), magnitude_scales_bias=True
    ),
    "longlora": HyLoRADAConfig(method="longlora", lora_rank=2, s2_group_size=4),
    "unified": HyLoRADAConfig(method="hylorada", lora_rank=2),
}
IDS = np.random.default_rng(0).integers(VOCAB, size=(2, 9))


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Small random models of every family, as transformers saves them."""
    root = tmp_path_factory.mktemp("bases")
    for name, config in FAMILIES.items():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():  # biases and norms too
            parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(root / name)
    return root


def moved(model):
    """The model, its adapters far from their start."""
    rng, tensors = np.random.default_rng(1), layout.flatten(model.sites, model.adapters)
    tensors = {name: (t + 0.2 * rng.normal(size=t.shape)).astype(np.float32) for name, t in tensors.items()}
    model.adapters = layout.unflatten(model.sites, tensors)
    return model


@pytest.fixture(scope="module")
def adapted(bases):
    """(family, config name) → an adapted model whose adapters, all of them, are far from their start."""
    found = {}

    def make(family, name):
        if (family, name) not in found:
            found[family, name] = moved(HyLoRADAModel(load_model(bases / family), CONFIGS[name]))
        return found[family, name]

    return make


def in_torch(directory, ids=IDS):
    """The logits of a checkpoint, of which transformers must know every tensor and miss none."""
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not any(loading.values())
    with torch.no_grad():
        return model.eval()(torch.from_numpy(ids)).logits.numpy()


QUICK = {("gpt2", "v1"), ("llama", "dora"), ("qwen2", "longlora")}
CASES = [
    pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
    for case in itertools.product(FAMILIES, ("lora", "dora", "v1", "longlora"))
]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_transformers_computes_with_it_what_the_adapted_model_does(bases, adapted, tmp_path, family, name):
    model = adapted(family, name)
    model.save_pretrained(tmp_path / "adapter")
    write_merged(bases / family, tmp_path / "adapter", tmp_path / "merged")
    expected = np.asarray(model(jnp.asarray(IDS)).logits)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(in_torch(tmp_path / "merged") / scale, expected / scale, atol=1e-5, rtol=0)
    assert np.abs(in_torch(bases / family) - expected).max() > 0.1 * scale


def test_shards_make_the_same_model(bases, adapted, tmp_path):
    adapted("llama", "dora").save_pretrained(tmp_path / "adapter")
    write_merged(bases / "llama", tmp_path / "adapter", tmp_path / "one")
    write_merged(bases / "llama", tmp_path / "adapter", tmp_path / "many", max_shard_bytes=5000)
    assert len(list((tmp_path / "many").glob("model-*-of-*.safetensors"))) > 2
    np.testing.assert_array_equal(in_torch(tmp_path / "many"), in_torch(tmp_path / "one"))


def sigmoid(x):
    return 1 / (1 + np.exp(-np.float64(x)))


def formula(stored, leaves, name, scale, turned):
    """W' of HyLoRADA v1 in float64, as method.md has it, and c."""
    W = stored[f"{name}.weight"].astype(np.float64)
    W = W.T if turned else W
    leaf = {key: leaves[f"{name}.{key}"].astype(np.float64) for key in ("lora_A", "lora_B", "magnitude")}
    g, beta = (sigmoid(leaves[f"{name}.{key}"]) for key in ("magnitude_gate", "residual_weight"))
    V = W + scale * leaf["lora_B"] @ leaf["lora_A"]
    m = g * leaf["magnitude"] + (1 - g) * np.linalg.norm(W, axis=1)
    c = (1 - beta) * m / np.linalg.norm(V, axis=1) + beta
    merged = c[:, None] * V
    return merged.T if turned else merged, c


def nearest(values, dtype):
    """The nearest numbers that a dtype has, ties to even."""
    kind = jnp.finfo(dtype)
    exponent = np.maximum(np.frexp(values)[1], kind.minexp + 1) - (kind.nmant + 1)
    return np.ldexp(np.rint(np.ldexp(values, -exponent)), exponent)


def test_numbers_just_beside_a_tie_are_rounded_to_their_own_side():
    ties = np.concatenate([[1 + 2**-8, 1 + 3 * 2**-8], np.arange(1, 300, 2) / 2**9 + 1]) * 2.0**-20
    values = np.concatenate([sign * ties * (1 + d) for sign in (1, -1) for d in (-(2**-45), 0, 2**-45)])
    values = np.concatenate([values, [0.0, 1e-50, -1e-50, 3.3e38]])
    for dtype in (np.dtype(jnp.bfloat16), np.dtype(np.float16), np.dtype(np.float32)):
        within = values[np.abs(values) < float(jnp.finfo(dtype).max)]
        (found,) = cast(functools.partial(iter, [within]), dtype, "x", lambda: None)
        np.testing.assert_array_equal(found.astype(np.float64), nearest(within, dtype))


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
@pytest.mark.parametrize(
    ("source", "written"),
    [
        ("bfloat16", None),
        ("float16", None),
        ("float32", None),
        ("float64", None),
        ("float32", "bfloat16"),
        ("bfloat16", "float32"),
    ],
)
def test_each_weight_is_the_float64_result_rounded_once(bases, adapted, tmp_path, family, source, written):
    model = adapted(family, "v1")
    model.save_pretrained(tmp_path / "adapter")
    base, merged = tmp_path / "base", tmp_path / "merged"
    base.mkdir()
    (base / "config.json").write_text((bases / family / "config.json").read_text())
    stored = {
        name: tensor.astype(jnp.dtype(source))
        for name, tensor in load_file(bases / family / "model.safetensors").items()
    }
    save_file(stored, base / "model.safetensors")
    write_merged(base, tmp_path / "adapter", merged, written)
    found, dtype = load_file(merged / "model.safetensors"), jnp.dtype(written or source)
    assert {tensor.dtype for tensor in found.values()} == {dtype}
    assert found.keys() == stored.keys()
    leaves = open_adapter(tmp_path / "adapter").tensors()
    adapted_tensors: set[str] = set()
    for site in model.sites:
        for name, scale in zip(site.names, site.scales, strict=True):
            expected, c = formula(stored, leaves, name, scale, turned=family == "gpt2")
            pairs = {f"{name}.weight": expected}
            if f"{name}.bias" in stored:
                pairs[f"{name}.bias"] = c * stored[f"{name}.bias"].astype(np.float64)
            for tensor, values in pairs.items():
                wide = found[tensor].astype(np.float64)
                if dtype == np.float64:
                    np.testing.assert_allclose(wide, values, rtol=1e-14)
                else:
                    np.testing.assert_array_equal(wide, nearest(values, dtype))
            adapted_tensors |= pairs.keys()
    assert len(adapted_tensors) > len(found) / 3
    for name in stored.keys() - adapted_tensors:
        np.testing.assert_array_equal(found[name], stored[name].astype(dtype))


def test_a_tied_head_stays_tied_to_the_trained_embedding(bases, adapted, tmp_path):
    model = adapted("qwen2", "longlora")
    model.save_pretrained(tmp_path / "adapter")
    stored = load_file(bases / "qwen2" / "model.safetensors")
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text((bases / "qwen2" / "config.json").read_text())
    save_file(
        {**stored, "lm_head.weight": stored["model.embed_tokens.weight"]},
        base / "model.safetensors",
        {"format": "pt"},
    )
    write_merged(base, tmp_path / "adapter", tmp_path / "merged")
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() == stored.keys()
    expected = np.asarray(model(jnp.asarray(IDS)).logits)
    np.testing.assert_allclose(in_torch(tmp_path / "merged"), expected, atol=1e-5 * np.abs(expected).max())


BERT = transformers.BertConfig(
    vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20
)
T5 = transformers.T5Config(vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=20, num_layers=2, num_heads=2)


@pytest.mark.slow
@pytest.mark.parametrize("old_names", [False, True])
@pytest.mark.parametrize(("config", "kind"), [(BERT, "BertForMaskedLM"), (T5, "T5ForConditionalGeneration")])
def test_every_copy_of_a_trained_embedding_follows_it(config, kind, old_names, tmp_path):
    """Oracle: transformers. Files have all names of the embedding, and TensorFlow's of the norms."""
    torch.manual_seed(0)
    made = getattr(transformers, kind)(config).eval()
    made.save_pretrained(tmp_path / "base")
    stored = {name: tensor.detach().numpy().copy() for name, tensor in made.state_dict().items()}
    if old_names:
        tensorflow = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        stored = {functools.reduce(lambda n, old: n.replace(*old), tensorflow.items(), name): tensor
                  for name, tensor in stored.items()}  # fmt: skip
    save_file(stored, tmp_path / "base" / "model.safetensors", {"format": "pt"})

    trained = HyLoRADAConfig(method="lora", train_embeddings=True, train_norms=True)
    model = moved(HyLoRADAModel(load_model(tmp_path / "base"), trained))
    model.save_pretrained(tmp_path / "adapter")
    write_merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    written = load_file(tmp_path / "merged" / "model.safetensors")
    assert sum(t.shape == (VOCAB, 16) for t in written.values()) == 1

    inputs: dict[str, Any] = {"input_ids": IDS} | (
        {"decoder_input_ids": IDS} if kind.startswith("T5") else {}
    )
    merged = getattr(transformers, kind).from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        found = merged(**{name: torch.from_numpy(ids) for name, ids in inputs.items()}).logits
    expected = np.asarray(model.apply(model.adapters, **inputs).logits)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_gpt2_as_it_stands_on_the_hub(bases, adapted, tmp_path):
    """Without the prefix, and with its causal masks and a float16 infinity as tensors."""
    adapted("gpt2", "v1").save_pretrained(tmp_path / "adapter")
    stored = load_file(bases / "gpt2" / "model.safetensors")
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text((bases / "gpt2" / "config.json").read_text())
    masks = {"h.0.attn.bias": np.tri(16, dtype=bool)[None, None], "h.0.attn.masked_bias": np.float32(-1e9)}
    short = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
    save_file({**short, **{n: np.asarray(m) for n, m in masks.items()}}, base / "model.safetensors")
    write_merged(base, tmp_path / "adapter", tmp_path / "short", "float16")
    write_merged(bases / "gpt2", tmp_path / "adapter", tmp_path / "long", "float16")
    found, expected = (load_file(tmp_path / d / "model.safetensors") for d in ("short", "long"))
    assert found.keys() == short.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name.removeprefix("transformer.")], tensor, strict=True)


def test_what_stands_beside_the_weights_comes_along(bases, adapted, tmp_path, capsys):
    adapted("llama", "lora").save_pretrained(tmp_path / "adapter")
    base = tmp_path / "base"
    base.mkdir()
    for file in (bases / "llama").iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    copied = [
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
        "merges.txt", "vocab.json", "vocab.txt", "tokenizer.model", "tokenizer.model.v3", "spiece.model",
        "tekken.json", "chat_template.jinja", "chat_template.json",
        "additional_chat_templates/tool_use.jinja", "preprocessor_config.json", "processor_config.json",
        "source.spm", "target.spm", "target_vocab.json",
    ]  # fmt: skip
    (base / "additional_chat_templates").mkdir()
    for name in [*copied, "README.md", "pytorch_model.bin", "additional_chat_templates/README.md"]:
        (base / name).write_text(name)
    config = json.loads((base / "config.json").read_text())
    code = {"auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
    (base / "config.json").write_text(json.dumps(config | code))
    # The adapter names the directory it was trained on; the command takes it from there.
    merge(output=tmp_path / "merged", adapter=tmp_path / "adapter", dtype="bfloat16")
    printed = capsys.readouterr()
    assert str(tmp_path / "merged") in printed.out
    assert "merging" in printed.err
    write_merged(base, tmp_path / "adapter", tmp_path / "again", "bfloat16")
    again = tmp_path / "again"
    files = {path.relative_to(again).as_posix() for path in again.rglob("*") if path.is_file()}
    assert files == {"config.json", "generation_config.json", "model.safetensors", *copied}
    assert all((tmp_path / "again" / name).read_text() == name for name in copied)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert config.dtype == torch.bfloat16
    first, second = (json.loads((tmp_path / d / "config.json").read_text()) for d in ("merged", "again"))
    assert first == second


def everything(directory):
    return {path: path.is_file() and path.read_bytes() for path in directory.rglob("*")}


def test_what_cannot_be_merged_is_refused_and_leaves_nothing(bases, adapted, tmp_path):
    adapted("llama", "dora").save_pretrained(tmp_path / "dora")
    adapted("llama", "unified").save_pretrained(tmp_path / "unified")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    lacking = tmp_path / "lacking"
    lacking.mkdir()
    (lacking / "config.json").write_text((bases / "llama" / "config.json").read_text())
    stored = load_file(bases / "llama" / "model.safetensors")
    stored.pop("model.layers.1.self_attn.q_proj.weight")
    save_file(stored, lacking / "model.safetensors")
    llama, qwen2, new = bases / "llama", bases / "qwen2", tmp_path / "new"
    before = everything(tmp_path)
    for error, message, arguments in (
        (CheckpointError, r"empty directory[\s\S]*full", (llama, tmp_path / "dora", tmp_path / "full")),
        (CheckpointError, "can be written, or made", (llama, tmp_path / "dora", tmp_path / "full" / "file")),
        (ModelError, "position bias[\\s\\S]*direct attention", (llama, tmp_path / "unified", new)),
        (CheckpointError, r"trained on[\s\S]*model_type", (qwen2, tmp_path / "dora", new)),
        (ModelError, r"model\.layers\.1\.self_attn\.q_proj", (lacking, tmp_path / "dora", new)),
        (ModelError, "floating-point", (llama, tmp_path / "dora", new, "int8")),
        (CheckpointError, "two files", (llama, tmp_path, new)),
    ):
        with pytest.raises(error, match=message):
            write_merged(*arguments)
        assert everything(tmp_path) == before


def test_a_weight_that_overflows_is_named_and_nothing_stays(bases, adapted, tmp_path):
    model = adapted("llama", "dora")
    tensors = layout.flatten(model.sites, model.adapters)
    name = "model.layers.2.self_attn.v_proj"
    tensors[f"{name}.magnitude"] = np.full_like(tensors[f"{name}.magnitude"], 1e9)
    write_adapter(tmp_path / "adapter", tensors, model.config, model.identity())
    with pytest.raises(ModelError, match=rf"float16[\s\S]*{name}"):
        write_merged(bases / "llama", tmp_path / "adapter", tmp_path / "merged", "float16")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("dtype", ["float32+", "float32+nf5", "+nf4", "int8"])
def test_a_record_of_a_dtype_that_no_base_has_is_as_none(bases, adapted, tmp_path, dtype):
    model = adapted("llama", "dora")
    tensors = layout.flatten(model.sites, model.adapters)
    for name, record in (("one", {}), ("other", {"dtype": dtype, "weights_sha256": "0" * 64})):
        write_adapter(tmp_path / name, tensors, model.config, model.identity() | record)
        write_merged(bases / "llama", tmp_path / name, tmp_path / f"merged-{name}")
    one, other = ((tmp_path / f"merged-{name}" / "model.safetensors") for name in ("one", "other"))
    assert one.read_bytes() == other.read_bytes()
    with pytest.raises(ModelError, match="checked in one dtype"):
        write_merged(bases / "llama", tmp_path / "other", tmp_path / "new", check_weights=True)
    assert not (tmp_path / "new").exists()


def test_an_interrupt_leaves_nothing(bases, adapted, tmp_path, monkeypatch):
    adapted("llama", "dora").save_pretrained(tmp_path / "adapter")
    seen = []

    def interrupted(files, path, content):
        seen.append(path)
        raise KeyboardInterrupt

    monkeypatch.setattr("hylorada_jax.exchange.merged._copy", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_merged(bases / "llama", tmp_path / "adapter", tmp_path / "merged")
    assert seen
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_private_file_that_the_model_links_to_is_not_copied(bases, adapted, tmp_path):
    adapted("llama", "dora").save_pretrained(tmp_path / "adapter")
    shutil.copytree(bases / "llama", tmp_path / "base")
    (tmp_path / "private").write_text("secret")
    (tmp_path / "base" / "chat_template.jinja").symlink_to("../private")
    with pytest.raises(ModelError, match=r"chat_template\.jinja, which is .*private"):
        write_merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "base", "private"}


def test_a_base_without_a_name_must_be_given(bases, adapted, tmp_path):
    model = adapted("llama", "dora")
    tensors = layout.flatten(model.sites, model.adapters)
    write_adapter(tmp_path / "adapter", tensors, model.config, {**model.identity(), "name": None})
    with pytest.raises(HyLoRADAError, match="--model"):
        merge(output=tmp_path / "merged", adapter=tmp_path / "adapter")
    merge(output=tmp_path / "merged", adapter=tmp_path / "adapter", model=str(bases / "llama"))
    assert (tmp_path / "merged" / "model.safetensors").is_file()


@pytest.mark.apart
@needs_proc
def test_memory_holds_one_tensor_at_a_time(bases, adapted, tmp_path):
    from hylorada_jax.models.loading import empty_model
    from hylorada_jax.models.wrapped import as_base
    from hylorada_jax.saved.opening import identity
    from hylorada_jax.surgery.modules import modules_of
    from hylorada_jax.surgery.plan import plan

    # Five tensors of 50 MB, three of them adapted.
    shape = {"vocab_size": 12288, "hidden_size": 1024, "intermediate_size": 12288, "num_hidden_layers": 1}
    base, rng = tmp_path / "base", np.random.default_rng(0)
    config = transformers.LlamaConfig(**shape, num_attention_heads=8, tie_word_embeddings=False)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(base)
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in transformers.LlamaForCausalLM(config).named_parameters()}
    save_file(
        {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()},
        base / "model.safetensors",
    )
    empty = as_base(empty_model(base))
    modules = modules_of(empty)
    adapter = {
        name: rng.standard_normal(shape).astype(np.float32)
        for name, shape in layout.tensor_shapes(plan(modules, CONFIGS["v1"])).items()
    }
    write_adapter(tmp_path / "adapter", adapter, CONFIGS["v1"], identity(empty, modules))
    # Once before, for what compiling takes: it is the same for a model of any size.
    before, work = (
        f"write_merged({str(base)!r}, {str(tmp_path / 'adapter')!r}, {str(tmp_path / output)!r})"
        for output in ("before", "merged")
    )
    before = "from hylorada_jax.exchange.merged import write_merged\n" + before
    largest = 4 * 12288 * 1024
    taken = peak_memory(before, work) - sum(tensor.nbytes for tensor in adapter.values())
    assert taken < 2 * largest, taken / largest
    assert (tmp_path / "merged" / "model.safetensors").stat().st_size > 5 * largest


@pytest.mark.apart
def test_smollm2_merged_writes_the_same_text(tmp_path):
    from hylorada_jax.models.tokenizer import load_tokenizer

    config = HyLoRADAConfig(method="hylorada_v1", lora_rank=4)
    model, rng = HyLoRADAModel(load_model("smollm2-135m"), config), np.random.default_rng(0)
    tensors = layout.flatten(model.sites, model.adapters)
    for name in tensors:
        if name.endswith("lora_B"):
            tensors[name] = (0.02 * rng.normal(size=tensors[name].shape)).astype(np.float32)
    model.adapters = layout.unflatten(model.sites, tensors)
    model.save_pretrained(tmp_path / "adapter")
    write_merged("smollm2-135m", tmp_path / "adapter", tmp_path / "merged")

    ours = load_tokenizer("smollm2-135m")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    texts = ["def f(x):\n    ", "Grüße 3.14 你好 I'll\r\n\tx  = 42", "<|im_start|>user\nhi<|im_end|>\n"]
    for text in texts:
        assert set(theirs(text)) == {"input_ids", "attention_mask"}  # what generate() takes
        assert theirs(text)["input_ids"] == ours.encode(text, add_special_tokens=True)
        assert theirs.decode(ours.encode(text)) == ours.decode(ours.encode(text), skip_special_tokens=False)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_token_id, ours.eos_token_id)
    assert theirs.pad_token_id == ours.pad_token_id
    messages = [{"role": "user", "content": "Hi"}]
    chat = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chat == ours.apply_chat_template(messages)

    prompt = ours.encode("def read_lines(path):\n    ")
    expected = model.generate([prompt], max_new_tokens=16)[0]
    with model.disable_adapter():
        assert model.generate([prompt], max_new_tokens=16)[0] != expected
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.float32
    found = merged.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=16)[0, len(prompt) :]
    assert found.tolist() == expected
    with jax.default_matmul_precision("highest"):
        logits = np.asarray(model(jnp.asarray([prompt])).logits)
    np.testing.assert_allclose(
        in_torch(tmp_path / "merged", np.asarray([prompt])), logits, atol=1e-5 * np.abs(logits).max()
    )


def test_transformers_ends_a_turn_where_the_adapters_template_does(bases, adapted, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(bases / "llama", base)
    words = {"<end>": 0, "<|im_end|>": 1, "<unk>": 2}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "<unk>"))
    tokenizer.add_special_tokens(["<end>", "<|im_end|>"])
    tokenizer.save(str(base / "tokenizer.json"))
    (base / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    (base / "generation_config.json").write_text('{"eos_token_id": 0, "max_new_tokens": 7}')
    model = adapted("llama", "lora")
    model.chat_template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    try:
        model.save_pretrained(tmp_path / "adapter")
    finally:
        model.chat_template = None
    write_merged(base, tmp_path / "adapter", tmp_path / "merged")
    written = transformers.GenerationConfig.from_pretrained(tmp_path / "merged")
    assert (written.eos_token_id, written.max_new_tokens) == ([0, 1], 7)


TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}]
OF_BASE = "BASE {% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize("place", ["files", "tokenizer_config.json"])
def test_an_adapters_template_replaces_all_of_its_bases(chatting, tmp_path, place):
    base, merged = tmp_path / "base", tmp_path / "merged"
    shutil.copytree(chatting, base)
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings["chat_template"] = [{"name": name, "template": OF_BASE} for name in ("default", "tool_use")]
    if place == "files":
        del settings["chat_template"]
        (base / "additional_chat_templates").mkdir()
        for name in ("chat_template.jinja", "additional_chat_templates/tool_use.jinja"):
            (base / name).write_text(OF_BASE)
        (base / "chat_template.json").write_text(json.dumps({"chat_template": OF_BASE}))
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    model = HyLoRADAModel(load_model(base), CONFIGS["lora"])
    texts = "{% for m in messages %}{{ m.content }}<end>{% endfor %}"
    model.chat_template = "{{ (tools or []) | length }} tools " + texts
    model.save_pretrained(tmp_path / "adapter")
    write_merged(base, tmp_path / "adapter", merged)

    messages = [{"role": "user", "content": "hi"}]
    own = dataclasses.replace(load_tokenizer(base), chat_template=model.chat_template)
    theirs = transformers.AutoTokenizer.from_pretrained(merged)
    for tools in (None, TOOLS):
        expected = own.apply_chat_template(messages, tools=tools)
        assert expected == f"{len(tools or ())} tools hi<end>"
        assert theirs.apply_chat_template(messages, tools=tools, tokenize=False) == expected
        assert load_tokenizer(merged).apply_chat_template(messages, tools=tools) == expected
    # In which a processor of transformers would find the base's before it looks for the other.
    assert not (merged / "chat_template.json").exists()


def gguf_with(settings, path):
    """A file of one layer, of whose tokens "<end>" ends a text, with settings of sampling."""
    rng = np.random.default_rng(0)
    shapes = {
        "token_embd": (258, 32),
        "output_norm": (32,),
        "blk.0.attn_norm": (32,),
        "blk.0.ffn_norm": (32,),
    }
    shapes |= {f"blk.0.attn_{name}": (rows, 32) for name, rows in (("q", 32), ("k", 16), ("v", 16))}
    shapes |= {"blk.0.attn_output": (32, 32), "blk.0.ffn_down": (32, 64)}
    shapes |= {"blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32)}
    tensors = {
        f"{name}.weight": rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()
    }
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    about: dict[str, object] = {"model": "gpt2", "pre": "smollm", "merges": ["a b"], "eos_token_id": 0}
    about |= {"tokens": ["<end>", "<|im_end|>", "ab", *letters], "token_type": [3, 3] + [1] * 257}
    extra = {f"tokenizer.ggml.{key}": value for key, value in about.items()}
    extra |= {f"general.sampling.{key}": value for key, value in settings.items()}
    return write_gguf(path, "llama", KEYS, tensors, extra=extra)


TURNS = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"


@pytest.mark.parametrize(
    ("settings", "written", "template"),
    [
        (
            {"temp": 0.5, "top_k": 20, "top_p": 0.75, "penalty_repeat": 1.25},
            {"do_sample": True, "temperature": 0.5, "top_k": 20, "top_p": 0.75, "repetition_penalty": 1.25},
            TURNS,
        ),
        ({"temp": 1.5}, {"do_sample": True, "temperature": 1.5}, None),
        ({"temp": 0.5, "top_k": 0}, {"do_sample": True, "temperature": 0.5, "top_k": 0}, None),
        ({"temp": 0.0, "top_k": 20}, {}, TURNS),
        ({"penalty_repeat": 1.25, "top_k": 20}, {"repetition_penalty": 1.25}, None),
        ({}, {}, None),
    ],
)
def test_a_merged_gguf_file_is_sampled_from_as_the_file(settings, written, template, tmp_path):
    path = gguf_with(settings, tmp_path / "base.gguf")
    model = HyLoRADAModel(load_model(path), CONFIGS["lora"])
    model.chat_template = template
    model.save_pretrained(tmp_path / "adapter")
    write_merged(path, tmp_path / "adapter", tmp_path / "merged")
    assert sampling(**generation_defaults(tmp_path / "merged")) == sampling(**generation_defaults(path))
    assert load_tokenizer(tmp_path / "merged").end_token_ids == ((0,) if template is None else (0, 1))
    ends = 0 if template is None and not written else [0] if template is None else [0, 1]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").generation_config
    names = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    blank = transformers.GenerationConfig()
    found = {name: getattr(theirs, name) for name in names if getattr(theirs, name) != getattr(blank, name)}
    assert (found, theirs.eos_token_id) == (written, ends)
