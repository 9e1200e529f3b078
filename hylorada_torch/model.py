"""A torch language model with adapters."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import CheckpointError
from hylorada_torch.surgery import attach_adapters


class HyLoRADAModel(nn.Module):
    """A frozen base model whose targeted linear layers carry trainable adapters.

    Args:
        base_model: a torch model, such as GPT2LMHeadModel or LlamaForCausalLM of transformers; it is frozen
            and changed in place.
        config: what is adapted, and how.
        seed: of the adapters' random initial values.

    Raises:
        NotBuiltError, ModelError, TargetError: as `attach_adapters`.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> base = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16))
        >>> model = HyLoRADAModel(base, HyLoRADAConfig(method="lora", lora_rank=2))
        >>> list(model.adapters())
        ['transformer.h.0.attn.c_attn.lora_A', 'transformer.h.0.attn.c_attn.lora_B']
    """

    def __init__(self, base_model: nn.Module, config: HyLoRADAConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self._adapters = attach_adapters(base_model, config, seed=seed)
        self.base_model = base_model

    def forward(self, input_ids: Tensor, **inputs: Any) -> Any:
        """The base model's own output, logits among it, for input_ids [batch, seq] and its other inputs."""
        return self.base_model(input_ids, **inputs)

    def adapters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters, named ``<layer>.<leaf>``: ``model.layers.0.self_attn.q_proj.lora_A``."""
        return {
            f"{name}.{leaf}": parameter
            for name, adapter in self._adapters.items()
            for leaf, parameter in adapter.named_parameters()
        }

    def load_adapters(self, values: Mapping[str, Tensor]) -> None:
        """Set every trainable parameter.

        Args:
            values: by the names of `adapters`; shapes must agree, dtypes are converted.

        Raises:
            CheckpointError: a name is missing or unknown, or a shape differs; no value has been set then.
        """
        own = self.adapters()
        problems = [f"missing {name}" for name in own if name not in values]
        problems += [f"unknown {name}" for name in values if name not in own]
        problems += [
            f"{name} is {tuple(values[name].shape)}, not {tuple(parameter.shape)}"
            for name, parameter in own.items()
            if name in values and values[name].shape != parameter.shape
        ]
        if problems:
            raise CheckpointError(
                "Adapter values must fit the model's adapters, name by name",
                "; ".join(problems),
                "Build the model with the config that the adapters were trained with.",
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(values[name])

    def print_trainable_parameters(self) -> None:
        """Print how many parameters train, of how many."""
        trainable = sum(parameter.numel() for parameter in self.adapters().values())
        total = sum(parameter.numel() for parameter in self.parameters())
        share = 100 * trainable / total
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {share:.4f}")
