"""The types of config.json's keys and their bounds, and the error for a value outside of them."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

# Bounds are above every model there is, and low enough that shapes are traced and printed in a moment.
Vocabulary = Annotated[int, Meta(ge=1, le=2**24)]
Width = Annotated[int, Meta(ge=1, le=2**20)]
Layers = Annotated[int, Meta(ge=1, le=1024)]
Heads = Annotated[int, Meta(ge=1, le=2**12)]
Experts = Annotated[int, Meta(ge=1, le=2**12)]
Positions = Annotated[int, Meta(ge=1, lt=2**31)]
Epsilon = Annotated[float, Meta(gt=0, lt=1)]
Deviation = Annotated[float, Meta(ge=0, le=1e3)]
Dropout = Annotated[float, Meta(ge=0, lt=1)]
Theta = Annotated[float, Meta(gt=1, le=1e30)]
Multiplier = Annotated[float, Meta(gt=0, le=1e6)]
Token = Annotated[int, Meta(ge=0, lt=2**24)]
Tokens = Token | list[Token] | None

RULE = "A model's config must give each key a value of its type and within its bounds."
REMEDY = "Correct config.json, or download it again."
