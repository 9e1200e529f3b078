import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import ConfigError
from hylorada_jax.training.config import TrainingConfig


def make(**settings: Any) -> TrainingConfig:
    defaults: dict[str, Any] = {"output": "a", "steps": 10}
    return TrainingConfig(**defaults | settings)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": True}, "steps"),
        ({"batch_size": 8, "microbatches": 3}, "microbatches"),
        ({"seq_len": 1}, "seq_len"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"warmup_ratio": 1.5}, "warmup_ratio"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"epochs": 0}, "epochs"),
        ({"schedule": "cosin"}, "cosine"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**32}, "seed"),
        ({"eval_every": 0}, "eval_every"),
        ({"seq_len": 8, "eval_stride": 9}, "eval_stride"),
        ({"keep_checkpoints": 0}, "keep_checkpoints"),
        ({"resume": True, "overwrite": True}, "resume"),
        ({"keep": "first"}, "keep must be one of last, best"),
        ({"keep": "best"}, "Give eval_every"),
        ({"patience": 2}, "Give eval_every"),
        ({"patience": 0, "eval_every": 1}, "patience"),
        ({"report_to": "wandbs"}, "wandb"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(settings, named):
    with pytest.raises(ConfigError, match=named):
        make(**settings)


def test_fingerprint_has_what_changes_the_numbers_and_nothing_else():
    base = make()
    same = make(
        output="b", resume=True, log_every=5, checkpoint_every=3, eval_every=7, keep="best", patience=1,
        microbatches=2, batch_size=base.batch_size,
    )  # fmt: skip
    assert base.fingerprint() == same.fingerprint()
    assert base.fingerprint().keys() == {
        "steps", "epochs", "batch_size", "seq_len", "packing", "learning_rate", "schedule",
        "warmup_ratio", "warmup_steps", "weight_decay", "max_grad_norm", "seed", "eval_stride", "eval_tokens",
    }  # fmt: skip


def test_a_rate_that_is_not_given_suits_the_adapter():
    plain, plus = (HyLoRADAConfig(lora_plus_enabled=on, lora_plus_ratio=10.0) for on in (False, True))
    assert make().rate_for(plain) == pytest.approx(10 * make().rate_for(plus))  # B learns as fast
    for unfrozen in (HyLoRADAConfig(train_embeddings=True), HyLoRADAConfig(train_norms=True)):
        assert make().rate_for(unfrozen) < make().rate_for(plain)
    assert make(learning_rate=1.0).rate_for(plus) == 1


def test_gradients_are_clipped_as_method_md_says():
    assert make().max_grad_norm == 1.0  # section 7


def test_numbers_may_be_numpys():
    given = make(steps=np.int64(5), learning_rate=np.float32(0.5), eval_every=np.int32(2))
    assert given == make(steps=5, learning_rate=0.5, eval_every=2)
    json.dumps(given.fingerprint())
    sizes: dict[str, Any] = {"lora_rank": np.int64(4), "lora_alpha": np.float32(8)}
    adapter = HyLoRADAConfig(**sizes)
    assert HyLoRADAConfig.from_json(adapter.to_json()) == HyLoRADAConfig(lora_rank=4, lora_alpha=8.0)
    with pytest.raises(ConfigError, match="steps must be an integer"):
        make(steps=np.float64(5))


def test_epochs_decide_the_steps_exactly():
    for epochs, rows, batch, steps in (
        (1, 8, 4, 2),
        (1, 9, 4, 3),
        (0.29, 100, 1, 29),
        (1 / 3, 9, 1, 3),
        (2, 3, 8, 1),
    ):
        assert make(epochs=epochs, batch_size=batch).for_rows(rows).steps == steps
        with pytest.raises(ConfigError, match="for_rows"):
            make(epochs=epochs, batch_size=batch).counted_steps()
        assert make(epochs=epochs, batch_size=batch).for_rows(rows).counted_steps() == steps
    assert make(steps=7).for_rows(100).steps == 7
    assert make(warmup_steps=4, warmup_ratio=0.5).rising_steps == 4
    assert make(steps=1).rising_steps == 0


def test_config_imports_neither_jax_nor_numpy():
    loaded = "sorted({'jax', 'numpy', 'torch'} & set(sys.modules))"
    code = f"import sys, hylorada_jax.training.config; print({loaded})"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
