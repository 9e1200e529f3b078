"""What tells one base model from another: its architecture, its layers' shapes, and a hash of its config.

Imports neither jax nor torch: both packages name their bases here, and name the same base alike.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from hylorada_jax.errors import ModelError
from hylorada_jax.models.decoder_config import DecoderConfig
from hylorada_jax.surgery.targets import is_head

# Settings that change no number of a trained model's evaluation.
_IDLE = ("initializer", "dropout", "pdrop", "use_cache", "token_id", "summary_", "gradient_checkpointing")


def base_identity(
    name: str | None, config: Any, linears: Iterable[tuple[str, int, int]]
) -> dict[str, str | None]:
    """What an adapter file says of the model it was trained on.

    Args:
        name: what the user loaded the model by; for people, and as the default of commands.
        config: the model's: a DecoderConfig, one of transformers', or None.
        linears: (name, d_out, d_in) of every linear layer; output heads are left out.

    Returns:
        {"name", "model_type", "layers_sha256", "config_sha256"}.

    Example:
        >>> identity = base_identity("tiny", None, [("fc", 4, 3), ("lm_head", 9, 4)])
        >>> identity == base_identity("tiny", None, [("fc", 4, 3)])
        True
    """
    settings = _settings(config)
    return {
        "name": name,
        "model_type": settings.get("model_type"),
        "layers_sha256": _digest(sorted([n, o, i] for n, o, i in linears if not is_head(n))),
        "config_sha256": _digest(settings),
    }


def _settings(config: Any) -> dict[str, Any]:
    """What of a config decides the numbers, alike whether our decoder or transformers has read it."""
    if isinstance(config, DecoderConfig):
        settings = dataclasses.asdict(config)
    elif config is None:
        settings = {}
    else:
        settings = config.to_dict()
        try:
            return _settings(DecoderConfig.from_hf(settings))
        except ModelError:  # not of our decoder's families
            base = next(kind for kind in type(config).mro() if kind.__name__ == "PretrainedConfig")
            general = set(base().to_dict()) - {"model_type", "tie_word_embeddings"}
            settings = {key: value for key, value in settings.items() if key not in general}
    said = {key: value for key, value in settings.items() if value is not None}
    return {key: value for key, value in said.items() if not any(idle in key for idle in _IDLE)}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(_rounded(value), sort_keys=True).encode()).hexdigest()


def _rounded(value: Any) -> Any:
    """Floats to six digits: a GGUF file keeps 1e-05 in float32, config.json in decimals."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return {str(key): _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(entry) for entry in value]
    return value
