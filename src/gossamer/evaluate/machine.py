"""What the system tells about this process and this machine: memory taken, cache sizes."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

__all__ = ["forget_peak_rss", "last_cache_bytes", "peak_rss_mb"]

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def peak_rss_mb() -> float | None:
    """The most resident memory this process has had, in 1e6 bytes; None where the system does not tell."""
    try:
        status = _STATUS.read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    match = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return int(match[1]) * 1024 / 1e6 if match else None


def forget_peak_rss() -> None:
    """Starts ``peak_rss_mb`` anew from what is resident now, where the system allows it."""
    with suppress(OSError):
        _CLEAR.write_text("5", encoding="ascii")


def last_cache_bytes() -> int | None:
    """Size of the largest cache of the first processor, None where the system does not tell."""
    sizes = []
    for path in _CACHES.glob("index*/size"):
        try:
            match = re.fullmatch(r"(\d+)([KMG]?)", path.read_text(encoding="ascii").strip())
        except (OSError, UnicodeDecodeError):
            continue
        if match:
            sizes.append(int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]])
    return max(sizes, default=None)
