"""The command line: parses and delegates.

Everything heavy is imported inside the commands, so that ``--help`` answers at once and bad input is
reported before a model is loaded.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import ConfigError, DataError, HyLoRADAError
from hylorada_jax.training.corpus import PYTHON_STDLIB, load_documents

if TYPE_CHECKING:
    from hylorada_jax.models.tokenizer import Tokenizer

PACKAGED_MODEL = "smollm2-135m"
Method = Literal["lora", "dora", "lorada", "longlora", "sparse", "hylorada_v1", "hylorada_v2", "hylorada"]
Dtype = Literal["float32", "bfloat16"]


def finetune(
    *,
    output: Path,
    model: str = PACKAGED_MODEL,
    data: str = PYTHON_STDLIB,
    eval_data: str | None = None,
    method: Method | None = None,
    config: Path | None = None,
    rank: int | None = None,
    alpha: float | None = None,
    dropout: float | None = None,
    targets: tuple[str, ...] | None = None,
    exclude: tuple[str, ...] = (),
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
        method: what is trained: lora, dora, hylorada_v1, …; by default hylorada_v1.
        config: a HyLoRADAConfig as JSON; the options given beside it win.
        rank: rank of the update, r [8].
        alpha: scale of the update, α [2r].
        dropout: probability of dropping inputs of the low-rank path [0].
        targets: layer names, regular expressions, or all-linear [the attention projections].
        exclude: layer names or regular expressions to leave out.
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

    adapter = _adapter_config(
        config, method=method, rank=rank, alpha=alpha, dropout=dropout, targets=targets, exclude=exclude
    )
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
    train_texts = load_documents(data, "all" if eval_data else "train")
    eval_texts = load_documents(eval_data) if eval_data else load_documents(data, "eval")

    import jax.numpy as jnp

    from hylorada_jax.model import HyLoRADAModel
    from hylorada_jax.models.loading import load_model
    from hylorada_jax.training.data import tokenize
    from hylorada_jax.training.trainer import HyLoRADATrainer

    tokenizer = _tokenizer(model)
    train, held_out = (tokenize(texts, tokenizer) for texts in (train_texts, eval_texts))
    adapted = HyLoRADAModel(load_model(model, dtype=jnp.dtype(dtype), remat=remat), adapter, seed)
    trainer = HyLoRADATrainer(adapted, train, held_out, training)
    print(f"model    {model}, {dtype}")
    print(
        f"data     {data}: {sum(map(len, train)):,} tokens to train on, {sum(map(len, held_out)):,} held out"
    )
    print(f"method   {adapter.method}, rank {adapter.lora_rank}: ", end="")
    adapted.print_trainable_parameters()

    result = trainer.train()
    print(f"held-out perplexity  before {result.perplexity_before:.3f}  after {result.perplexity_after:.3f}")
    if ids := tokenizer.encode(prompt):
        eos = tokenizer.eos_token_id
        with adapted.disable_adapter():
            before = adapted.generate([ids], max_new_tokens=64, eos_token_id=eos)
        after = adapted.generate([ids], max_new_tokens=64, eos_token_id=eos)
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
        dtype: of the weights and the computation.
        json: print one JSON object.
    """
    texts = load_documents(data, "eval" if data == PYTHON_STDLIB else "all")
    tokenizer = _tokenizer(model)

    from hylorada_jax.evaluation.perplexity import evaluate_perplexity
    from hylorada_jax.training.data import tokenize

    measured = evaluate_perplexity(
        _load(model, adapter, dtype),
        tokenize(texts, tokenizer),
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
        seed: of the sampling.
        dtype: of the weights and the computation.
    """
    tokenizer = _tokenizer(model)
    text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}]) if chat else prompt
    ids = tokenizer.encode(text)
    if not ids:
        raise DataError("A prompt must have at least one token", repr(prompt), "Give some text.")

    import jax

    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
    }
    tokens = _load(model, adapter, dtype).generate(
        [ids], eos_token_id=tokenizer.eos_token_id, rng=jax.random.key(seed), **settings
    )
    print(tokenizer.decode(tokens[0]) if chat else prompt + tokenizer.decode(tokens[0]))


def params(
    *,
    model: str = PACKAGED_MODEL,
    method: Method | None = None,
    config: Path | None = None,
    rank: int | None = None,
    targets: tuple[str, ...] | None = None,
    exclude: tuple[str, ...] = (),
    json: bool = False,
) -> None:
    """Count the trainable parameters from the model's config alone: no weights are read, no memory is taken.

    Args:
        model: smollm2-135m, a directory with a config.json, a .gguf file, or a Hub name.
        method: what would be trained: lora, dora, hylorada_v1, …; by default hylorada_v1.
        config: a HyLoRADAConfig as JSON; the options given beside it win.
        rank: rank of the update, r [8].
        targets: layer names, regular expressions, or all-linear [the attention projections].
        exclude: layer names or regular expressions to leave out.
        json: print one JSON object.
    """
    adapter = _adapter_config(config, method=method, rank=rank, targets=targets, exclude=exclude)

    import math

    import jax

    from hylorada_jax.models.loading import model_init
    from hylorada_jax.surgery.build import count_parameters, plan
    from hylorada_jax.surgery.linears import find_linears

    init = model_init(model)
    sites = plan(find_linears(init), adapter)
    trainable = count_parameters(sites, adapter)
    base = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(jax.eval_shape(init, jax.random.key(0))))
    result = {
        "model": model,
        "method": adapter.method,
        "rank": adapter.lora_rank,
        "trainable": trainable,
        "base": base,
        "adapted_layers": sum(len(site.layers) for site in sites),
    }
    share = 100 * trainable / (base + trainable)
    text = f"{adapter.method}, rank {adapter.lora_rank}: "
    text += f"{trainable:,} trainable beside {base:,} frozen ({share:.3f} %)"
    _print(result, json, text)


def main() -> None:
    """Runs the command; bad input ends with its error alone and exit status 2, an interrupt with 130."""
    try:
        tyro.extras.subcommand_cli_from_dict(
            {"finetune": finetune, "evaluate": evaluate, "generate": generate, "params": params},
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


def _adapter_config(
    file: Path | None,
    *,
    exclude: tuple[str, ...] = (),
    rank: int | None = None,
    alpha: float | None = None,
    **given: Any,
) -> HyLoRADAConfig:
    names = {"dropout": "lora_dropout", "targets": "target_modules"}
    settings: dict[str, Any] = {
        names.get(name, name): value for name, value in given.items() if value is not None
    }
    if exclude:
        settings["exclude_modules"] = exclude
    if rank is not None:
        # α follows r where only r is given, so that the update's scale stays the same.
        settings |= {"lora_rank": rank, "lora_alpha": 2.0 * rank}
    if alpha is not None:
        settings["lora_alpha"] = alpha
    if file is None:
        return HyLoRADAConfig(**settings)
    if "method" in settings:
        raise ConfigError(
            "A config file names its method", f"--config {file} --method {settings['method']}", "Give one."
        )
    return dataclasses.replace(HyLoRADAConfig.load(file), **settings)


def _tokenizer(model: str) -> "Tokenizer":
    from hylorada_jax.models.tokenizer import load_tokenizer

    return load_tokenizer(model)


def _load(model: str, adapter: Path | None, dtype: str) -> Any:
    import jax.numpy as jnp

    from hylorada_jax.io.adapter_files import read_adapter
    from hylorada_jax.model import HyLoRADAModel
    from hylorada_jax.models.loading import load_model

    if adapter is None:
        return load_model(model, dtype=jnp.dtype(dtype))
    read_adapter(adapter)  # a damaged adapter is reported before the model is loaded
    return HyLoRADAModel.from_pretrained(load_model(model, dtype=jnp.dtype(dtype)), adapter)


def _print(result: dict[str, Any], as_json: bool, text: str) -> None:
    print(json.dumps(result) if as_json else text)


if __name__ == "__main__":
    main()
