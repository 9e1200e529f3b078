"""Valid small files of every format, to be damaged."""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import math
import struct
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import tokenizers
from safetensors.numpy import save
from tokenizers import decoders, models, pre_tokenizers

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.model import HyLoRADAModel
from hylorada_jax.models.causal_lm import CausalLM
from hylorada_jax.models.loading import load_model
from hylorada_jax.saved.adapter_files import CONFIG_NAME, WEIGHTS_NAME
from hylorada_jax.training.run_directory import RunDirectory
from parity_tests.fuzz.mutations import CANARY, File

Files = dict[str, File]

_CODES = Path(__file__).parents[1] / "fixtures" / "bitsandbytes" / "tensors.safetensors"

_SIZES: dict[str, Any] = {
    "vocab_size": 257, "hidden_size": 16,
    "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "intermediate_size": 24, "head_dim": 8, "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu", "tie_word_embeddings": True, "initializer_range": 0.02, "eos_token_id": 256,
}  # fmt: skip
_LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
CONFIGS: tuple[dict[str, Any], ...] = (
    {"model_type": "llama", **_SIZES, "rope_theta": 10000.0, "rope_scaling": _LLAMA3},
    {"model_type": "llama", **_SIZES, "attention_bias": True,
     "rope_parameters": {"rope_theta": 1e4, **_LLAMA3}},
    {"model_type": "mistral", **_SIZES, "sliding_window": 8, "rope_theta": 1e6},
    {"model_type": "qwen2", **_SIZES, "use_sliding_window": True, "max_window_layers": 1,
     "sliding_window": 8},
    {"model_type": "qwen3", **_SIZES, "layer_types": ["full_attention"] * 2, "eos_token_id": [255, 256],
     "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
)  # fmt: skip
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim }}"
    "{% if not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


def private(root: Path) -> None:
    """Files that no reader may follow a name to."""
    (root / "private.json").write_text(
        json.dumps({"model_type": "llama", "text": CANARY, "chat_template": CANARY})
    )
    (root / "private.safetensors").write_bytes(save({CANARY: np.zeros((2, 2), np.float32)}))


def config(random: Random) -> Files:
    """The config of a model, and what it generates with."""
    generation = {"eos_token_id": [256, 255], "do_sample": True}
    return {
        "config.json": File("json", random.choice(CONFIGS)),
        "generation_config.json": File("json", generation),
    }


def weights(random: Random) -> Files:
    """A model of one file."""
    return {"config.json": File("json", CONFIGS[0]), "model.safetensors": _tensors(_MODEL)}


def codes(random: Random) -> Files:
    """Weights that bitsandbytes has written in 4 bits."""
    content = _CODES.read_bytes()
    start = 8 + struct.unpack("<Q", content[:8])[0]
    model = File("safetensors", (json.loads(content[8:start]), content[start:]))
    said = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    return {"config.json": File("json", CONFIGS[0] | said), "model.safetensors": model}


def shards(random: Random) -> Files:
    """A model of two files and their index."""
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    halves = [dict(list(_MODEL.items())[half::2]) for half in (0, 1)]
    places = {tensor: name for name, half in zip(names, halves, strict=True) for tensor in half}
    files = {name: _tensors(half) for name, half in zip(names, halves, strict=True)}
    index = File("json", {"metadata": {"total_size": 1}, "weight_map": places})
    return {"config.json": File("json", CONFIGS[0]), "model.safetensors.index.json": index, **files}


def tokenizer(random: Random) -> Files:
    """A tokenizer of bytes, in the newer or the older set of files."""
    token: dict[str, Any] = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    ends = [token | {"content": "<end>", "special": True}, token | {"content": "<a>", "special": False}]
    settings: dict[str, Any] = {
        "tokenizer_class": "LlamaTokenizerFast", "eos_token": "<end>", "add_eos_token": True,
        "add_bos_token": False,
        "chat_template": TEMPLATE, "clean_up_tokenization_spaces": False, "add_prefix_space": False,
    }  # fmt: skip
    files = {"tokenizer.json": File("json", _backend()), **config(random)}
    if random.random() < 0.5:
        settings["added_tokens_decoder"] = {"256": ends[0], "257": ends[1]}
        return {**files, "tokenizer_config.json": File("json", settings)}
    named = {"eos_token": ends[0], "additional_special_tokens": ["<a>", "<b>"]}
    return {
        **files,
        "tokenizer_config.json": File("json", settings),
        "special_tokens_map.json": File("json", named),
        "added_tokens.json": File("json", {"<c>": 260}),
        "chat_template.jinja": File("text", TEMPLATE),
    }


def template(random: Random) -> Files:
    """A chat template beside a tokenizer."""
    return {
        "tokenizer.json": File("json", _backend()),
        "config.json": File("json", CONFIGS[0]),
        "chat_template.jinja": File("text", TEMPLATE),
    }


def gguf(random: Random) -> Files:
    """A model and its tokenizer in a GGUF file, one field after the other."""
    sizes: dict[str, Any] = {
        "block_count": 1, "context_length": 64, "embedding_length": 32, "feed_forward_length": 64,
        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 50000.0,
    }  # fmt: skip
    tokens = [*_alphabet(), "<end>", "ab"]
    keys = {"general.architecture": "llama", "general.alignment": 32}
    keys |= {f"llama.{key}": value for key, value in sizes.items()}
    keys |= {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.eos_token_id": 256,
    }
    keys |= {"tokenizer.chat_template": TEMPLATE, "tokenizer.ggml.merges": ["a b"]}
    keys |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [1] * 256 + [3, 1]}
    shapes = {
        "token_embd.weight": (258, 32),
        "output_norm.weight": (32,),
        **{f"blk.0.{name}.weight": shape for name, shape in _GGUF_LAYER.items()},
    }
    fields = [b"GGUF", _u32(3), _u64(len(shapes)), _u64(len(keys))]
    for key, value in keys.items():
        fields += [_u64(len(key)), key.encode(), *_typed(value)]
    offset = 0
    for name, shape in shapes.items():
        fields += [
            _u64(len(name)),
            name.encode(),
            _u32(len(shape)),
            *map(_u64, shape[::-1]),
            _u32(0),
            _u64(offset),
        ]
        offset += -(-4 * math.prod(shape) // 32) * 32
    fields += [bytes(-sum(map(len, fields)) % 32), bytes(offset)]
    return {"model.gguf": File("fields", fields)}


def adapter(random: Random) -> Files:
    """An adapter of ours."""
    config, raw = _adapter(random.choice(("lora", "hylorada")))
    size = int.from_bytes(raw[:8], "little")
    weights = File("safetensors", (json.loads(raw[8 : 8 + size]), raw[8 + size :]))
    return {CONFIG_NAME: File("json", sealed(config, bytes(weights))), WEIGHTS_NAME: weights}


def peft(random: Random) -> Files:
    """An adapter of PEFT's."""
    settings = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "use_rslora": False,
        "use_dora": False, "fan_in_fan_out": False, "rank_pattern": {}, "alpha_pattern": {"q_proj": 3},
        "modules_to_save": None, "target_modules": ["q_proj", "v_proj"], "bias": "none",
        "task_type": "CAUSAL_LM", "init_lora_weights": True,
        "base_model_name_or_path": "owner/name", "layers_to_transform": None, "exclude_modules": None,
    }  # fmt: skip
    tensors = {
        f"base_model.model.model.layers.{layer}.self_attn.{name}.lora_{leaf}.weight": shape
        for layer in (0, 1)
        for name, width in (("q_proj", 16), ("v_proj", 8))
        for leaf, shape in (("A", (2, 16)), ("B", (width, 2)))
    }
    return {CONFIG_NAME: File("json", settings), WEIGHTS_NAME: _tensors(tensors)}


def recipe(random: Random) -> Files:
    """Settings of an adapter, as a user keeps them."""
    settings = HyLoRADAConfig(
        method=random.choice(("lora", "dora", "hylorada_v1", "hylorada_v2", "hylorada")),
        target_modules=("q_proj", r".*\.(v|up)_proj"),
        exclude_modules=(r".*mlp.*",),
        rank_pattern={"q_proj": 4},
        alpha_pattern={r".*v_proj": 2.0},
    ).to_dict()
    return {"recipe.json": File("json", settings)}


def documents(random: Random) -> Files:
    """Texts or conversations in one of the formats of data."""
    rows = [{"text": "one", "n": 1}, {"text": None, "n": [2]}, {"text": 'a "quoted"\nword, é 漢', "n": {}}]
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    turns = [{"role": "user", "content": "é"}, {"role": "assistant", "tool_calls": [call], "train": True}]
    speakers = [{"from": "human", "value": "a"}, {"from": "function_call", "value": '{"name": "f"}'}]
    chats = {"messages": turns, "tools": "[]", "chat_template_kwargs": {"day": 1}}
    alpaca = {"instruction": "a", "input": "", "output": "b", "history": [["c", "d"]]}
    table = 'n,text\r\n1,one\r\n2,"a ""quoted""\nword, é"\r\n'
    return random.choice(
        (
            {"a.jsonl": File("jsonl", rows)},
            {"a.json": File("json", rows)},
            {"chats.jsonl": File("jsonl", [chats, chats])},
            {"alpaca.json": File("json", [alpaca, alpaca])},
            {"shared.jsonl": File("jsonl", [{"conversations": speakers, "system": "s"}] * 2)},
            {"completions.jsonl": File("jsonl", [{"prompt": "a", "completion": "b"}] * 2)},
            {"turns.json": File("json", [{"prompt": turns, "completion": turns}])},
            {"a.csv": File("text", table)},
            {"a.tsv": File("text", table.replace(",", "\t"))},
            {"a.txt": File("text", "one\ntwo é 漢 😀\n" * 20)},
            {"a.parquet": File("bytes", _parquet())},
        )
    )


def run(random: Random) -> Files:
    """A run's records, beside what is not its own."""
    steps = [{"step": 0, "eval_loss": 3.0, "eval_perplexity": 20.1, "eval_tokens": 10}]
    metrics = {"loss": 2.5, "grad_norm": 1.0, "adapter_norm": 1.0, "tokens": 8, "tokens_per_second": 9.5}
    steps += [{"step": step, **metrics} for step in (1, 2)]
    return {"run.json": File("json", _run()), "metrics.jsonl": File("jsonl", steps)}


IDENTITY = {"base": {"layers_sha256": "00"}, "training": {"steps": 4, "seed": 0}, "data": "11"}
RECORDED = {"jax": "0.10", "device": "cpu", "model": "tiny"}
"""What a run is, and what it runs on."""

_MODEL = {
    "model.embed_tokens.weight": (257, 16),
    "model.norm.weight": (16,),
    **{f"model.layers.{layer}.{name}.weight": shape for layer in (0, 1) for name, shape in {
        "self_attn.q_proj": (16, 16), "self_attn.k_proj": (8, 16), "self_attn.v_proj": (8, 16),
        "self_attn.o_proj": (16, 16), "mlp.gate_proj": (24, 16), "mlp.up_proj": (24, 16),
        "mlp.down_proj": (16, 24),
        "input_layernorm": (16,), "post_attention_layernorm": (16,)}.items()},
}  # fmt: skip


_GGUF_LAYER = {
    "attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32), "ffn_gate": (64, 32),
    "ffn_up": (64, 32), "ffn_down": (32, 64), "attn_norm": (32,), "ffn_norm": (32,),
}  # fmt: skip


def _tensors(shapes: Mapping[str, tuple[int, ...]]) -> File:
    """A safetensors file of tensors in the shapes given."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    return File("safetensors", (header, np.full(end // 4, 0.5, np.float32).tobytes()))


def _alphabet() -> list[str]:
    return sorted(pre_tokenizers.ByteLevel.alphabet())


@cache
def _backend() -> Any:
    vocab = {token: index for index, token in enumerate([*_alphabet(), "<end>"])}
    backend = tokenizers.Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    return json.loads(backend.to_str())


@cache
def base() -> CausalLM:
    """A small model, for adapters and settings to fit."""
    with TemporaryDirectory() as place:
        for name, file in weights(Random(0)).items():
            Path(place, name).write_bytes(bytes(file))
        return load_model(place)


@cache
def _adapter(method: str) -> tuple[Any, bytes]:
    settings = HyLoRADAConfig(
        method=method, lora_rank=2, sparse_enabled=method == "hylorada", sparse_adapter_dim=4
    )
    with TemporaryDirectory() as place:
        HyLoRADAModel(base(), settings).save_pretrained(place)
        return json.loads(Path(place, CONFIG_NAME).read_bytes()), Path(place, WEIGHTS_NAME).read_bytes()


def sealed(config: dict[str, Any], weights: bytes) -> dict[str, Any]:
    """An adapter's config with the right checksums of what it says and of its weights."""
    body = {key: value for key, value in config.items() if key != "sha256"}
    body["weights_sha256"] = hashlib.sha256(weights).hexdigest()
    text = json.dumps(body, ensure_ascii=False, sort_keys=True).encode(errors="backslashreplace")
    return {**body, "sha256": hashlib.sha256(text).hexdigest()}


@cache
def _run() -> Any:
    with TemporaryDirectory() as place:
        run = RunDirectory(Path(place, "run"))
        run.open(IDENTITY, RECORDED, resume=False, overwrite=False)
        return json.loads(run.run.read_bytes())


@cache
def _parquet() -> bytes:
    try:
        pyarrow: Any = importlib.import_module("pyarrow")
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError:
        return b"PAR1"
    file = io.BytesIO()
    parquet.write_table(
        pyarrow.table({"n": [1, 2, 3], "text": ["one", None, "é 漢"]}), file, compression="zstd"
    )
    return file.getvalue()


def _u32(number: int) -> bytes:
    return struct.pack("<I", number)


def _u64(number: int) -> bytes:
    return struct.pack("<Q", number)


def _typed(value: Any) -> list[bytes]:
    """A value of GGUF's metadata: its type, and what it is; of a long list the end is one field."""
    match value:
        case str():
            return [_u32(8), _u64(len(value.encode())), value.encode()]
        case float():
            return [_u32(6), struct.pack("<f", value)]
        case int():
            return [_u32(4), _u32(value)]
    kind, *items = _typed(value[0])
    for item in value[1:]:
        items += _typed(item)[1:]
    return [_u32(9), kind, _u64(len(value)), *items[:4], b"".join(items[4:])]
