"""Contenders that torch runs: PEFT."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.contenders.setting import RATE, Contender, Setting
from hylorada_jax.errors import HyLoRADAError
from hylorada_jax.models.source import find_source
from hylorada_jax.training.optimizer import schedule


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
        "All contenders run on one device.",
        f"JAX computes on {backend}, which this torch ({torch.__version__}) does not have",
        "Install a torch for that device, set JAX_PLATFORMS=cpu, or leave peft out of --contenders.",
    )


def peft_adapter(use_dora: bool, setting: Setting, batch: dict[str, np.ndarray]) -> Contender:
    """PEFT's LoRA or DoRA, in a loop as its users write it."""
    import peft
    import torch

    torch.set_num_threads(setting.torch_threads)
    device, training = torch_device(), setting.training
    options = peft.LoraConfig(
        r=setting.rank,
        lora_alpha=setting.alpha,
        use_dora=use_dora,
        target_modules=list(setting.adapted),
    )
    base = torch_base(setting).to(device)
    if setting.remat:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    model = peft.get_peft_model(base, options).train()
    leaves = [leaf for leaf in model.parameters() if leaf.requires_grad]
    optimizer = torch.optim.AdamW(leaves, lr=RATE, weight_decay=training.weight_decay, fused=True)
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


def torch_base(setting: Setting) -> Any:
    """The base model as transformers reads it from the same file."""
    import torch
    import transformers

    path, dtype = find_source(setting.model).path, getattr(torch, setting.dtype)
    if path.is_dir():
        return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    return transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
