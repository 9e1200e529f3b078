"""The numbers that a config's settings come to, by arithmetic of the reference's own."""

import itertools
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.surgery.targets import by_pattern, layer_index, model_depth
from hylorada_jax.training.config import TrainingConfig


def is_whole(part: float, whole: int) -> bool:
    """Whether part·whole is a whole number k: part is then the float of k/whole.

    Args:
        part: a float, which need not be exactly the number that was meant by it.
        whole: ≥ 1.

    Example:
        >>> is_whole(0.29, 100), is_whole(0.29, 101)
        (True, False)
    """
    return round(part * whole) / whole == part


def floor_of(part: float, whole: int) -> int:
    """⌊part·whole⌋.

    Example:
        >>> floor_of(0.29, 100)
        29
    """
    return round(part * whole) if is_whole(part, whole) else math.floor(Fraction(part) * whole)


def rising_steps(training: TrainingConfig) -> int:
    """``warmup_steps``, or ⌈warmup_ratio · steps⌉; of one step 0."""
    if training.warmup_steps is not None:
        return training.warmup_steps
    if training.steps == 1:
        return 0
    return -floor_of(-training.warmup_ratio, training.steps)


def layer_ranks(selected: Sequence[str], names: Sequence[str], config: HyLoRADAConfig) -> dict[str, int]:
    """The rank of every adapted layer: ``rank_pattern``'s, or by its depth ⌊r·(1 − ½·t)⌋, at least min(r, 2).

    With i the layer and L their number, t is min(i, L−1−i)/(L/2) for ``importance``, i/(L−1) for
    ``decreasing``, and 0 for ``uniform`` and outside the numbered blocks.

    Args:
        selected: the names of the adapted layers.
        names: the names of all linear layers, which tell L.
        config: ``lora_rank``, ``rank_strategy`` and ``rank_pattern`` are read.

    Raises:
        TargetError: a pattern matches no layer, or ranks are by depth and no layer has a number.

    Reference:
        method.md §7.
    """
    r, own = config.lora_rank, by_pattern(config.rank_pattern, names)
    last = model_depth(names, config) - 1

    def by_depth(i: int | None) -> int:
        if i is None or config.rank_strategy == "uniform" or last == 0:
            return r
        if config.rank_strategy == "importance":
            rank = r * (last + 1 - min(i, last - i)) // (last + 1)
        else:
            rank = r * (2 * last - i) // (2 * last)
        return max(rank, min(r, 2))

    return {name: own.get(name, by_depth(layer_index(name))) for name in selected}


def layer_alphas(ranks: Mapping[str, int], names: Sequence[str], config: HyLoRADAConfig) -> dict[str, float]:
    """α of every adapted layer: ``alpha_pattern``'s, or ``lora_alpha``·r_l/r, with r_l the layer's own rank.

    Args:
        ranks: from `layer_ranks`.
        names: the names of all linear layers.
        config: ``lora_alpha``, ``lora_rank`` and ``alpha_pattern`` are read.

    Raises:
        TargetError: a pattern matches no layer.

    Reference:
        method.md §7.
    """
    own = by_pattern(config.alpha_pattern, names)
    return {name: own.get(name, config.lora_alpha * rank / config.lora_rank) for name, rank in ranks.items()}


def s2_groups(config: HyLoRADAConfig, seq_len: int) -> tuple[int, int]:
    """The group size G of S²-Attn and the shift, ratio·G, a whole number of tokens.

    Args:
        config: ``s2_group_size`` is G; where it is None, G is a quarter of the row, or the next larger size
            whose shift is whole.
        seq_len: tokens per row.

    Reference:
        Chen et al., "LongLoRA", 2024, §3.2.
    """
    quarter = max(1, math.ceil(seq_len / 4))
    sizes = itertools.count(quarter) if config.s2_group_size is None else (config.s2_group_size,)
    size = next(size for size in sizes if is_whole(config.s2_shift_ratio, size))
    return size, floor_of(config.s2_shift_ratio, size)
