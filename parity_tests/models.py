"""Every method in every family of models, registered once, and how far JAX is from the reference there.

The oracle is the reference in float64, on the very numbers that JAX has: weights rounded to the dtype that is
measured, adapters to at least float32.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import torch.nn.functional as F
from transformers.pytorch_utils import Conv1D

import hylorada_torch
from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.model import HyLoRADAModel
from hylorada_jax.models.wrapped import as_base
from hylorada_jax.surgery import layout
from hylorada_jax.surgery.modules import modules_of
from parity_tests.families import FAMILIES, VOCAB, all_in_float64, jax_base, measuring, torch_base
from parity_tests.tolerances import BFLOAT16_MODEL, MODEL, relative_error

# Draws of the adapters, whose median error counts. In bfloat16 a single one scatters: of 24, half were within
# 1.1 (logits) and 2 (gradients) times what the base model alone loses, the worst 3 and 5.
DRAWS = {"float64": 1, "float32": 1, "bfloat16": 5}
# Standard deviation of what is added to fresh adapters, many of which multiply one that is zero.
SPREAD = 0.2

# s·B A of the size of W: an update that is far larger would drown in bfloat16 what the base model computes.
_LORA: dict[str, Any] = {"lora_rank": 3, "lora_alpha": 4.0}
_ALL = _LORA | {"target_modules": ("all-linear",)}
_SPARSE: dict[str, Any] = {
    "sparse_enabled": True, "sparse_adapter_dim": 7, "sparse_topk_ratio": 0.5, "sparse_temperature": 0.5,
}  # fmt: skip
_STRUCTURE: dict[str, Any] = {"structure_dim": 5, "structure_seq_len": 12}
# Groups of 4 and a shift of 1: rows of 9 tokens have whole groups, parts in front, and parts behind.
_GROUPS: dict[str, Any] = {"s2_attn_enabled": True, "s2_group_size": 4, "s2_shift_ratio": 0.25}
_UNFROZEN: dict[str, Any] = {"train_embeddings": True, "train_norms": True}
CONFIGS = {
    "lora": HyLoRADAConfig(method="lora", **_ALL),
    "lora, rslora, its own targets": HyLoRADAConfig(method="lora", use_rslora=True, lora_alpha=3.0),
    "dora": HyLoRADAConfig(method="dora", **_ALL),
    "dora, norm not detached": HyLoRADAConfig(method="dora", detach_norm=False, **_LORA),
    "lorada": HyLoRADAConfig(method="lorada", **_LORA),
    "lorada, one scale a layer": HyLoRADAConfig(
        method="lorada", daa_per_head=False, daa_position_bias=True, **_LORA
    ),
    "lorada, all but positions": HyLoRADAConfig(
        method="lorada", daa_position_bias=True, **_ALL, **_SPARSE, **_UNFROZEN
    ),
    "longlora": HyLoRADAConfig(method="longlora", **_LORA, **_GROUPS),
    "sparse": HyLoRADAConfig(method="sparse", **_SPARSE),
    "hylorada_v1": HyLoRADAConfig(method="hylorada_v1", **_ALL),
    "hylorada_v1, ranks by depth": HyLoRADAConfig(
        method="hylorada_v1",
        lora_rank=6,
        lora_alpha=4.0,
        rank_strategy="decreasing",
        use_rslora=True,
        detach_norm=True,
    ),
    "hylorada_v1, one layer, bias scaled": HyLoRADAConfig(
        method="hylorada_v1",
        target_modules=(r".*\.1\..*(c_attn|q_proj)",),
        magnitude_scales_bias=True,
        **_LORA,
    ),
    "hylorada_v2": HyLoRADAConfig(method="hylorada_v2", **_LORA, **_STRUCTURE),
    "hylorada_v2, temporal": HyLoRADAConfig(
        method="hylorada_v2", structure_encoder_type="temporal", **_LORA, **_STRUCTURE
    ),
    "hylorada, both ways": HyLoRADAConfig(method="hylorada", **_ALL, **_SPARSE, **_UNFROZEN),
    "hylorada": HyLoRADAConfig(method="hylorada", **_ALL, **_SPARSE, **_GROUPS, **_UNFROZEN),
}

# Every family with all that it can have: measured in three precisions.
FULLEST = [
    *((family, "hylorada") for family in ("gpt2", "llama", "qwen2", "qwen3", "mistral")),
    ("bert", "hylorada, both ways"),
    ("t5", "lorada, all but positions"),
]
# The other methods, and options of theirs, where families differ in what these meet (biases, names, stacked
# layers, tied heads): formulas, which float64 shows.
MATRIX = [
    *FULLEST,
    *(
        (family, "hylorada")
        for family in ("phi3", "granite", "olmo2", "smollm3", "gemma", "gemma2", "gemma3_text")
    ),
    ("ministral", "lora, rslora, its own targets"),
    ("mixtral", "dora"),
    ("gpt_oss", "longlora"),
    ("qwen3", "lora"),
    ("qwen2", "dora, norm not detached"),
    ("llama", "lorada"),
    ("gpt_oss", "lorada, one scale a layer"),
    ("gpt2", "longlora"),
    ("llama", "sparse"),
    ("qwen2_moe", "hylorada_v1"),
    ("qwen3_moe", "hylorada_v1, ranks by depth"),
    ("llama", "hylorada_v1, one layer, bias scaled"),
    ("gpt2", "hylorada_v2"),
    ("bert", "hylorada_v2"),
    ("qwen2", "hylorada_v2, temporal"),
    *(
        (family, method)
        for family, method in (("gemma4_text", "hylorada"), ("gemma4_unified_text", "lora"))
        if family in FAMILIES
    ),
]


def draw_inputs(
    family: str, config: HyLoRADAConfig | None = None, *, in_front: bool = False
) -> dict[str, np.ndarray]:
    """A batch of two rows, the second padded, with what the family and the method read.

    With ``in_front`` a third is padded there, whose tokens our models count without being given positions,
    and transformers' bare models do not.

    "labels" says what the loss scores: the token at each place of the output, −1 where there is none.
    """
    rng = np.random.default_rng(2)
    mask = np.array([[1] * 9, [1] * 6 + [0] * 3, [0] * 2 + [1] * 7][: 3 if in_front else 2], np.int32)
    given = {"input_ids": rng.integers(VOCAB, size=mask.shape, dtype=np.int32), "attention_mask": mask}
    labels = rng.integers(VOCAB, size=mask.shape, dtype=np.int32)
    given["labels"] = np.where(mask, labels, -1)
    if family == "t5":
        given["decoder_input_ids"] = rng.integers(VOCAB, size=(len(mask), 5), dtype=np.int32)
        given["labels"] = labels[:, :5]
    if config and config.use_hylorada_v2:
        given["structure_ids"] = rng.integers(
            70, size=mask.shape, dtype=np.int32
        )  # beyond 63 they are clipped
    if config and config.structure_encoder_type == "temporal":
        given["structure_positions"] = np.sort(rng.uniform(0, 500, size=mask.shape)).astype(np.float32)
    return given


@dataclasses.dataclass(eq=False)
class Pair:
    """An adapted model on both sides.

    Attributes:
        reference: the oracle, in float64.
        model: in JAX, its base in the dtype that is measured.
        inputs: of both sides, with "labels".
        adapters: those of JAX, float32 at least; set by `load`, which gives the oracle the same.
    """

    reference: hylorada_torch.HyLoRADAModel
    model: HyLoRADAModel
    inputs: dict[str, np.ndarray]
    adapters: Any = dataclasses.field(init=False)

    def load(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Sets the adapters of both sides, to what of these numbers JAX can hold."""
        leaf = jax.tree.leaves(self.model.adapters)[0].dtype
        held = {name: tensor.astype(leaf) for name, tensor in tensors.items()}
        assert layout.tensor_shapes(self.model.sites) == {name: value.shape for name, value in held.items()}
        self.reference.load_adapters({name: torch.tensor(value) for name, value in held.items()})
        self.adapters = layout.unflatten(self.model.sites, held)

    @property
    def train(self) -> bool:
        """Shifted sparse attention is for training alone; nothing else here differs in training."""
        return bool(self.model.config.s2_attn_enabled)

    @functools.cached_property
    def program(self) -> Any:
        """Jitted (adapters, frozen, inputs) → ((loss, logits), gradients of the adapters)."""

        def loss(adapters: Any, frozen: Any, inputs: Any) -> tuple[jax.Array, jax.Array]:
            given = {name: value for name, value in inputs.items() if name != "labels"}
            logits = self.model.apply(adapters, frozen=frozen, train=self.train, **given).logits
            return jax_loss(logits, inputs["labels"]), logits

        return jax.jit(jax.value_and_grad(loss, has_aux=True))

    def got(self, model: HyLoRADAModel | None = None) -> dict[str, np.ndarray]:
        """ "logits" where they are scored, "loss", and the gradient of every adapter by its name.

        Args:
            model: whose adapters and weights are taken, where they are another's than the pair's.
        """
        adapters, frozen = (model.adapters, model.frozen) if model else (self.adapters, self.model.frozen)
        (loss, logits), gradients = self.program(adapters, frozen, self.inputs)
        scored = self.inputs["labels"] >= 0
        return {"logits": np.asarray(logits)[scored], "loss": loss} | layout.flatten(
            self.model.sites, gradients
        )

    def expected(self) -> dict[str, np.ndarray]:
        """The same of the oracle."""
        self.reference.train(self.train)
        return torch_results(self.reference, self.inputs, self.reference.adapters())


def build(
    family: str, config: HyLoRADAConfig, dtype: str, spread: float = SPREAD, *, in_front: bool = False
) -> Pair:
    """Both sides of a model with random adapters; to be called within `measuring(dtype)`.

    Args:
        family: a key of `FAMILIES`.
        config: what is adapted.
        dtype: of the base in JAX.
        spread: standard deviation of what is added to the reference's fresh adapters.
        in_front: a row is padded there too, as of :func:`draw_inputs`.
    """
    with all_in_float64():
        reference = hylorada_torch.HyLoRADAModel(torch_base(family, dtype), config)
    inputs = draw_inputs(family, config, in_front=in_front)
    pair = Pair(reference, HyLoRADAModel(jax_base(family, dtype), config), inputs)
    pair.load(random_adapters(reference, spread))
    return pair


def there_and_back(
    model: HyLoRADAModel, family: str, directory: Path
) -> tuple[hylorada_torch.HyLoRADAModel, HyLoRADAModel]:
    """An adapted float64 model from JAX to its file, to torch, to a file again, and to JAX.

    Args:
        model: whose adapters go there.
        family: of its base.
        directory: for the files, in "jax" and "torch".

    Returns:
        The model in torch, and the one that is back.
    """
    model.save_pretrained(directory / "jax")
    with all_in_float64():
        there = hylorada_torch.HyLoRADAModel.from_pretrained(torch_base(family, "float64"), directory / "jax")
    there.save_pretrained(directory / "torch")
    return there, HyLoRADAModel.from_pretrained(jax_base(family, "float64"), directory / "torch")


def random_adapters(
    reference: hylorada_torch.HyLoRADAModel, spread: float, seed: int = 1
) -> dict[str, np.ndarray]:
    """The reference's adapters with normal numbers of a standard deviation added, by name."""
    rng, adapters = np.random.default_rng(seed), reference.adapters()
    return {
        name: value.detach().numpy() + spread * rng.normal(size=value.shape)
        for name, value in adapters.items()
    }


def jax_loss(logits: jax.Array, labels: Any) -> jax.Array:
    """The mean cross-entropy over the places that have a label."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    return jnp.mean(losses, where=labels >= 0)


def torch_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """As `jax_loss`."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-1)


def torch_inputs(inputs: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """The same numbers, counts as torch has them."""
    tensors = {name: torch.tensor(value) for name, value in inputs.items()}
    return {name: value if value.is_floating_point() else value.long() for name, value in tensors.items()}


def torch_results(
    model: torch.nn.Module, inputs: Mapping[str, np.ndarray], leaves: Mapping[str, torch.Tensor]
) -> dict[str, np.ndarray]:
    """ "logits" where they are scored, "loss", and its gradient with respect to each leaf, in float64."""
    given = torch_inputs(inputs)
    labels = given.pop("labels")
    with all_in_float64():
        logits = model(**given).logits
        loss = torch_loss(logits, labels)
        gradients = torch.autograd.grad(loss, list(leaves.values()))
    results = {"logits": logits[labels >= 0], "loss": loss, **dict(zip(leaves, gradients, strict=True))}
    assert {value.dtype for value in results.values()} == {torch.float64}
    return {name: value.detach().numpy() for name, value in results.items()}


def errors(got: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, float]:
    """The worst relative error of "forward" (logits, loss) and of "gradient" (all the rest).

    The gradients of one leaf of all layers are measured as one vector: that of a single layer's gate, a sum
    of terms of either sign, may all but vanish. β of DAA is measured against the largest gradient there is:
    its own is zero, for the softmax does not see it.
    """
    assert set(got) == set(expected)
    forward = [relative_error(got[name], expected[name]) for name in ("logits", "loss")]
    kinds: dict[tuple[str, int], list[str]] = {}
    for name in expected:
        if name not in ("logits", "loss"):
            kinds.setdefault((name.rsplit(".", 1)[-1], expected[name].ndim), []).append(name)
    largest = max(np.abs(expected[name]).max() for names in kinds.values() for name in names)
    gradient = []
    for (leaf, _), names in kinds.items():
        scale = [largest] if leaf == "beta" else []
        vectors = (
            np.concatenate([*(np.ravel(side[name]) for name in names), scale]) for side in (got, expected)
        )
        gradient.append(relative_error(*vectors))
    return {"forward": max(forward), "gradient": max(gradient)}


@functools.cache
def base_errors(family: str, dtype: str) -> dict[str, float]:
    """The `errors` of the base model alone; its gradients are those of the weights of its linear layers.

    An adapter's gradient is one of these, seen through A and B: it cannot be better.
    """
    inputs = draw_inputs(family)
    with measuring(dtype):
        base = as_base(jax_base(family, dtype))
        linears = modules_of(base).linears

        def loss(params: Any) -> tuple[jax.Array, jax.Array]:
            given = {name: value for name, value in inputs.items() if name != "labels"}
            logits = base.forward({"params": params}, given.pop("input_ids"), **given).logits
            return jax_loss(logits, inputs["labels"]), logits

        (value, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(base.params)
    got = {"logits": np.asarray(logits)[inputs["labels"] >= 0], "loss": value}
    for linear in linears:
        got |= {name: linear.weight(gradients, layer) for layer, name in enumerate(linear.names)}
    with all_in_float64():
        model = torch_base(family, dtype)
    modules = {name: model.get_submodule(name) for linear in linears for name in linear.names}
    expected = torch_results(model, inputs, {name: module.weight for name, module in modules.items()})
    for name, module in modules.items():
        expected[name] = expected[name].T if isinstance(module, Conv1D) else expected[name]
    return errors(got, expected)


def measure_model(family: str, config_name: str, dtype: str) -> dict[str, tuple[float, float]]:
    """The relative errors of an adapted model, each with its budget.

    Args:
        family: a key of `FAMILIES`.
        config_name: a key of `CONFIGS`.
        dtype: of the base model: float64, float32 or bfloat16. Adapters are at least float32.

    Returns:
        {"forward": (error, budget), "gradient": (error, budget)}: the logits and the loss; the gradients of
        the loss with respect to all adapters.
    """
    with measuring(dtype):
        pair = build(family, CONFIGS[config_name], dtype, spread=0.0)
        draws = [random_adapters(pair.reference, SPREAD, seed) for seed in range(1, 1 + DRAWS[dtype])]
        found = []
        for adapters in draws:
            pair.load(adapters)
            found.append(errors(pair.got(), pair.expected()))
    allowed = budgets(family, dtype)
    return {direction: (_median(e[direction] for e in found), allowed[direction]) for direction in allowed}


def _median(values: Iterable[float]) -> float:
    """The middle one; infinite where any is."""
    values = sorted(values)
    return values[-1] if math.isinf(values[-1]) else values[len(values) // 2]


def budgets(family: str, dtype: str) -> dict[str, float]:
    """How large the `errors` of an adapted model may be."""
    if dtype == "bfloat16":
        lost = base_errors(family, dtype)
        return {direction: BFLOAT16_MODEL[direction] * lost[direction] for direction in lost}
    return dict.fromkeys(("forward", "gradient"), MODEL[dtype])
