"""The measures, written to be read: one window at a time."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hylorada_jax.errors import ConfigError, DataError


def evaluate_perplexity(
    model: Any, documents: Sequence[Any], *, seq_len: int = 1024, stride: int | None = None
) -> float:
    """Perplexity by a sliding window: exp of the mean negative log-likelihood, no token scored twice.

    Args:
        model: called with input_ids [1, seq], gives ``.logits``.
        documents: token ids of each document.
        seq_len: tokens per window.
        stride: tokens between windows, 1 … seq_len; half of ``seq_len`` when None.

    Returns:
        The perplexity.

    Raises:
        ConfigError: stride is out of range.
        DataError: no document has two tokens.

    Reference:
        method.md §9.
    """
    stride = max(1, seq_len // 2) if stride is None else stride
    if not 1 <= stride <= seq_len:
        raise ConfigError(f"stride must be in 1 … seq_len, {seq_len}.", stride, "Correct it.")
    losses = []
    for tokens in documents:
        start = scored = 0
        while scored < len(tokens) - 1:
            stop = min(start + seq_len, len(tokens) - 1)
            losses.append(token_losses(model, tokens[start : stop + 1])[scored - start :])
            start, scored = start + stride, stop
    if not losses:
        raise DataError(
            "Perplexity needs a document of two tokens or more.", "none", "Give longer documents."
        )
    return torch.cat(losses).double().mean().exp().item()  # inf where a float has no larger number


class LostInTheMiddle(NamedTuple):
    """The result of `evaluate_lost_in_the_middle`.

    Attributes:
        perplexity: LiM PPL, the mean over the tenths.
        buckets: perplexities of the ten tenths.
        middle: that of the middle third.
        ends: that of the first and the last third together.
    """

    perplexity: float
    buckets: list[float]
    middle: float
    ends: float


def evaluate_lost_in_the_middle(
    model: Any, documents: Sequence[Any], *, seq_len: int = 1024
) -> LostInTheMiddle:
    """LiM PPL, the mean of the perplexities of the ten tenths of all whole windows; and those of its thirds.

    Args:
        model: called with input_ids [1, seq], gives ``.logits``.
        documents: token ids of each document.
        seq_len: predictions per window.

    Returns:
        The perplexities; of a part, exp of the mean loss of its tokens.

    Raises:
        ConfigError: a window is shorter than the ten tenths.
        DataError: no document has a whole window.

    Reference:
        Liu et al., "Lost in the Middle", 2023; method.md §9.
    """
    if seq_len < 10:
        raise ConfigError(
            "A window of ten tenths has ten tokens or more.", f"seq_len={seq_len}", "Give more."
        )
    windows = [
        token_losses(model, tokens[start : start + seq_len + 1])
        for tokens in documents
        for start in range(0, len(tokens) - seq_len, seq_len)
    ]
    if not windows:
        raise DataError(
            "Lost in the middle is measured on whole windows.",
            f"no document of {seq_len + 1} tokens",
            "Give longer documents or a smaller seq_len.",
        )
    losses = torch.stack(windows).double().mean(0)
    buckets = [tenth.mean().exp().item() for tenth in losses.tensor_split(10)]
    first, middle, last = losses.tensor_split(3)
    ends = torch.cat([first, last])
    return LostInTheMiddle(sum(buckets) / 10, buckets, middle.mean().exp().item(), ends.mean().exp().item())


@torch.no_grad()
def token_losses(model: Any, tokens: Any) -> Tensor:
    """The negative log-likelihood of every token but the first, in nats, with the model in eval mode."""
    ids = torch.as_tensor(tokens, dtype=torch.long, device=next(model.parameters()).device)
    training = model.training
    model.eval()
    logits = model(ids[None, :-1]).logits[0]
    model.train(training)
    return F.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)), ids[1:], reduction="none"
    )
