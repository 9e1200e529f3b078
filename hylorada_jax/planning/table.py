"""A plan as lines to read."""

from hylorada_jax.planning.plan import Row

HEADER = (
    f"{'mesh':<20} {'remat':<5} {'rows':>4} {'arguments':>9} {'temporary':>9}  {'fits':<13} "
    f"{'TFLOP':>7} {'moved':>7} {'sent':>7} {'ms/step':>8} {'tokens/s':>9} {'compiled':>8}"
)
UNITS = "GiB of each chip but for rows (of all), ms, tokens/s (of all) and compiled (seconds)"


def line(row: Row) -> str:
    """One way to train, under ``HEADER``."""
    found = row.figures
    fits = "yes" if row.fits else "no" if row.excess is None else f"lacks {_gib(row.excess)}"
    speed = f"{'':>8} {'':>9}"
    if row.seconds is not None and row.tokens_per_second is not None:
        speed = f"{row.seconds * 1e3:>8.0f} {row.tokens_per_second:>9,.0f}"
    flops = "" if found.flops is None else f"{found.flops / 1e12:.1f}"
    sent = None if found.sent_bytes is None else sum(found.sent_bytes.values())
    return (
        f"{found.case.mesh or 'one chip':<20} {found.case.remat:<5} {found.batch_size:>4} "
        f"{_gib(found.argument_bytes):>9} {_gib(found.temp_bytes):>9}  {fits:<13} "
        f"{flops:>7} {_gib(found.bytes_accessed):>7} {_gib(sent):>7} {speed} {found.compile_seconds:>8.0f}"
    )


def sent_by_kind(row: Row) -> str:
    """What each chip sends, by the kind of collective."""
    if (kinds := row.figures.sent_bytes) is None:
        return "not known of these devices"
    return ", ".join(f"{kind} {_gib(sent)} GiB" for kind, sent in kinds.items()) or "nothing"


def estimate(row: Row) -> str:
    """What the estimated time says, and what it does not."""
    limits = {
        "flops": "its products",
        "memory": "its memory's bandwidth",
        "links": "what chips send each other",
    }
    return (
        "ms/step and tokens/s are estimates: bounds that no run exceeds, for they take every rate of the "
        f"chip at its peak and all work at once. The best row is bound by {limits[row.bound or 'flops']}."
    )


def _gib(count: float | None) -> str:
    return "" if count is None else f"{count / 2**30:.2f}"
