"""A way to train a model, and what the compiler says of it. Imports no jax."""

import dataclasses
from typing import Any, NamedTuple


class Case(NamedTuple):
    """A way to train.

    Attributes:
        mesh: as a user writes it.
        remat: what the backward pass computes again.
        rows: that each part of data × fsdp computes at a time.
        microbatches: how often it does so in a step.
    """

    mesh: str
    remat: Any
    rows: int
    microbatches: int = 1


@dataclasses.dataclass(frozen=True)
class Figures:
    """What the compiler says of a step; all of one chip, and None where it does not say.

    Attributes:
        case: the way to train.
        batch_size: rows of all chips.
        refused: the compiler made no program, for the chip lacks memory.
        limit_bytes: memory that there is, where the compiler says so.
        needed_bytes: memory that training takes: the step's, and what the model keeps beside it.
        argument_bytes: the step's weights, adapters, optimizer state and batch.
        temp_bytes: what there is beside arguments while it runs.
        flops: operations, kernels and all turns of loops included.
        bytes_accessed: what operations read and write, in any memory.
        sent_bytes: to other chips, by kind of collective.
        compile_seconds: until all this was known.
    """

    case: Case
    batch_size: int
    refused: bool = False
    limit_bytes: int | None = None
    needed_bytes: int | None = None
    argument_bytes: int | None = None
    temp_bytes: int | None = None
    flops: float | None = None
    bytes_accessed: float | None = None
    sent_bytes: dict[str, float] | None = None
    compile_seconds: float = 0.0

    @classmethod
    def of_json(cls, read: dict[str, Any]) -> "Figures":
        """The figures of what ``dataclasses.asdict`` gave, from JSON."""
        return cls(Case(*read.pop("case")), **read)
