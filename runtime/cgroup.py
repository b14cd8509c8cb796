"""What the container may use of its host: memory and CPUs. No torch, so that the server's half can ask too."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def host_memory_limit(root: Path = Path("/")) -> int:
    """Bytes of host memory this process may use: the smallest of all cgroup limits above it and physical memory.

    `root` stands for the file system's root, so that tests can bring their own /proc and /sys.
    """
    limits = [_physical_memory(root)]
    for folder in _cgroup_folders(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            text = _read(folder / name)
            if text.isdigit():  # "max" means no limit; v1 writes a number beyond any memory
                limits.append(int(text))
    return min(limits)


def cpu_count(root: Path = Path("/")) -> int:
    """Whole CPUs this process may use, at least 1: the smallest of all cgroup quotas above it and its affinity."""
    counts: list[float] = [_affinity()]
    for folder in _cgroup_folders(root, "cpu"):
        v2 = _read(folder / "cpu.max").split()
        v1 = [_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")]
        for quota, period in filter(lambda pair: len(pair) == 2, (v2, v1)):
            if quota.isdigit() and period.isdigit() and int(period):  # "max" and -1 mean no quota
                counts.append(int(quota) / int(period))
    return max(1, int(min(counts)))


def _cgroup_folders(root: Path, controller: str) -> Iterator[Path]:
    """The folders that can bound this process, from its own cgroup up to the mount point, in v2, v1 and hybrid.

    Inside a container the path in /proc/self/cgroup is often the host's and not mounted: its missing folders are
    harmless, and the walk ends at the mount point, which then is the container's own cgroup.
    """
    mounts = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            bases = [mounts, mounts / "unified"]
        elif controller in controllers.split(","):
            bases = [mounts / controllers, mounts / controller]
        else:
            continue
        # A cgroup outside this namespace shows as /../name.
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for base in bases:
            for depth in range(len(parts), -1, -1):
                yield base.joinpath(*parts[:depth])


def _physical_memory(root: Path) -> int:
    for line in _read(root / "proc/meminfo").splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")  # macOS has no /proc


def _affinity() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
