"""Where figures were taken; without this they say little."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime

import psutil

from benchmarks.live_worker import ROOT


def machine_facts() -> dict[str, str]:
    """Processor count, load, Python, system, and the disk under the journal."""
    mounts = [mount for mount in psutil.disk_partitions(all=True) if ROOT.is_relative_to(mount.mountpoint)]
    disk = max(mounts, key=lambda mount: len(mount.mountpoint)).fstype if mounts else "unknown"
    return {
        "cores": str(len(os.sched_getaffinity(0))),
        "load": f"{os.getloadavg()[0]:.2f}",
        "python": platform.python_version(),
        "kernel": platform.release(),
        "disk": disk,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
