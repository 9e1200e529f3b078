"""The command line: parses and delegates.

Everything heavy is imported inside the commands, so that ``--help`` answers at once and bad input is
reported before a model is loaded.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from hylorada_jax.cli_adapter import DEFAULTS, Adapter, AdapterOptions
from hylorada_jax.cli_merge import merge
from hylorada_jax.cli_parity import parity
from hylorada_jax.cli_peft import export_peft, import_peft
from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import ConfigError, DataError, HyLoRADAError
from hylorada_jax.training.corpus import PYTHON_STDLIB, Document, load_documents

if TYPE_CHECKING:
    from hylorada_jax.models.tokenizer import Tokenizer
    from hylorada_jax.surgery.plan import Site

PACKAGED_MODEL = "smollm2-135m"
Dtype = Literal["float32", "bfloat16"]
Structure = Literal["code"]


def finetune(
    *,
    output: Path,
    model: str = PACKAGED_MODEL,
    data: str = PYTHON_STDLIB,
    eval_data: str | None = None,
    adapter: Adapter = DEFAULTS,
    start_from: Path | None = None,
    structure: Structure | None = None,
    steps: int = 40,
    batch_size: int = 4,
    microbatches: int = 1,
    seq_len: int = 256,
    learning_rate: float = 5e-4,
    seed: int = 0,
    dtype: Dtype = "float32",
    remat: Literal["none", "dots", "full"] = "none",
    packing: bool = True,
    eval_tokens: int | None = 8192,
    eval_every: int | None = None,
    checkpoint_every: int = 10,
    prompt: str = 'def read_lines(path):\n    """',
    resume: bool = False,
    overwrite: bool = False,
) -> None:
    """Fine-tune a language model: its weights stay frozen, an adapter is trained.

    Writes to the output directory: adapter/ (adapter_config.json, adapter_model.safetensors), checkpoints/,
    metrics.jsonl and loss.png.

    Args:
        output: directory of the run; one that holds a run is not touched without --resume or --overwrite.
        model: smollm2-135m (the packaged weights), a directory, a .gguf file, or a Hub name.
        data: python-stdlib (the embedded corpus), a file, a glob, *.jsonl, or a Hub dataset.
        eval_data: held-out data; by default about 5 % of the data is held out, by document.
        adapter: what is trained.
        start_from: directory of an adapter to go on training; its settings are those of the new one.
        structure: tell hylorada_v2 the domain's structure of each token: code, the nesting depth in Python.
        steps: optimizer steps.
        batch_size: rows per step.
        microbatches: parts that a step's rows are computed in, one after the other, to save memory.
        seq_len: tokens per row.
        learning_rate: peak rate of lora_A; LoRA+ trains lora_B at ten times this.
        seed: of the adapter's start, of the shuffling and of dropout.
        dtype: of the frozen weights and the computation; the adapter is float32.
        remat: what the backward pass recomputes to save memory.
        packing: let short documents share a row, isolated from each other.
        eval_tokens: evaluate on about this many held-out tokens.
        eval_every: steps between evaluations; by default before and after only.
        checkpoint_every: steps between checkpoints.
        prompt: continued by the model before and after, as a sample; empty for none.
        resume: go on with the run in the output directory.
        overwrite: delete the run in the output directory.
    """
    from hylorada_jax.training.config import TrainingConfig
    from hylorada_jax.training.run_directory import RunDirectory

    settings = adapter.build() if start_from is None else _settings_of(start_from, adapter)
    if structure:
        _require_encoder(settings, structure)
    training = TrainingConfig(
        output_dir=output,
        steps=steps,
        batch_size=batch_size,
        microbatches=microbatches,
        seq_len=seq_len,
        packing=packing,
        learning_rate=learning_rate,
        seed=seed,
        eval_every=eval_every,
        eval_tokens=eval_tokens,
        checkpoint_every=checkpoint_every,
        resume=resume,
        overwrite=overwrite,
    )
    RunDirectory(output).refuse_unless(resume=resume, overwrite=overwrite)

    from hylorada_jax.models.loading import load_model, model_init

    _plan(model_init(model), settings)  # a target that matches nothing is reported before weights are read
    train_texts = load_documents(data, "all" if eval_data else "train")
    eval_texts = load_documents(eval_data) if eval_data else load_documents(data, "eval")

    import jax.numpy as jnp

    from hylorada_jax.model import HyLoRADAModel
    from hylorada_jax.training.trainer import HyLoRADATrainer

    tokenizer = _tokenizer(model)
    train, train_structure = _tokens(train_texts, tokenizer, structure)
    held_out, eval_structure = _tokens(eval_texts, tokenizer, structure)
    base = load_model(model, dtype=jnp.dtype(dtype), remat=remat)
    if start_from is None:
        adapted = HyLoRADAModel(base, settings, seed)
    else:
        adapted = HyLoRADAModel.from_pretrained(base, start_from)
    trainer = HyLoRADATrainer(
        adapted, train, held_out, training, train_structure=train_structure, eval_structure=eval_structure
    )
    print(f"model    {model}, {dtype}")
    print(
        f"data     {data}: {sum(map(len, train)):,} tokens to train on, {sum(map(len, held_out)):,} held out"
    )
    print(f"method   {settings.method}, rank {settings.lora_rank}: ", end="")
    adapted.print_trainable_parameters()

    result = trainer.train()
    print(f"held-out perplexity  before {result.perplexity_before:.3f}  after {result.perplexity_after:.3f}")
    ids, structure_ids = _prompt(prompt, tokenizer, structure)
    if ids:
        eos = tokenizer.eos_token_id
        with adapted.disable_adapter():
            before = adapted.generate([ids], max_new_tokens=64, eos_token_id=eos)
        after = adapted.generate([ids], max_new_tokens=64, eos_token_id=eos, **structure_ids)
        print(f"\n--- sample, before ---\n{prompt}{tokenizer.decode(before[0])}")
        print(f"\n--- sample, after ----\n{prompt}{tokenizer.decode(after[0])}\n")
    print(f"adapter  {result.adapter}\nmetrics  {result.metrics}\nplot     {result.loss_plot}")


def evaluate(
    *,
    model: str = PACKAGED_MODEL,
    adapter: Path | None = None,
    data: str = PYTHON_STDLIB,
    seq_len: int = 512,
    stride: int | None = None,
    batch_size: int = 4,
    max_tokens: int | None = None,
    structure: Structure | None = None,
    dtype: Dtype = "float32",
    json: bool = False,
) -> None:
    """Perplexity of a model, with or without an adapter, by a sliding window.

    Args:
        model: smollm2-135m (the packaged weights), a directory, a .gguf file, or a Hub name.
        adapter: directory of a trained adapter.
        data: a file, a glob, *.jsonl or a Hub dataset, read whole; of python-stdlib, the held-out files.
        seq_len: tokens per window.
        stride: tokens between windows [half a window]; no token is scored twice.
        batch_size: windows at a time.
        max_tokens: evaluate on about this many tokens; by default on all.
        structure: tell a hylorada_v2 adapter the structure that it was trained with: code.
        dtype: of the weights and the computation.
        json: print one JSON object.
    """
    texts = load_documents(data, "eval" if data == PYTHON_STDLIB else "all")
    _check_adapter(adapter, structure)
    tokenizer = _tokenizer(model)

    from hylorada_jax.evaluation.perplexity import evaluate_perplexity

    tokens, structure_ids = _tokens(texts, tokenizer, structure)
    measured = evaluate_perplexity(
        _load(model, adapter, dtype),
        tokens,
        structure=structure_ids,
        seq_len=seq_len,
        stride=stride,
        batch_size=batch_size,
        max_tokens=max_tokens,
        progress=not json,
    )
    result = {
        "model": model,
        "adapter": adapter and str(adapter),
        "data": data,
        "perplexity": measured.perplexity,
        "loss": measured.loss,
        "tokens": measured.tokens,
        "seq_len": seq_len,
        "stride": stride or max(1, seq_len // 2),
    }
    _print(
        result,
        json,
        f"perplexity {measured.perplexity:.4f}  (loss {measured.loss:.4f} nats, {measured.tokens:,} tokens)",
    )


def generate(
    *,
    prompt: str,
    model: str = PACKAGED_MODEL,
    adapter: Path | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    chat: bool = False,
    structure: Structure | None = None,
    seed: int = 0,
    dtype: Dtype = "float32",
) -> None:
    """Continue a prompt.

    Args:
        prompt: the text to continue.
        model: smollm2-135m (the packaged weights), a directory, a .gguf file, or a Hub name.
        adapter: directory of a trained adapter.
        max_new_tokens: at most this many tokens.
        temperature: 0 takes the most likely token; higher values sample.
        top_k: sample among the k most likely tokens.
        top_p: sample among the most likely tokens that together have this probability.
        chat: give the prompt to the model's chat template, as a user's message.
        structure: tell a hylorada_v2 adapter the structure of the prompt: code; new tokens continue it.
        seed: of the sampling.
        dtype: of the weights and the computation.
    """
    _check_adapter(adapter, structure)
    tokenizer = _tokenizer(model)
    text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}]) if chat else prompt
    ids, structure_ids = _prompt(text, tokenizer, structure)
    if not ids:
        raise DataError("A prompt must have at least one token", repr(prompt), "Give some text.")

    import jax

    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        **structure_ids,
    }
    tokens = _load(model, adapter, dtype).generate(
        [ids], eos_token_id=tokenizer.eos_token_id, rng=jax.random.key(seed), **settings
    )
    print(tokenizer.decode(tokens[0]) if chat else prompt + tokenizer.decode(tokens[0]))


def params(
    *,
    model: str = PACKAGED_MODEL,
    adapter: Adapter = DEFAULTS,
    json: bool = False,
) -> None:
    """Count the trainable parameters from the model's config alone: no weights are read, no memory is taken.

    Args:
        model: smollm2-135m, a directory with a config.json, a .gguf file, or a Hub name.
        adapter: what would be trained.
        json: print one JSON object.
    """
    settings = adapter.build()

    import math

    import jax

    from hylorada_jax.models.loading import model_init
    from hylorada_jax.surgery.plan import count_parameters

    init = model_init(model)
    sites = _plan(init, settings)
    base = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(jax.eval_shape(init, jax.random.key(0))))
    components: dict[str, int] = {}
    for site in sites:
        components[site.component] = components.get(site.component, 0) + count_parameters([site])
    trainable = sum(components.values())
    # Unfrozen leaves are the base's own: they are not beside it.
    total = base + trainable - components.get("unfrozen", 0)
    result = {
        "model": model,
        "method": settings.method,
        "rank": settings.lora_rank,
        "trainable": trainable,
        "components": components,
        "base": base,
        "adapted_layers": sum(len(site.layers) for site in sites if site.component == "linear"),
    }
    text = f"{settings.method}, rank {settings.lora_rank}: {trainable:,} trainable beside "
    text += f"{total - trainable:,} frozen ({100 * trainable / total:.3f} %)"
    if len(components) > 1:
        text += "".join(f"\n  {name:<17} {count:>11,}" for name, count in components.items())
    _print(result, json, text)


def main() -> None:
    """Runs the command; bad input ends with its error alone and exit status 2, an interrupt with 130."""
    try:
        tyro.extras.subcommand_cli_from_dict(
            {
                "finetune": finetune,
                "evaluate": evaluate,
                "generate": generate,
                "params": params,
                "merge": merge,
                "export-peft": export_peft,
                "import-peft": import_peft,
                "parity": parity,
            },
            prog="hylorada",
            description="HyLoRADA: parameter-efficient fine-tuning of language models in JAX.",
        )
    except HyLoRADAError as error:
        sys.exit(_fail(f"error: {error}", 2))
    except KeyboardInterrupt as interrupt:
        sys.exit(_fail(str(interrupt) or "interrupted", 130))


def _fail(message: str, status: int) -> int:
    print(message, file=sys.stderr)
    return status


def _plan(init: Callable[[Any], Any], config: HyLoRADAConfig) -> "tuple[Site, ...]":
    """What the config trains in the model of an initialisation, from shapes alone."""
    from hylorada_jax.surgery.modules import find_modules
    from hylorada_jax.surgery.plan import plan

    return plan(find_modules(init), config)


def _require_encoder(config: HyLoRADAConfig | None, structure: str) -> None:
    if config is None or not config.use_hylorada_v2:
        raise ConfigError(
            "Structure is read by the structure encoder, which only method hylorada_v2 has",
            f"--structure {structure} for " + ("no adapter" if config is None else f"method {config.method}"),
            "Choose hylorada_v2, or leave --structure out.",
        )


def _settings_of(adapter: Path, given: AdapterOptions) -> HyLoRADAConfig:
    """The settings of a saved adapter, beside which no other are given."""
    from hylorada_jax.io.adapter_files import read_adapter

    if named := [f"--{name.replace('_', '-')}" for name, value in vars(given).items() if value is not None]:
        raise ConfigError(
            "An adapter that is trained on keeps its settings",
            f"--start-from {adapter} {' '.join(named)}",
            "Give one.",
        )
    return read_adapter(adapter)[1]


def _check_adapter(adapter: Path | None, structure: str | None) -> None:
    """Reports a damaged adapter, and structure that it cannot read, before the model is loaded."""
    from hylorada_jax.io.adapter_files import read_adapter

    config = None if adapter is None else read_adapter(adapter)[1]
    if structure:
        _require_encoder(config, structure)


def _tokens(
    texts: list[Document], tokenizer: "Tokenizer", structure: Structure | None
) -> tuple[list[Any], list[Any] | None]:
    """The token ids of each document, and their structure ids where these are asked for."""
    from hylorada_jax.training.data import tokenize, tokenize_with_structure

    if structure is None:
        return tokenize(texts, tokenizer), None
    found = tokenize_with_structure(texts, tokenizer, structure)
    told = f"structure: {len(found.unparsed)} of {len(texts)} documents do not parse: depth by indentation"
    print(", ".join([told, *found.unparsed[:3]]), file=sys.stderr)
    return found.tokens, found.structure_ids


def _prompt(
    text: str, tokenizer: "Tokenizer", structure: Structure | None
) -> tuple[list[int], dict[str, list[list[int]]]]:
    """The token ids of a prompt, and what generation is told beside them."""
    ids, offsets = tokenizer.encode_with_offsets(text)
    if structure is None:
        return ids, {}

    from hylorada_jax.structure.code import token_depths

    return ids, {"structure_ids": [token_depths(text, offsets)[0].tolist()]}


def _tokenizer(model: str) -> "Tokenizer":
    from hylorada_jax.models.tokenizer import load_tokenizer

    return load_tokenizer(model)


def _load(model: str, adapter: Path | None, dtype: str) -> Any:
    import jax.numpy as jnp

    from hylorada_jax.model import HyLoRADAModel
    from hylorada_jax.models.loading import load_model

    if adapter is None:
        return load_model(model, dtype=jnp.dtype(dtype))
    return HyLoRADAModel.from_pretrained(load_model(model, dtype=jnp.dtype(dtype)), adapter)


def _print(result: dict[str, Any], as_json: bool, text: str) -> None:
    print(json.dumps(result) if as_json else text)


if __name__ == "__main__":
    main()
