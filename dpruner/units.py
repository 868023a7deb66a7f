"""Quantities, rounded for people."""


def duration(seconds: float) -> str:
    """Seconds, rounded for people."""
    for length, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(1, round(seconds))} s"


def size(count: float) -> str:
    """Bytes, rounded for people."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{max(1, round(count / 1e6))} MB"
