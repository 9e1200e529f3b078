"""The command that counts what would be trained."""

from hylorada_jax.cli.adapter import DEFAULTS, Adapter
from hylorada_jax.cli.shared import method_of, print_result, puts_offline, unloaded
from hylorada_jax.models.packaged import PACKAGED_MODEL


@puts_offline
def params(
    *,
    model: str = PACKAGED_MODEL,
    adapter: Adapter = DEFAULTS,
    json: bool = False,
    offline: bool = False,
) -> None:
    """Count the trainable parameters from the model's config alone, without reading weights.

    Args:
        model: smollm2-135m, a directory with a config.json, a .gguf file, or a Hub name.
        adapter: The method and its settings.
        json: print one JSON object.
        offline: take Hugging Face Hub files from the local cache, without contacting the Hub.
    """
    settings = adapter.build()

    import jax

    from hylorada_jax.surgery.fit import fit
    from hylorada_jax.surgery.plan import count_parameters

    empty = unloaded(model)
    _, sites = fit(empty, settings)
    base = sum(leaf.size for leaf in jax.tree.leaves(empty.params))
    components: dict[str, int] = {}
    for site in sites:
        components[site.component] = components.get(site.component, 0) + count_parameters([site])
    trainable = sum(components.values())
    # Unfrozen leaves are the base's own: they are not beside it.
    total = base + trainable - components.get("unfrozen", 0)
    result = {
        "model": model,
        "method": settings.method,
        "rank": settings.lora_rank if settings.linear else None,
        "trainable": trainable,
        "components": components,
        "base": base,
        "adapted_layers": sum(len(site.layers) for site in sites if site.component == "linear"),
    }
    text = f"{method_of(settings)}: {trainable:,} trainable beside "
    text += f"{total - trainable:,} frozen ({100 * trainable / total:.3f} %)"
    if len(components) > 1:
        text += "".join(f"\n  {name:<17} {count:>11,}" for name, count in components.items())
    print_result(result, json, text)
