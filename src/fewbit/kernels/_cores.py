"""How many threads this process should use."""

from __future__ import annotations

import os
from pathlib import Path

_SYSTEM = Path("/")


def physical_cores(root: Path = _SYSTEM) -> int:
    """Physical cores this process may run on, within its CPU quota; at least 1.

    Hyper-threads share the units that multiply, so a second thread on a core only adds waiting. `root` is where
    the system's files (sysfs, cgroup v2) are looked up.
    """
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    siblings = {_read(root / f"sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list") or str(n) for n in allowed}
    return max(1, min(len(siblings), _quota(root) or len(siblings)))


def most_threads() -> int:
    """What a caller may ask for: beyond four threads a logical CPU they only wait for one another."""
    return max(16, 4 * (os.cpu_count() or 1))


def _quota(root: Path) -> int | None:
    """Whole CPUs of the control group's quota, rounded up; None where there is no limit."""
    limit, _, period = (_read(root / "sys/fs/cgroup/cpu.max") or "").partition(" ")
    if not (limit.isdigit() and period.isdigit() and int(period)):
        return None
    return -(-int(limit) // int(period))


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None
