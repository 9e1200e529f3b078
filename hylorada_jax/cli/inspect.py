"""The command that shows what an adapter has learned."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hylorada_jax.cli.shared import print_result, puts_offline, unloaded
from hylorada_jax.terminal import one_line

Found = dict[str, Any]

_COLUMNS = {
    "rank": "rank", "update_norm": "‖sBA‖", "relative_norm": "‖sBA‖/‖W‖", "effective_rank": "eff. rank BA",
    "effective_rank_A": "eff. rank A", "g": "g", "beta": "β", "position_gate": "position",
    "structure_norm": "structure", "column_scale": "c",
}  # fmt: skip


@puts_offline
def inspect(
    *,
    adapter: Path,
    model: str | None = None,
    output: Path | None = None,
    json: bool = False,
    offline: bool = False,
) -> None:
    """Show what an adapter has learned: its updates, gates, attention, positions, structure and units.

    Args:
        adapter: directory of a trained adapter.
        model: the base model, to measure updates and column scales c relative to its weights [none: the
            adapter's own files are enough for the rest].
        output: new or empty directory for plots.png and inspection.json.
        json: print one JSON object, with every layer and head.
        offline: take Hugging Face Hub files from the local cache, without contacting the Hub.
    """
    from hylorada_jax.exchange.shards import new_directory, refuse_taken
    from hylorada_jax.io.files import user_path, write_json
    from hylorada_jax.saved.inspection import inspect_adapter
    from hylorada_jax.saved.saved_adapter import open_adapter

    if output is not None:
        refuse_taken(user_path(output))
    saved = open_adapter(adapter)
    found = inspect_adapter(saved, None if model is None else _weights(model, saved))
    if output is not None:
        with new_directory(user_path(output)) as directory:
            write_json(directory / "inspection.json", found)
            _plot(found, directory / "plots.png")
        print(f"plots  {one_line(output)}", file=sys.stderr)
    print_result(found, json, _text(found))


def _weights(model: str, saved: Any) -> Callable[[str], Any]:
    from hylorada_jax import load_model
    from hylorada_jax.exchange.merged import dtypes_of
    from hylorada_jax.models.wrapped import as_base
    from hylorada_jax.saved.opening import open_on

    opened = open_on(unloaded(model), saved)  # before the model is loaded
    dtype, base_dtype = dtypes_of(saved)
    params = as_base(load_model(model, dtype=dtype, base_dtype=base_dtype)).params
    places = {name: (m, i) for m in opened.modules.linears for i, name in enumerate(m.names)}

    def weight_of(name: str) -> Any:
        module, layer = places[name]
        return module.weight(params, layer)

    return weight_of


def _text(found: Found) -> str:
    """A table with a line for each projection, and a line for each thing that the whole model has."""
    base = "a base without a name" if found["base_model"] is None else one_line(found["base_model"])
    lines = [f"{found['method']}, trained on {base}"]
    if groups := _by_projection(found):
        keys = [key for key in _COLUMNS if key in found["linear"][0]]
        table = [["projection", "layers", *(_COLUMNS[key] for key in keys)]]
        for name, layers in groups.items():
            cells = [_span([layer[key] for layer in layers]) for key in keys]
            table.append([one_line(name), str(len(layers)), *cells])
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines += ["  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in table]
    if attention := found.get("attention"):
        lines.append(f"attention α over heads and layers: {_span([layer['alpha'] for layer in attention])}")
        if "bias" in attention[0]:
            near, far = ([layer["bias"][at] for layer in attention] for at in (0, -1))
            lines.append(
                f"attention bias at distance 0: {_span(near)}; at {found['distances'][-1]:,}: {_span(far)}"
            )
    if "position_factor" in found:
        lines.append(f"position factor over positions: {_span(found['position_factor'])}")
    if encoder := found.get("structure"):
        lines.append(f"structure encoder: gate {encoder['gate']:.3g}, wavelengths {_waves(encoder)}")
        if "periods" in encoder:
            lines.append(f"periods: {', '.join(f'{period:,.4g}' for period in encoder['periods'])}")
    if gated := found.get("sparse"):
        norms = _span([layer["up_norm"] for layer in gated])
        lines.append(f"sparse units on: {len(gated[0]['units'])} of each layer; ‖up‖ {norms}")
    return "\n".join(lines)


def _by_projection(found: Found) -> dict[str, list[Found]]:
    groups: dict[str, list[Found]] = {}
    for layer in found["linear"]:
        groups.setdefault(layer["name"].rpartition(".")[2], []).append(layer)
    return groups


def _waves(encoder: Found) -> str:
    import numpy as np

    with np.errstate(divide="ignore"):
        return _span((2 * np.pi / np.array(encoder["frequencies"])).tolist())


def _span(values: Sequence[Any]) -> str:
    """The mean of some numbers, and in brackets the least and the largest where they differ."""
    import numpy as np

    flat = np.array(values, float).ravel()
    low, high = f"{flat.min():.3g}", f"{flat.max():.3g}"
    return low if low == high else f"{flat.mean():.3g} [{low}, {high}]"


def _plot(found: Found, path: Path) -> None:
    """Draws a panel for each thing that the adapter has."""
    import numpy as np
    from matplotlib.figure import Figure

    from hylorada_jax.io.files import write_figure

    groups = _by_projection(found)

    def by_layer(key: str) -> Callable[[Any], None]:
        def fill(axes: Any) -> None:
            for name, layers in groups.items():
                axes.plot([layer[key] for layer in layers], marker=".", label=one_line(name))
            axes.set(xlabel="layer", ylabel=_COLUMNS[key])
            axes.legend()

        return fill

    def alphas(axes: Any) -> None:
        axes.plot([layer["alpha"] for layer in found["attention"]], ".", color="tab:blue")
        axes.set(xlabel="layer", ylabel="attention α of each head")

    def bias(axes: Any) -> None:
        for number, layer in enumerate(found["attention"]):
            mean = np.mean(layer["bias"], axis=1)
            colour = number / max(1, len(found["attention"]) - 1)
            axes.plot(np.add(found["distances"], 1), mean, color=(colour, 0.2, 1 - colour))
        axes.set(xscale="log", xlabel="distance + 1", ylabel="attention bias, mean over heads")

    def factor(axes: Any) -> None:
        axes.step(np.add(found["positions"], 1), found["position_factor"], where="post")
        axes.set(xscale="log", xlabel="position + 1", ylabel="position factor")

    numbers = [key for key in _COLUMNS if key not in ("rank", "structure_norm", "column_scale")]
    panels = [by_layer(key) for key in numbers if found["linear"] and key in found["linear"][0]]
    if attention := found.get("attention"):
        panels += [alphas, *([bias] if "bias" in attention[0] else [])]
    if "position_factor" in found:
        panels.append(factor)
    rows = max(1, -(-len(panels) // 2))
    figure = Figure(figsize=(12, 3.5 * rows), dpi=100, layout="constrained")
    for axes, fill in zip(np.ravel(figure.subplots(rows, 2)), panels, strict=False):
        fill(axes)
        axes.grid(alpha=0.3)
    for axes in figure.axes[len(panels) :]:
        axes.set_visible(False)
    write_figure(path, figure)
