"""The contenders of step_time: our methods, peft's on torch and qwix's LoRA, each as a step to call."""

from __future__ import annotations

import dataclasses
import functools
import gc
import importlib
import importlib.metadata
import importlib.util
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from benchmarks.trial import program_bytes
from hylorada_jax.config import QKVO, HyLoRADAConfig
from hylorada_jax.errors import HyLoRADAError, ModelError
from hylorada_jax.model import HyLoRADAModel
from hylorada_jax.models.causal_lm import CausalLM
from hylorada_jax.models.loading import DECODER_FAMILIES, load_model
from hylorada_jax.models.source import find_source
from hylorada_jax.training.config import TrainingConfig
from hylorada_jax.training.optimizer import make_optimizer, schedule
from hylorada_jax.training.step import init_state, make_train_step, score

RANK, ALPHA = 8, 16.0
WARMUP = 2  # steps of each contender before any is timed, or its memory read

# What is not the same in all by their nature: it is told with the figures.
DIFFERENCES = (
    "Loss: lora, dora, hylorada_v1, hylorada and qwix lora share one that never holds the logits of all "
    "tokens and takes its gradient on the way; peft's is torch's cross-entropy of all float32 logits.",
    "DoRA: the gradient stops at the norm of W + sBA in dora and in peft dora; hylorada_v1 and hylorada "
    "differentiate it.",
    "Column scales: ours are resolved once a step from weights alone; peft dora computes its norm in every "
    "forward pass.",
    "hylorada also trains what its method adds by default: scales of positions, and of the attention logits "
    "and their distances; no sparse adapter.",
    "Optimizer: AdamW after clipping by the global norm everywhere. Ours has a rate and a decay per kind of "
    "parameter (LoRA+); qwix lora has optax's with one rate, peft's is torch's fused one with one rate.",
    "Precision of the adapters: float32 in ours and in peft's whatever the base's, the base's in qwix's.",
    "A step of JAX is one compiled program, which takes its state in place; torch runs eagerly. Neither "
    "rematerialises.",
    "Resident memory: JAX's counts its compiled programs, and what its compiler does not give back.",
    "Rows are whole: no padding and no packed documents, and no contender is given a mask beside causality.",
)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all contenders have in common.

    Args:
        model: as for `load_model`, of a family that our decoder has.
        batch_size: rows per step.
        seq_len: tokens per row.
        dtype: of the frozen weights and the computation: float32 or bfloat16.
        steps: over which the learning rate falls to zero: those of a whole run.
        torch_threads: what torch computes with on a CPU.
    """

    model: str
    batch_size: int
    seq_len: int
    dtype: str
    steps: int
    torch_threads: int

    @property
    def training(self) -> TrainingConfig:
        """Rate, decay and clipping: the defaults of `TrainingConfig`."""
        return TrainingConfig(
            output_dir="unused",
            steps=self.steps,
            batch_size=self.batch_size,
            seq_len=self.seq_len,
            warmup_ratio=0.0,
        )

    def batch(self) -> dict[str, np.ndarray]:
        """The rows of every step: random "input_ids" and the "targets" that follow them.

        Raises:
            ModelError: the model is not found, or our decoder does not have its family.
        """
        config = find_source(self.model, config_only=True).config
        if config.get("model_type") not in DECODER_FAMILIES:
            raise ModelError(
                "The contenders share a model of a family that our decoder has: "
                + ", ".join(DECODER_FAMILIES),
                f"model_type {config.get('model_type')!r}",
                "Choose another model.",
            )
        size = (self.batch_size, self.seq_len + 1)
        tokens = np.random.default_rng(0).integers(config["vocab_size"], size=size, dtype=np.int32)
        return {"input_ids": tokens[:, :-1], "targets": tokens[:, 1:]}


@dataclasses.dataclass(frozen=True)
class Contender:
    """Something that trains.

    Args:
        step: does one step on the batch and returns its loss, when all of it is done.
        trainable: number of trainable parameters.
        compile_seconds: what tracing and compiling the step took; None where nothing is compiled.
        program_bytes: memory of the compiled step: arguments, results and temporaries, what it updates in
            place counted once.
    """

    step: Callable[[], float]
    trainable: int
    compile_seconds: float | None = None
    program_bytes: int | None = None


def build(name: str, setting: Setting, base: CausalLM | None = None) -> Contender:
    """Makes a contender ready to step from the base model's weights.

    Args:
        name: a key of `CONTENDERS`.
        setting: what all have in common.
        base: the loaded model, for JAX's contenders to share; None loads it where it is needed.

    Returns:
        The contender, compiled where it is to be compiled.

    Raises:
        HyLoRADAError: JAX computes on a device that torch does not have.
        ModelError: the model is not found, or our decoder does not have its family.
    """
    batch = setting.batch()
    if in_torch(name):
        return CONTENDERS[name](setting, batch)
    return CONTENDERS[name](setting, batch, base or load_base(setting))


def build_all(names: Iterable[str], setting: Setting) -> dict[str, Contender]:
    """The contenders by name, each told of when it is ready; those of JAX share their base's weights."""
    base, found = None, {}
    for name in names:
        if base is None and not in_torch(name):
            base = load_base(setting)
        found[name] = build(name, setting, base)
        seconds = found[name].compile_seconds
        print(f"{name}: ready" + (f", compiled in {seconds:.1f} s" if seconds else ""), flush=True)
    return found


def load_base(setting: Setting) -> CausalLM:
    """The base model of JAX's contenders."""
    return load_model(setting.model, dtype=jnp.dtype(setting.dtype))


def in_torch(name: str) -> bool:
    """Whether a contender runs in torch."""
    return name.startswith("peft ")


def packages(name: str) -> tuple[str, ...]:
    """The packages that a contender needs besides ours."""
    if in_torch(name):
        return ("torch", "transformers", "peft")
    return ("qwix",) if name.startswith("qwix ") else ()


def check(names: Sequence[str], setting: Setting, rounds: int) -> None:
    """Refuses, before any model is loaded, what cannot be measured here.

    Raises:
        HyLoRADAError: a contender is unknown or given twice, a package is missing, torch lacks JAX's device,
            or a number is not positive.
        ModelError: the model is not found, or our decoder does not have its family.
    """
    known = ", ".join(CONTENDERS)
    if unknown := [name for name in names if name not in CONTENDERS]:
        raise HyLoRADAError("A contender must be one of " + known, ", ".join(unknown), "Choose among them.")
    if not names or len(set(names)) < len(names):
        given = ", ".join(names) or "none"
        raise HyLoRADAError(
            "Contenders are given once each, and at least one", given, f"Choose among: {known}."
        )
    for name in names:
        if missing := [package for package in packages(name) if importlib.util.find_spec(package) is None]:
            raise HyLoRADAError(
                f"The contender {name!r} needs the packages {', '.join(packages(name))}",
                f"no package {' and no '.join(missing)}",
                f"pip install -c constraints.txt {' '.join(missing)}; or leave it out of --contenders.",
            )
    numbers = {
        "batch_size": setting.batch_size,
        "seq_len": setting.seq_len,
        "rounds": rounds,
        "threads": setting.torch_threads,
    }
    if wrong := {number: value for number, value in numbers.items() if value < 1}:
        rule = ", ".join(numbers) + " must be ≥ 1"
        raise HyLoRADAError(
            rule, ", ".join(f"{number}={value}" for number, value in wrong.items()), "Correct it."
        )
    if any(map(in_torch, names)):
        torch_device()
    setting.batch()


def versions(names: Iterable[str]) -> dict[str, str]:
    """The installed versions of the packages that contenders need besides ours."""
    needed = dict.fromkeys(package for name in names for package in packages(name))
    return {package: importlib.metadata.version(package) for package in needed}


def precision(setting: Setting) -> AbstractContextManager[Any]:
    """Within it, JAX multiplies float32 in float32 as torch does; by default a GPU would round to TF32."""
    return jax.default_matmul_precision("highest" if setting.dtype == "float32" else "default")


def describe(setting: Setting) -> dict[str, Any]:
    """The settings as they are recorded."""
    training = setting.training
    return dataclasses.asdict(setting) | {
        "warmup_steps": WARMUP,
        "rank": RANK,
        "alpha": ALPHA,
        "dropout": 0.0,
        "adapted": [f"{role}_proj" for role in QKVO],
        "tokens": "random, the same in every step",
        "optimizer": "AdamW",
        "learning_rate": training.learning_rate,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
    }


def timed(step: Callable[[], float]) -> tuple[float, float]:
    """(seconds, loss) of one step; no garbage is collected within it."""
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        loss = step()
        return time.perf_counter() - start, loss
    finally:
        gc.enable()


def torch_device() -> str:
    """Torch's name of the device that JAX computes on.

    Raises:
        HyLoRADAError: torch cannot use it.
    """
    import torch

    backend = jax.default_backend()
    if backend == "cpu":
        return "cpu"
    if backend == "gpu" and torch.cuda.is_available():
        return "cuda"
    raise HyLoRADAError(
        "All contenders run on one device",
        f"JAX computes on {backend}, which this torch ({torch.__version__}) does not have",
        "Install a torch for that device, set JAX_PLATFORMS=cpu, or leave peft out of --contenders.",
    )


def _ours(method: str, setting: Setting, batch: dict[str, np.ndarray], base: CausalLM) -> Contender:
    config = HyLoRADAConfig(method=method, lora_rank=RANK, lora_alpha=ALPHA, target_modules=QKVO)
    model = HyLoRADAModel(base, config)
    optimizer = make_optimizer(model.adapters, setting.training, config)
    state = init_state(model.adapters, optimizer)
    step = make_train_step(model, optimizer, setting.training)
    return _compiled(step, state, model.frozen, batch, model.num_trainable)


def _qwix(setting: Setting, batch: dict[str, np.ndarray], base: CausalLM) -> Contender:
    """Qwix's LoRA in our decoder: it adds A and B to the parameters of the layers that its rule names."""
    qwix: Any = importlib.import_module("qwix")  # no dependency of this project
    rule = qwix.LoraRule(module_path=".*/(q|k|v|o)_proj", rank=RANK, alpha=ALPHA)
    module = qwix.apply_lora_to_model(base.module, qwix.LoraProvider([rule]), methods=("__call__", "hidden"))
    model, training = dataclasses.replace(base, module=module), setting.training

    @jax.jit  # which leaves out the base's own random weights
    def fresh(key: jax.Array) -> dict[tuple[str, ...], jax.Array]:
        leaves = flatten_dict(model.init_params(key))
        return {path: leaf.astype(setting.dtype) for path, leaf in leaves.items() if "_lora_" in path[-1]}

    adapters = fresh(jax.random.key(0))
    factor = schedule(training)
    optimizer = optax.chain(
        optax.clip_by_global_norm(training.max_grad_norm),
        optax.adamw(lambda step: training.learning_rate * factor(step), weight_decay=training.weight_decay),
    )

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: Any, frozen: Any, batch: Any) -> Any:
        def loss(adapters: Any) -> jax.Array:
            variables = {"params": unflatten_dict(flatten_dict(frozen) | adapters)}
            hidden = model.hidden(variables, batch["input_ids"])
            return score(hidden, model.head(variables), batch["targets"]).mean()

        adapters, opt_state = state
        value, gradient = jax.value_and_grad(loss)(adapters)
        updates, opt_state = optimizer.update(gradient, opt_state, adapters)
        return (optax.apply_updates(adapters, updates), opt_state), {"loss": value}

    trainable = sum(leaf.size for leaf in adapters.values())
    return _compiled(step, (adapters, optimizer.init(adapters)), base.params, batch, trainable)


def _compiled(step: Any, state: Any, frozen: Any, batch: dict[str, np.ndarray], trainable: int) -> Contender:
    """The contender of a jitted (state, frozen, batch) → (state, metrics)."""
    rows = jax.device_put(batch)
    start = time.perf_counter()
    program = step.lower(state, frozen, rows).compile()
    seconds = time.perf_counter() - start

    def run() -> float:
        nonlocal state
        state, metrics = jax.block_until_ready(program(state, frozen, rows))
        return float(metrics["loss"])

    return Contender(run, trainable, seconds, program_bytes(program))


def _peft(use_dora: bool, setting: Setting, batch: dict[str, np.ndarray]) -> Contender:
    import peft
    import torch

    torch.set_num_threads(setting.torch_threads)
    device, training = torch_device(), setting.training
    options = peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        use_dora=use_dora,
        target_modules=[f"{role}_proj" for role in QKVO],
    )
    model = peft.get_peft_model(_torch_base(setting).to(device), options).train()
    leaves = [leaf for leaf in model.parameters() if leaf.requires_grad]
    optimizer = torch.optim.AdamW(
        leaves, lr=training.learning_rate, weight_decay=training.weight_decay, fused=True
    )
    factor = schedule(training)
    rates = [float(factor(jnp.int32(step))) for step in range(setting.steps + 1)]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rates[min(step, setting.steps)])
    ids, targets = (torch.tensor(batch[name]).long().to(device) for name in ("input_ids", "targets"))

    def run() -> float:
        logits = model(input_ids=ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(leaves, training.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        return loss.item()

    return Contender(run, sum(leaf.numel() for leaf in leaves))


def _torch_base(setting: Setting) -> Any:
    """The base model as transformers reads it from the same file."""
    import torch
    import transformers

    path, dtype = find_source(setting.model).path, getattr(torch, setting.dtype)
    if path.is_dir():
        return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    return transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)


CONTENDERS: dict[str, Callable[..., Contender]] = {
    "lora": functools.partial(_ours, "lora"),
    "dora": functools.partial(_ours, "dora"),
    "hylorada_v1": functools.partial(_ours, "hylorada_v1"),
    "hylorada": functools.partial(_ours, "hylorada"),
    "peft lora": functools.partial(_peft, False),
    "peft dora": functools.partial(_peft, True),
    "qwix lora": _qwix,
}
