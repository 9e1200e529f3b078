"""A torch language model with adapters."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import CheckpointError, ConfigError, DataError, ModelError
from hylorada_jax.io.hub import recorded_name
from hylorada_jax.models.families import FLAX
from hylorada_jax.saved.adapter_files import check_base, write_adapter
from hylorada_jax.saved.base_identity import base_identity
from hylorada_jax.saved.saved_adapter import open_adapter
from hylorada_jax.structure.code import Domain
from hylorada_torch.forward_pass import ForwardPass
from hylorada_torch.position import check_positions, default_positions
from hylorada_torch.surgery import attach_adapters, base_weight, linears_of


class HyLoRADAModel(nn.Module):
    """A frozen base model with every component of the method that the config names.

    Args:
        base_model: a torch model, such as GPT2LMHeadModel or LlamaForCausalLM of transformers; it is frozen
            and changed in place. Called through its HyLoRADAModel from then on.
        config: what is adapted, and how.
        seed: of the adapters' random initial values.

    Raises:
        ModelError, TargetError, ConfigError: as `attach_adapters`.

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
        self._identity = _identity(base_model)
        # Kept for who talks with the model; read by none here.
        self.chat_template: str | None = None
        self.structure: Domain | None = None
        self._attached = attach_adapters(base_model, config, seed=seed)
        self.structure_encoder = self._attached.structure_encoder
        self.base_model = base_model
        self._base_config = getattr(base_model, "config", None)
        self.train(base_model.training)

    def forward(
        self,
        input_ids: Tensor,
        structure_ids: Tensor | None = None,
        structure_positions: Tensor | None = None,
        **inputs: Any,
    ) -> Any:
        """The base model's own output, logits among it.

        Args:
            input_ids: [batch, seq].
            structure_ids: [batch, seq], what the domain knows of each token; method hylorada_v2 alone.
            structure_positions: [batch, seq] where each token stands for the structure encoder (hours of the
                calendar, say); its position id when None.
            **inputs: the base model's other inputs. ``position_ids`` default to counting from the first real
                token of ``attention_mask``, on after a cache; RoBERTa, whose table begins with rows of
                padding, counts its own. The base model makes a cache only where ``use_cache=True`` asks for
                one.

        Raises:
            ConfigError: structure is given to a model without an encoder.
            DataError: positions or structure_ids are negative or have another shape.
        """
        positions = self._positions(input_ids, inputs)
        key_positions = self._key_positions(positions, _cache(inputs))
        prior = self._prior(positions, structure_ids, structure_positions)
        takes = inspect.signature(self.base_model.forward).parameters
        if "position_ids" in takes and not self._counts_from_padding:
            inputs["position_ids"] = positions
        if "use_cache" in takes:
            inputs.setdefault("use_cache", False)
        current = ForwardPass(positions, key_positions, prior)
        if getattr(self._base_config, "is_encoder_decoder", False):
            current = ForwardPass(None, None, None)  # each stack counts its own tokens from 0
        with self._attached.passes.running(current):
            output = self.base_model(input_ids, **inputs)
        if isinstance(output, Mapping) and (cache := _cache(output)) is not None:
            cache.position_ids = key_positions  # for the next tokens
        return output

    def _positions(self, input_ids: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        batch, seq = input_ids.shape[:2]
        if (given := inputs.get("position_ids")) is not None:
            check_positions(given, batch, seq)
            return given
        past, mask = _cache(inputs), inputs.get("attention_mask")
        total = seq if past is None else past.get_seq_length() + seq
        if mask is not None and mask.ndim != 2:
            mask = None
        return default_positions(batch, total, mask)[:, -seq:].to(input_ids.device)

    @property
    def _counts_from_padding(self) -> bool:
        family = FLAX.get(getattr(self._base_config, "model_type", ""))
        return family is not None and family.positions == "after padding"

    @staticmethod
    def _key_positions(positions: Tensor, past: Any) -> Tensor:
        if past is None or past.get_seq_length() == 0:
            return positions
        if not hasattr(past, "position_ids"):
            raise ModelError(
                "A cache goes on from a forward pass of HyLoRADAModel, which keeps its keys' positions.",
                "a cache of another origin",
                "Make it by calling the HyLoRADAModel with use_cache=True.",
            )
        return torch.cat([past.position_ids, positions], dim=1)

    def _prior(
        self, positions: Tensor, structure_ids: Tensor | None, structure_positions: Tensor | None
    ) -> Tensor | None:
        if self.structure_encoder is not None:
            if structure_ids is not None and structure_ids.numel() and structure_ids.min() < 0:
                raise DataError(
                    "Structure ids must be integers ≥ 0.",
                    f"an id of {structure_ids.min().item()}",
                    "Count what the domain tells apart from 0; give padding 0.",
                )
            where = positions if structure_positions is None else structure_positions
            return self.structure_encoder(where, structure_ids, seq_len=self.config.structure_seq_len)
        if structure_ids is not None or structure_positions is not None:
            raise ConfigError(
                "Only a model with a structure encoder takes structure_ids and structure_positions.",
                f"method={self.config.method!r}",
                "Choose method='hylorada_v2', or leave them out.",
            )
        return None

    def adapters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters, named ``<place>.<leaf>``: ``model.layers.0.self_attn.q_proj.lora_A``."""
        return self._attached.parameters()

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
                "Adapter values must fit the model's adapters, name by name.",
                "; ".join(problems),
                "Build the model with the config that the adapters were trained with.",
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(values[name])

    def save_pretrained(self, directory: str | Path, *, overwrite: bool = False) -> None:
        """Write the adapter, as `hylorada_jax` does: adapter_config.json and adapter_model.safetensors.

        Args:
            directory: made if it does not exist.
            overwrite: replace an adapter that is already there.

        Raises:
            CheckpointError: an adapter is already there, is not finite, or cannot be written.
        """
        tensors = {name: value.detach().cpu().numpy() for name, value in self.adapters().items()}
        write_adapter(
            directory,
            tensors,
            self.config,
            self._identity,
            overwrite=overwrite,
            chat_template=self.chat_template,
            structure=self.structure,
        )

    @classmethod
    def from_pretrained(cls, base_model: nn.Module, directory: str | Path) -> "HyLoRADAModel":
        """The model with an adapter that either package has saved.

        Args:
            base_model: the model it was trained on; changed in place, as by the constructor.
            directory: holds the adapter's two files.

        Raises:
            CheckpointError: the adapter is damaged, or is another model's.
        """
        saved = open_adapter(directory)
        check_base(saved.base, _identity(base_model))
        saved = saved.on([name for name, _ in linears_of(base_model)])
        tensors = saved.tensors()
        model = cls(base_model, saved.config)
        model.load_adapters({name: torch.from_numpy(tensor) for name, tensor in tensors.items()})
        model.chat_template, model.structure = saved.chat_template, saved.structure
        return model

    def print_trainable_parameters(self) -> None:
        """Print how many parameters train, of how many."""
        trainable = sum(parameter.numel() for parameter in self.adapters().values())
        total = sum(parameter.numel() for parameter in self.parameters())
        share = 100 * trainable / total
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {share:.4f}")


def _cache(arguments: Mapping[str, Any]) -> Any:
    """The cache among a model's inputs or outputs: transformers 5.24 has given it a shorter name."""
    return arguments.get("cache", arguments.get("past_key_values"))


def _identity(base_model: nn.Module) -> dict[str, Any]:
    linears = [(name, *base_weight(module).shape) for name, module in linears_of(base_model)]
    config = getattr(base_model, "config", None)
    return base_identity(recorded_name(getattr(config, "_name_or_path", "")) or None, config, linears)
