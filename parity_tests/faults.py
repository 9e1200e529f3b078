"""Deliberate faults, one at a time on one side, each of which some parity test must catch.

A fault replaces a text that its module has exactly once, so that the table cannot rot in silence. Settings
that both sides read (hylorada_jax/config.py) are faulted only where the two use them differently: a fault on
both sides at once is for the tests of the settings themselves.
"""

import dataclasses
from pathlib import Path

# What might catch a fault, as arguments of pytest: the tests of its place, in float64.
_FLOAT64 = "not float32 and not bfloat16"


def _tests(file: str, names: str = "") -> tuple[str, ...]:
    return f"parity_tests/test_{file}.py", "-k", f"({names}) and {_FLOAT64}" if names else _FLOAT64


def _model(row: str) -> tuple[str, ...]:
    return (f"parity_tests/test_models.py::test_float64[{row}]",)


TESTS = {
    "v1": _tests("layers", "hylorada_v1"),
    "v2": _tests("layers", "hylorada_v2"),
    "unified": _tests("layers", "hylorada-"),
    "position": _tests("layers", "position or buckets"),
    "daa": _tests("layers", "direct_attention or positional_attention"),
    "blocks": ("hylorada_jax/math/blockwise_test.py", "-k", "float64"),
    "groups": _tests("layers", "shifted_sparse_attention"),
    "sparse": _tests("layers", "topk_gate or sparse_adapter"),
    "structure": _tests("layers", "encoder or buckets"),
    "laws": _tests("laws", "hides or nudge or below"),
    "dropout": _tests("laws", "dropout"),
    "training alone": _tests("laws", "alone"),
    "all on": _model("qwen2-hylorada"),
    "ranks": _model("qwen2-hylorada_v1, ranks by depth"),
    "one layer": _model("llama-hylorada_v1, one layer, bias scaled"),
    "temporal": _model("qwen2-hylorada_v2, temporal"),
    "optimizer": _tests("optimizer"),
    "answers": _tests("answers"),
    "rows": ("hylorada_jax/data/packing_test.py",),
    "nnx layers": _tests("layers", "nnx and (dora or direct)"),
    "nnx": ("hylorada_jax/nnx/adapting_test.py", "-k", "fresh or embeddings"),
    "nnx structure": ("parity_tests/test_nnx.py::test_gradients_of_training_are_linens[hylorada_v2]",),
}


@dataclasses.dataclass(frozen=True)
class Fault:
    """A text of a module, what is put in its place, and the tests which might catch that."""

    name: str
    module: str
    old: str
    new: str
    tests: tuple[str, ...]

    def edited(self) -> str:
        """The module's source with the fault.

        Raises:
            ValueError: the text does not occur exactly once.
        """
        path = Path(__file__).parents[1].joinpath(*self.module.split(".")).with_suffix(".py")
        source = path.read_text(encoding="utf-8")
        if (count := source.count(self.old)) != 1:
            raise ValueError(
                f"fault {self.name!r}: {path.name} must have this once, not {count}×: {self.old!r}"
            )
        return source.replace(self.old, self.new)


def _faults(tests: str, module: str, *edits: tuple[str, str, str]) -> list[Fault]:
    return [Fault(name, module, old, new, TESTS[tests]) for name, old, new in edits]


_OF_JAX = [
    # Linear adapters
    *_faults(
        "v1",
        "hylorada_jax.math.linear_adapter",
        ("update without s", 'scaled_B = leaves["lora_B"] * scale', 'scaled_B = leaves["lora_B"]'),
        ("detach_norm ignored", "if detach_norm:", "if False:"),
        ("norm always detached", "if detach_norm:", "if True:"),
        (
            "magnitude starts at n₀²",
            '"magnitude": low_rank.safe_sqrt(norm_squared)',
            '"magnitude": norm_squared',
        ),
        (
            "residual starts at its sigmoid",
            "asarray(residual_init,",
            "asarray(jax.nn.sigmoid(residual_init),",
        ),
    ),
    *_faults(
        "unified",
        "hylorada_jax.math.linear_adapter",
        (
            "position_scale without its sigmoid",
            'jax.nn.sigmoid(leaves["position_scale"])',
            'leaves["position_scale"]',
        ),
    ),
    *_faults(
        "v1",
        "hylorada_jax.math.low_rank",
        ("norm over columns", "jnp.sum(wide * wide, axis=-1)", "jnp.sum(wide * wide, axis=0)"),
        ("zero row unguarded", "jnp.sqrt(jnp.maximum(squared, NORM_FLOOR**2))", "jnp.sqrt(squared)"),
        (
            "sign of β",
            "rest * (magnitude / norm) + residual",
            "residual * (magnitude / norm) + rest",
        ),
        (
            "β without its sigmoid",
            "residual, rest = _parts(residual_weight)\n    return rest * (magnitude / norm)",
            "residual, rest = residual_weight, 1 - residual_weight\n    return rest * (magnitude / norm)",
        ),
        (
            "g and 1−g swapped",
            "gate * magnitude + rest * initial",
            "rest * magnitude + gate * initial",
        ),
    ),
    *_faults(
        "v1",
        "hylorada_jax.math.scaled_sum",
        ("c scales the update alone", "    y = y * scale\n", "    y += delta * (scale - 1)\n"),
    ),
    *_faults(
        "v1",
        "hylorada_jax.math.adapted_norm",
        ("cross term of n² once", "(2 * cross + square)", "(cross + square)"),
        ("square term of n² missing", "(2 * cross + square)", "(2 * cross)"),
        ("slope of n² once", "slope = 2 * g", "slope = g"),
        ("slope of n² by A twice", "rows = slope * scaled_B", "rows = 2 * slope * scaled_B"),
    ),
    *_faults(
        "v2",
        "hylorada_jax.math.low_rank",
        ("p of v2 without its half", "0.5 + jax.nn.sigmoid(score)", "jax.nn.sigmoid(score)"),
    ),
    *_faults(
        "unified",
        "hylorada_jax.math.low_rank",
        ("p of Unified without its one", "1 + position_gate * factor", "position_gate * factor"),
    ),
    *_faults(
        "v1",
        "hylorada_jax.config",  # whose formula the reference has by itself
        ("rsLoRA divides by r", "alpha / (math.sqrt(rank) if use_rslora else rank)", "alpha / rank"),
    ),
    # NNX
    *_faults(
        "nnx layers",
        "hylorada_jax.nnx.linear",
        (
            "NNX: a magnitude that was loaded is lost",
            "jnp.where(jnp.isnan(given).all(), start.astype(given.dtype), given)",
            "start.astype(given.dtype)",
        ),
    ),
    *_faults(
        "nnx",
        "hylorada_jax.nnx.adapted",
        (
            "NNX: the bias is scaled too",
            "if settings.kind and not settings.scales_bias else None",
            "if settings.kind and False else None",
        ),
        (
            "NNX: an embedding is rounded before the lookup",
            "wide = _changed(self, dtype=self.embedding[...].dtype)",
            "wide = self",
        ),
    ),
    *_faults(
        "nnx structure",
        "hylorada_jax.nnx.adapted_model",
        (
            "NNX: the encoder gets no gradient",
            "{name: leaf[...] for name, leaf",
            "{name: structure.jax.lax.stop_gradient(leaf[...]) for name, leaf",
        ),
        (
            "NNX: the encoder's gradient by 1.001",
            "{name: leaf[...] for name, leaf",
            "{name: 1.001 * leaf[...] - 0.001 * structure.jax.lax.stop_gradient(leaf[...]) for name, leaf",
        ),
    ),
    # Buckets
    *_faults(
        "position",
        "hylorada_jax.math.position",
        (
            "position bucket one too wide",
            "(num_buckets - exact - 1) * beyond",
            "(num_buckets - exact) * beyond",
        ),
        ("distance 0 counts as ahead", "side * (offset < 0)", "side * (offset <= 0)"),
        ("middle counts as before it", "num_buckets * (offset >= 0)", "num_buckets * (offset > 0)"),
        (
            "tanh missing",
            "jnp.tanh(looked_up(position_bias, buckets))",
            "looked_up(position_bias, buckets)",
        ),
    ),
    *_faults(
        "laws",
        "hylorada_jax.math.position",
        ("nudge of the structure bucket missing", "num_buckets, 1e-6)", "num_buckets, 0.0)"),
    ),
    # Direct attention adaptation
    *_faults(
        "daa",
        "hylorada_jax.math.relative_bias",
        (
            "k − q in place of q − k",
            "offset = query_positions[:, :, None] - key_positions[:, None, :]\n",
            "offset = key_positions[:, None, :] - query_positions[:, :, None]\n",
        ),
        ("derivative of the bias doubled", "table)[1](g)[0]", "table)[1](2 * g)[0]"),
    ),
    *_faults(
        "daa",
        "hylorada_jax.modules.attention",
        ("α scales β too", "scores + daa.beta[:, None, None]", "(scores + daa.beta[:, None, None])"),
    ),
    *_faults(
        "laws",
        "hylorada_jax.math.attention",
        ("mask left out", "jnp.where(mask, scores, ", "jnp.where(mask | True, scores, "),
        (
            "α scales the bias too",
            "table = logits.position_bias.astype(dtype)",
            "table = (logits.alpha * logits.position_bias).astype(dtype)",
        ),
        (
            "bias scaled by 1/√d",
            "additions.append(relative_bias(",
            "additions.append(logits.scale * relative_bias(",
        ),
        (
            "soft cap of the logits missing",
            "scores * logits.scale, logits.soft_cap",
            "scores * logits.scale, None",
        ),
        ("α added", "(query * logits.alpha", "(query + logits.alpha"),
        (
            "query heads interleaved",
            "query.reshape(batch, length, key.shape[2], heads // key.shape[2], head_dim)",
            "query.reshape(batch, length, heads // key.shape[2], -1, head_dim).swapaxes(2, 3)",
        ),
    ),
    *_faults(
        "laws",
        "hylorada_jax.math.pattern",
        ("causality by <", "distance >= 0 if self", "distance > 0 if self"),
    ),
    *_faults(
        "blocks",
        "hylorada_jax.math.blockwise",
        ("sums of earlier blocks not rescaled", "mass * rescale + p.sum", "mass + p.sum"),
        ("derivative of the softmax without its mean", "p * (dp - delta[..., None])", "p * dp"),
        ("derivative of the soft cap missing", "(setting.scale * slope * ds)", "(setting.scale * ds)"),
        ("keys of another block", "dks.at[j].add(dk)", "dks.at[0].add(dk)"),
        ("rows that see nothing are zero", "jnp.where(seen, rows, mean)", "jnp.where(seen, rows, 0 * mean)"),
    ),
    *_faults(
        "blocks",
        "hylorada_jax.math.blocks",
        (
            "the last block is left out",
            "jnp.where(visible.any(axis=1), behind,",
            "jnp.where(visible.any(axis=1), behind - 1,",
        ),
        ("what pads is visible", "cut(valid, 1, of_keys)", "cut(valid, 1, of_keys, repeat=True)"),
    ),
    # Shifted sparse attention
    *_faults(
        "groups",
        "hylorada_jax.math.groups",
        ("groups shifted the other way", "pattern(group_size - shift)", "pattern(shift)"),
        ("groups wrap around", "[(0, 0)] * (x.ndim - 2))", '[(0, 0)] * (x.ndim - 2), mode="wrap")'),
        ("first half of the heads shifted", "middle = heads - heads // 2", "middle = heads // 2"),
    ),
    *_faults(
        "groups",
        "hylorada_jax.math.pattern",
        (
            "padding visible",
            "mask & self.key_valid[:, None, None, :]",
            "mask & (self.key_valid | True)[:, None, None, :]",
        ),
        (
            "earlier documents visible",
            "self.query_segments[:, None, :, None] == self",
            "self.query_segments[:, None, :, None] >= self",
        ),
    ),
    *_faults(
        "all on",
        "hylorada_jax.math.groups",
        ("DAA of the first heads for all", "leaf[..., own]", "leaf[..., : own.stop - own.start]"),
    ),
    # Sparse adapter
    *_faults(
        "sparse",
        "hylorada_jax.math.sparse",
        ("k rounded up", "math.floor(fraction(", "math.ceil(fraction("),
        ("straight-through without its factor", "scores.size * jax.nn.softmax", "jax.nn.softmax"),
        ("temperature multiplies", "scores / temperature", "scores * temperature"),
        ("gelu by tanh", "approximate=False", "approximate=True"),
        (
            "mask behind gelu",
            "jax.nn.gelu(projected * mask.astype(accumulator), approximate=False)",
            "jax.nn.gelu(projected, approximate=False) * mask.astype(accumulator)",
        ),
    ),
    # Structure encoder
    *_faults(
        "structure",
        "hylorada_jax.math.structure",
        ("cos before sin", "[jnp.sin(angles), jnp.cos(angles)]", "[jnp.cos(angles), jnp.sin(angles)]"),
        ("middle rounded up", "- seq_len // 2", "- (seq_len + 1) // 2"),
        ("|freq_scale| without its modulus", 'jnp.abs(leaves["freq_scale"])', 'leaves["freq_scale"]'),
        ("frequencies by D", "np.arange(count) / count", "np.arange(count) / (2 * count)"),
        (
            "structure ids wrap",
            'looked_up(leaves["structure_embeddings"], structure_ids)',
            'looked_up(ids := leaves["structure_embeddings"], structure_ids % len(ids))',
        ),
        ("ε of the norm", "NORM_EPSILON = 1e-5", "NORM_EPSILON = 1e-6"),
        ("gate without its sigmoid", 'jax.nn.sigmoid(leaves["gate"])', 'leaves["gate"]'),
    ),
    *_faults(
        "laws",
        "hylorada_jax.math.structure",
        ("|period| without its modulus", 'jnp.abs(leaves["periods"])', 'leaves["periods"]'),
    ),
    # Whole models
    *_faults(
        "all on",
        "hylorada_jax.surgery.intercept",
        (
            "c scales the layer's bias",
            "scales_bias = self._config.magnitude_scales_bias",
            "scales_bias = True",
        ),
    ),
    *_faults(
        "temporal",
        "hylorada_jax.surgery.intercept",
        ("the prior of token positions", "positions if places is None else places", "positions"),
    ),
    *_faults(
        "all on",
        "hylorada_jax.surgery.intercept",
        (
            "sparse adapter on the frozen output",
            "self._with_sparse(module, y, adapter)",
            "self._with_sparse(module, next_fun(*args, **kwargs), adapter)",
        ),
    ),
    *_faults(
        "dropout",
        "hylorada_jax.surgery.intercept",
        (
            "dropout without its factor",
            "jnp.where(keep, x / kept.astype(x.dtype), 0)",
            "jnp.where(keep, x, 0)",
        ),
        (
            "dropout in the base's input",
            "promote(inputs, kernel",
            "promote(self._dropout(module, inputs, self._rate), kernel",
        ),
    ),
    *_faults(
        "all on",
        "hylorada_jax.surgery.resolve",
        ("detach_norm always on", "detach_norm=bool(config.detach_norm)", "detach_norm=True"),
    ),
    *_faults(
        "ranks",
        "hylorada_jax.surgery.plan",
        ("s of the largest rank", "config.scale(ranks[name]", "config.scale(config.lora_rank"),
    ),
    *_faults(
        "one layer",
        "hylorada_jax.surgery.resolve",
        ("layers not adapted scaled by 0", "row.idle, leaf.dtype", "0, leaf.dtype"),
    ),
    *_faults(
        "all on",
        "hylorada_jax.surgery.resolve",
        (
            "unfrozen leaves get no gradient",
            "tree = with_leaves(tree, site.module.path, leaves)",
            "tree = with_leaves(\n"
            "            tree, site.module.path, "
            'jax.lax.stop_gradient(leaves) if site.component == "unfrozen" else leaves\n'
            "        )",
        ),
    ),
    *_faults(
        "one layer",
        "hylorada_jax.surgery.merge",
        ("bias not merged", 'wide * adapter["column_scale"]', "wide"),
    ),
    *_faults(
        "training alone",
        "hylorada_jax.model",
        (
            "groups in evaluation too",
            "if train and self.config.s2_attn_enabled",
            "if self.config.s2_attn_enabled",
        ),
    ),
    # LoRA+ and the parameter groups
    *_faults(
        "optimizer",
        "hylorada_jax.training.optimizer",
        ("LoRA+ on A", 'rates["lora_B"] *=', 'rates["lora_A"] *='),
        ("magnitudes decay", '"magnitude": Group(),', '"magnitude": Group(decays=True),'),
        ("DAA decays", '"daa": Group(rate=1e-3)', '"daa": Group(rate=1e-3, decays=True)'),
        ("warm-up one step early", "rising = step /", "rising = (step + 1) /"),
        ("decay one step early", "(total - step) /", "(total - step - 1) /"),
        ("no clipping", "optax.clip_by_global_norm(training.max_grad_norm)", "optax.identity()"),
        ("ε of AdamW", "weight_decay=weight_decay)", "weight_decay=weight_decay, eps=1e-7)"),
    ),
    *_faults(
        "answers",
        "hylorada_jax.data.answers",
        (
            "turns of a history that changed",
            "prompt.ids[: len(parts[-1].ids)] == parts[-1].ids",
            "prompt.ids",
        ),
        (
            "what follows the end of a turn counts",
            "return Encoded(ids[: ends[0] + 1], answer.offsets[: ends[0] + 1])",
            "return answer",
        ),
        (
            "the last end of a turn",
            "if token in tokenizer.end_token_ids][:1]",
            "if token in tokenizer.end_token_ids][-1:]",
        ),
        ("a mark's last token", "(first < stop) & (last > start)", "(first < stop - 1) & (last > start)"),
        ("prompts without their opening", "number, opening=True", "number"),
        ("completions without an end", "end is not None and answer", "end is None and answer"),
        ("the prompt's tokens in the whole", "if whole.ids[:size] == prompt.ids:", "if whole.ids:"),
    ),
    *_faults(
        "rows",
        "hylorada_jax.data.packing",
        (
            "a token's score at its neighbour",
            "document.scored[predicted]",
            "document.scored[predicted][::-1]",
        ),
    ),
]

_OF_TORCH = [
    *_faults(
        "v1",
        "hylorada_torch.linear",
        ("torch: rsLoRA divides by r", "alpha / (math.sqrt(rank) if use_rslora else rank)", "alpha / rank"),
        ("torch: norm without s", "self.scaling * self.lora_B @ self.lora_A", "self.lora_B @ self.lora_A"),
        ("torch: norm over columns", "weight, dim=1, dtype", "weight, dim=0, dtype"),
        ("torch: β and 1−β swapped", "rest_of_beta * m / n + beta", "beta * m / n + rest_of_beta"),
        ("torch: detach_norm ignored", "n.detach() if self.detach_norm else n", "n"),
        (
            "torch: magnitude starts at 1",
            "self.magnitude.copy_(row_norm(base_weight))",
            "self.magnitude.fill_(1)",
        ),
    ),
    *_faults(
        "v2",
        "hylorada_torch.linear",
        ("torch: p of v2 starts at 1.5", "p = 0.5 + torch", "p = 1 + torch"),
    ),
    *_faults(
        "position",
        "hylorada_torch.position",
        ("torch: position bucket one early", "np.maximum(p - exact, 1)", "np.maximum(p - exact + 1, 1)"),
        ("torch: later keys in the first half", "half * (distance < 0)", "half * (distance > 0)"),
        ("torch: tanh missing", "torch.tanh(self.position_bias[buckets])", "self.position_bias[buckets]"),
    ),
    *_faults(
        "groups",
        "hylorada_torch.attention",
        ("torch: groups shifted the other way", "(slots - shift) //", "(slots + shift) //"),
        ("torch: groups not causal", "self.group_size, self.shift).tril()", "self.group_size, self.shift)"),
        (
            "torch: first heads shifted",
            "[plain] * (heads - heads // 2) + [shifted] * (heads // 2)",
            "[shifted] * (heads - heads // 2) + [plain] * (heads // 2)",
        ),
    ),
    *_faults(
        "daa",
        "hylorada_torch.attention",
        ("torch: β scales", "* scores, soft_cap) + self.beta", "* scores, soft_cap) * self.beta"),
    ),
    *_faults(
        "laws",
        "hylorada_torch.attention",
        (
            "torch: mask before DAA",
            "    if isinstance(daa, PositionalDAA):\n",
            "    if visible is not None:\n"
            "        scores = scores.masked_fill(~visible, torch.finfo(wide).min)\n"
            "        visible = None\n"
            "    if isinstance(daa, PositionalDAA):\n",
        ),
    ),
    *_faults(
        "sparse",
        "hylorada_torch.sparse",
        ("torch: straight-through without its factor", "soft = n * torch", "soft = torch"),
        ("torch: gelu by tanh", "self.down) * mask)", 'self.down) * mask, approximate="tanh")'),
    ),
    *_faults(
        "structure",
        "hylorada_torch.structure",
        ("torch: cos before sin", "[theta.sin(), theta.cos()]", "[theta.cos(), theta.sin()]"),
        ("torch: ε of the norm", "eps=1e-5", "eps=1e-6"),
        ("torch: φ without 2π", "2 * math.pi * positions", "positions"),
    ),
    *_faults(
        "all on",
        "hylorada_torch.surgery",
        (
            "torch: c scales the layer's bias",
            "self._adapt(x, F.linear(x, self.weight)) + bias",
            "self._adapt(x, F.linear(x, self.weight, bias))",
        ),
    ),
    *_faults(
        "ranks",
        "hylorada_torch.surgery",
        (
            "torch: α does not follow the rank",
            '"alpha": alpha,',
            '"alpha": config.lora_alpha,',
        ),
    ),
    *_faults(
        "training alone",
        "hylorada_torch.hf_attention",
        (
            "torch: groups in evaluation too",
            "if self.training and self.groups is not None",
            "if self.groups is not None",
        ),
    ),
    *_faults(
        "optimizer",
        "hylorada_torch.optimizer",
        ("torch: LoRA+ on A", 'ratio if group == "lora_B"', 'ratio if group == "lora_A"'),
        (
            "torch: everything decays",
            "training.weight_decay if GROUPS[group].decays else 0.0",
            "training.weight_decay",
        ),
        (
            "torch: each gradient clipped by itself",
            "gradient.mul_(max_norm / norm)",
            "gradient.mul_(max_norm / gradient.norm())",
        ),
    ),
]

FAULTS = {fault.name: fault for fault in (*_OF_JAX, *_OF_TORCH)}
