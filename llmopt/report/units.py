"""Numbers as people read them."""


def human_bytes(count: float) -> str:
    """``4_200_000`` → ``4.2 MB`` (powers of ten, as disks and bandwidths are quoted)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
