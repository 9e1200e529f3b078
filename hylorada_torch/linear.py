"""The linear adapters, written to be read: one formula, y = (base + δ·p)·c; what differs is c, and p."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hylorada_jax.config import check_dropout, check_linear_layer, check_lora_a
from hylorada_jax.errors import ConfigError, DataError, ModelError
from hylorada_torch.position import PositionBias, check_positions

# Row norms are kept above this, so that a zero row of W gives a finite c and a finite gradient.
NORM_FLOOR = 1e-12


def row_norm(weight: Tensor) -> Tensor:
    """L2 norm of each row, in at least float32 and never below ``NORM_FLOOR``.

    Args:
        weight: [d_out, d_in], any float dtype.

    Returns:
        [d_out], float32, or float64 when ``weight`` is float64.

    Example:
        >>> row_norm(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
        tensor([5., 1.])
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.linalg.vector_norm(weight, dim=1, dtype=dtype).clamp_min(NORM_FLOOR)


class LoRALinear(nn.Module):
    """Adds a low-rank update to what a frozen linear layer gave.

    y = (base + δ)·c with δ = s·(dropout(x) Aᵀ) Bᵀ and c = 1; s = α/r, or α/√r with ``use_rslora``.

    Trainable: ``lora_A`` [rank, in_features], Kaiming-uniform(a=√5), and ``lora_B`` [out_features, rank],
    zeros.

    Args:
        in_features: d_in of the frozen layer.
        out_features: its d_out.
        rank: r, at least 1; may exceed d_in or d_out.
        alpha: α.
        dropout: probability in [0, 1) of dropping an entry of x on the low-rank path only.
        use_rslora: divide α by √r instead of r.
        lora_A_init: "orthogonal" (orthonormal rows when rank <= in_features), "kaiming", or None: as above.
        lora_A_gain: multiplies the initial ``lora_A``, finite and > 0.
        generator: source of the random initial ``lora_A``; torch's global one if None.
        dtype: of the parameters.

    Raises:
        ConfigError: a size is below 1, or alpha, dropout or the start of A is unknown or out of range.

    Example:
        >>> weight = torch.eye(3)
        >>> adapter, x = LoRALinear(3, 3, rank=2, alpha=4.0), torch.ones(1, 5, 3)
        >>> torch.equal(adapter(x, x @ weight.T, weight), x)  # lora_B is zero: nothing has changed yet
        True

    Reference:
        Hu et al., "LoRA", 2021, §4.1; Kalajdzievski, "A Rank Stabilization Scaling Factor", 2023 (rsLoRA).
    """

    default_init = "kaiming"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        *,
        use_rslora: bool = False,
        lora_A_init: str | None = None,
        lora_A_gain: float = 1.0,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        check_linear_layer(type(self).__name__, in_features, out_features, rank, alpha)
        check_lora_a(lora_A_init, lora_A_gain)
        check_dropout(dropout)
        self.in_features, self.out_features = in_features, out_features
        self.scaling = alpha / (math.sqrt(rank) if use_rslora else rank)
        self.dropout = nn.Dropout(dropout)
        self.lora_A = nn.Parameter(torch.empty(rank, in_features, dtype=dtype))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, dtype=dtype))
        with torch.no_grad():
            if (lora_A_init or self.default_init) == "orthogonal":
                nn.init.orthogonal_(self.lora_A, generator=generator)
            else:
                nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5), generator=generator)
            self.lora_A.mul_(lora_A_gain)

    def column_scale(self, base_weight: Tensor) -> Tensor:
        """c [d_out], the factor of each output feature; LoRA has none, so 1."""
        return self.lora_B.new_ones(base_weight.shape[0])

    def updated_weight(self, base_weight: Tensor) -> Tensor:
        """W + s·B A [d_out, d_in]."""
        return base_weight + self.scaling * self.lora_B @ self.lora_A

    def depends_on_token(self) -> bool:
        """Whether p may be another number than 1."""
        return False

    def merged_weight(self, base_weight: Tensor) -> Tensor:
        """The weight of a plain layer that computes the same: W' = c ⊙ (W + s·B A).

        Args:
            base_weight: W [d_out, d_in].

        Returns:
            W' [d_out, d_in]. A bias that the adapter scales becomes c ⊙ bias.

        Raises:
            ModelError: the update depends on the token.

        Example:
            >>> LoRALinear(3, 3, rank=2).merged_weight(torch.eye(3)).equal(torch.eye(3))
            True

        Reference:
            method.md, section 1, Merging.
        """
        self._refuse_scaled_tokens()
        return self.column_scale(base_weight)[:, None] * self.updated_weight(base_weight)

    def _refuse_scaled_tokens(self) -> None:
        if self.depends_on_token():
            raise ModelError(
                "One weight stands for an adapter whose update is the same for every token.",
                f"{type(self).__name__} with a scale of each token",
                "Keep the adapter beside the weight.",
            )

    def forward(
        self, x: Tensor, base_output: Tensor, base_weight: Tensor, structure_prior: Tensor | None = None
    ) -> Tensor:
        """y = (base + δ)·c.

        Args:
            x: [batch, seq, d_in], the frozen layer's input.
            base_output: [batch, seq, d_out], what the frozen layer gave.
            base_weight: [d_out, d_in], its weight.
            structure_prior: only `HyLoRADAv2Linear` reads one.

        Returns:
            [batch, seq, d_out] in the dtype of ``base_output``.

        Raises:
            ConfigError: an argument has another shape, or a structure prior is given.
        """
        if structure_prior is not None:
            raise ConfigError(
                "Only HyLoRADAv2Linear reads a structure prior.",
                f"a structure_prior for {type(self).__name__}",
                "Use HyLoRADAv2Linear (method='hylorada_v2'), or leave structure_prior out.",
            )
        return self.adapted(x, base_output, base_weight)

    def adapted(
        self, x: Tensor, base_output: Tensor, base_weight: Tensor, token_scale: Tensor | float = 1.0
    ) -> Tensor:
        """y = (base + δ·p)·c, where p is ``token_scale`` [batch, seq, 1].

        Raises:
            ConfigError: an argument has another shape.
        """
        d_in, d_out = self.in_features, self.out_features
        shapes = tuple(x.shape), tuple(base_output.shape), tuple(base_weight.shape)
        if shapes != ((*x.shape[:-1], d_in), (*x.shape[:-1], d_out), (d_out, d_in)):
            raise ConfigError(
                f"{type(self).__name__}({d_in}, {d_out}): x is [..., {d_in}], base_output [..., {d_out}] and "
                f"base_weight [{d_out}, {d_in}].",
                "x {}, base_output {}, base_weight {}".format(*shapes),
                "Pass the weight of an nn.Linear as it is, and that of a Conv1D transposed.",
            )
        x_low_rank = self.dropout(x).to(self.lora_A.dtype)
        delta = self.scaling * F.linear(F.linear(x_low_rank, self.lora_A), self.lora_B) * token_scale
        return ((base_output + delta) * self.column_scale(base_weight)).to(base_output.dtype)


class DoRALinear(LoRALinear):
    """LoRA whose updated weight has rows of learned length.

    c = (1−β)·m / n + β,  n = ‖W + s·B A‖,  m = g·m' + (1−g)·m₀,  m₀ = ‖W‖, with g = 1 and β = 0: c = m' / n.
    n is kept above ε·m₀, the rounding of W's numbers, and above `NORM_FLOOR`.

    Trainable: LoRA's, and ``magnitude`` m' [out_features], which starts at m₀ of the weight that the layer
    first meets, in `init_magnitude` or in a call. Until then it is NaN, also in a state dict.

    Args:
        in_features: d_in of the frozen layer.
        out_features: its d_out.
        rank: r.
        alpha: α.
        dropout: as of `LoRALinear`.
        detach_norm: no gradient through n, as the paper's §4.3 and PEFT have it.
        **lora: what `LoRALinear` takes besides.

    Raises:
        ConfigError: as `LoRALinear`.

    Example:
        >>> weight = torch.eye(3)
        >>> adapter, x = DoRALinear(3, 3, rank=2), torch.ones(1, 5, 3)
        >>> torch.equal(adapter(x, x @ weight.T, weight), x), adapter.magnitude.tolist()
        (True, [1.0, 1.0, 1.0])

    Reference:
        Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024, §4.1 and §4.3.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        *,
        detach_norm: bool = True,
        **lora,
    ) -> None:
        super().__init__(in_features, out_features, rank, alpha, dropout, **lora)
        self.detach_norm = detach_norm
        self.magnitude = nn.Parameter(torch.full_like(self.lora_B[:, 0], math.nan))
        self.has_met_a_weight = False

    def init_magnitude(self, base_weight: Tensor) -> None:
        """Set m' to m₀ = ‖W‖, in place.

        Args:
            base_weight: W [out_features, in_features].
        """
        with torch.no_grad():
            self.magnitude.copy_(row_norm(base_weight))
        self.has_met_a_weight = True

    def _meet(self, base_weight: Tensor) -> None:
        """Start m' where nothing has: no call, no loaded state, no assignment."""
        if self.has_met_a_weight:  # what becomes NaN later has diverged, and is left for all to see
            return
        if torch.isnan(self.magnitude).all():
            self.init_magnitude(base_weight)
        self.has_met_a_weight = True

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.has_met_a_weight = False  # the state may be that of a layer which has not met one

    def gates(self) -> tuple[tuple[Tensor | float, Tensor | float], tuple[Tensor | float, Tensor | float]]:
        """(g, 1−g), (β, 1−β): how much of the learned magnitude counts, and how much of plain LoRA."""
        return (1.0, 0.0), (0.0, 1.0)

    def column_scale(self, base_weight: Tensor) -> Tensor:
        """c = (1−β)·m / n + β."""
        self._meet(base_weight)
        (g, rest_of_g), (beta, rest_of_beta) = self.gates()
        m, n = g * self.magnitude + rest_of_g * row_norm(base_weight), self._norm(base_weight)
        return rest_of_beta * m / n + beta

    def collapsed_magnitude(self, base_weight: Tensor) -> Tensor:
        """The magnitude with which a DoRA adapter of the same A, B and s computes the same.

        c ⊙ n = (1−β)·m + β·n

        Args:
            base_weight: W [d_out, d_in].

        Returns:
            [d_out].

        Raises:
            ModelError: the update depends on the token.

        Example:
            >>> HyLoRADALinear(3, 3, rank=2).collapsed_magnitude(torch.eye(3)).detach()
            tensor([1., 1., 1.])

        Reference:
            method.md, section 1, Collapse.
        """
        self._refuse_scaled_tokens()
        return self.column_scale(base_weight) * self._norm(base_weight)

    def _norm(self, base_weight: Tensor) -> Tensor:
        """n, of which a row shorter than its rounding is nothing but that."""
        n = row_norm(self.updated_weight(base_weight))
        n = n.maximum(torch.finfo(n.dtype).eps * row_norm(base_weight))
        return n.detach() if self.detach_norm else n


class HyLoRADALinear(DoRALinear):
    """A learned mixture of DoRA and LoRA, y = (1−β)·DoRA + β·LoRA, with a gated magnitude.

    c of `DoRALinear` with g = σ(magnitude_gate) and β = σ(residual_weight).

    Trainable: DoRA's, and the scalars ``magnitude_gate`` and ``residual_weight``, both inputs of a sigmoid.
    ``lora_A`` starts orthogonal.

    Args:
        in_features: d_in of the frozen layer.
        out_features: its d_out.
        rank: r.
        alpha: α.
        dropout: as of `LoRALinear`.
        gate_init: initial ``magnitude_gate``.
        residual_init: initial ``residual_weight``; 0.1 means β = σ(0.1) ≈ 0.525.
        detach_norm: no gradient through n.
        **lora: what `LoRALinear` takes besides.

    Raises:
        ConfigError: as `LoRALinear`.

    Example:
        >>> weight = torch.eye(3)
        >>> adapter, x = HyLoRADALinear(3, 3, rank=2), torch.ones(1, 5, 3)
        >>> torch.equal(adapter(x, x @ weight.T, weight), x)
        True

    Reference:
        method.md, section 1.
    """

    default_init = "orthogonal"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        *,
        gate_init: float = 0.0,
        residual_init: float = 0.1,
        detach_norm: bool = False,
        **lora,
    ) -> None:
        super().__init__(in_features, out_features, rank, alpha, dropout, detach_norm=detach_norm, **lora)
        self.magnitude_gate = nn.Parameter(self.magnitude.new_tensor(gate_init))
        self.residual_weight = nn.Parameter(self.magnitude.new_tensor(residual_init))

    def gates(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(g, 1−g), (β, 1−β), the sigmoids of ± two scalars: so the rests keep their digits near 0."""
        gate, residual = self.magnitude_gate, self.residual_weight
        return (gate.sigmoid(), (-gate).sigmoid()), (residual.sigmoid(), (-residual).sigmoid())


class HyLoRADAv2Linear(HyLoRADALinear):
    """HyLoRADA whose update is turned up or down, token by token, by a structure prior.

    p = 0.5 + σ(structure_prior · scale_from_structure), 1 without a prior

    Trainable: v1's, and ``scale_from_structure`` [structure_dim], zeros: p starts at 1.

    Args:
        in_features: d_in of the frozen layer.
        out_features: its d_out.
        rank: r.
        alpha: α.
        dropout: as of `LoRALinear`.
        structure_dim: width of the prior.
        **hylorada: what `HyLoRADALinear` takes besides.

    Raises:
        ConfigError: as `LoRALinear`.

    Example:
        >>> weight = torch.eye(3)
        >>> adapter, x = HyLoRADAv2Linear(3, 3, rank=2, structure_dim=4), torch.ones(1, 5, 3)
        >>> torch.equal(adapter(x, x @ weight.T, weight, torch.ones(1, 5, 4)), x)
        True

    Reference:
        method.md, sections 1 and 5.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        structure_dim: int = 32,
        **hylorada,
    ) -> None:
        super().__init__(in_features, out_features, rank, alpha, dropout, **hylorada)
        self.scale_from_structure = nn.Parameter(self.magnitude.new_zeros(structure_dim))

    def depends_on_token(self) -> bool:
        """Whether p may be another number than 1."""
        return bool(self.scale_from_structure.any())

    def forward(
        self, x: Tensor, base_output: Tensor, base_weight: Tensor, structure_prior: Tensor | None = None
    ) -> Tensor:
        """y = (base + δ·p)·c.

        Args:
            x: [batch, seq, d_in], the frozen layer's input.
            base_output: [batch, seq, d_out], what the frozen layer gave.
            base_weight: [d_out, d_in], its weight.
            structure_prior: [batch, seq, structure_dim], from a `StructureEncoder`.

        Returns:
            [batch, seq, d_out] in the dtype of ``base_output``.

        Raises:
            ConfigError: another argument has another shape.
            DataError: the prior has another shape.
        """
        if structure_prior is None:
            return self.adapted(x, base_output, base_weight)
        scale = self.scale_from_structure
        expected = (*x.shape[:-1], len(scale))
        if structure_prior.shape != expected:
            raise DataError(
                "structure_prior is [batch, seq, structure_dim], one row for every token of x.",
                f"structure_prior {tuple(structure_prior.shape)}, expected {expected}",
                "Give the encoder the positions of the same tokens, and hidden_size=structure_dim.",
            )
        p = 0.5 + torch.sigmoid(structure_prior.to(scale.dtype) @ scale)
        return self.adapted(x, base_output, base_weight, p[..., None])


class HyLoRADAUnified(HyLoRADALinear):
    """HyLoRADA whose update is turned up or down by the position of the token.

    p = 1 + σ(position_scale)·t,  t = tanh(position_bias[bucket(position)]); 1 without a position bias

    Trainable: v1's, and the scalar ``position_scale``, 0; `PositionBias` is shared by all layers, and counted
    once, where it is.

    Args:
        in_features: d_in of the frozen layer.
        out_features: its d_out.
        rank: r.
        alpha: α.
        dropout: as of `LoRALinear`.
        position_bias: the model's one `PositionBias`. None means p = 1: no layer makes a bias of its own,
            since one serves the whole model.
        **hylorada: what `HyLoRADALinear` takes besides.

    Raises:
        ConfigError: as `LoRALinear`.

    Example:
        >>> weight = torch.eye(3)
        >>> adapter, x = HyLoRADAUnified(3, 3, rank=2, position_bias=PositionBias()), torch.ones(1, 5, 3)
        >>> torch.equal(adapter(x, x @ weight.T, weight), x)
        True

    Reference:
        method.md, sections 1 and 2.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        position_bias: PositionBias | None = None,
        **hylorada,
    ) -> None:
        super().__init__(in_features, out_features, rank, alpha, dropout, **hylorada)
        self.position_bias = position_bias
        self.position_scale = nn.Parameter(self.magnitude.new_tensor(0.0))

    def depends_on_token(self) -> bool:
        """Whether p may be another number than 1."""
        return self.position_bias is not None and bool(self.position_bias.position_bias.any())

    def forward(
        self, x: Tensor, base_output: Tensor, base_weight: Tensor, positions: Tensor | None = None
    ) -> Tensor:
        """y = (base + δ·p)·c.

        Args:
            x: [batch, seq, d_in], the frozen layer's input.
            base_output: [batch, seq, d_out], what the frozen layer gave.
            base_weight: [d_out, d_in], its weight.
            positions: [batch, seq] position ids; 0, 1, 2 … when None.

        Returns:
            [batch, seq, d_out] in the dtype of ``base_output``.

        Raises:
            ConfigError: another argument has another shape.
            DataError: the positions are negative or have another shape.
        """
        if positions is None:
            positions = torch.arange(x.shape[-2]).expand(x.shape[:-1])
        check_positions(positions, *x.shape[:-1])
        if self.position_bias is None:
            return self.adapted(x, base_output, base_weight)
        p = 1 + torch.sigmoid(self.position_scale) * self.position_bias(positions)
        return self.adapted(x, base_output, base_weight, p[..., None])
