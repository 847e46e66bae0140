"""How many cores this process may keep busy, and so how many loader processes suit it."""

import math
import os
from pathlib import Path

# One core augments more than 10,000 images/s: this many feed any one GPU.
MAX_WORKERS = 16


def choose_workers(device_type: str) -> int:
    """How many loader processes suit this machine: 0 means that batches are made in the training process.

    With a GPU, one for each core that this process may use, less one for the training process. On a CPU
    training itself takes every core. Augmenting an image takes one core about 0.05 ms and training ResNet-56
    on it about 4 ms of core time: on two cores 0, 1 and 2 workers measured the same within noise, 0 ahead;
    from about eight cores on, one worker hides what would be a tenth of the step.
    """
    cores = max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if device_type != "cpu":
        return min(cores - 1, MAX_WORKERS)
    return 1 if cores >= 8 else 0


def usable_cores() -> int:
    """The cores that this process may keep busy: by affinity and by the container's CPU quota."""
    if hasattr(os, "process_cpu_count"):  # Python 3.13
        cores = os.process_cpu_count() or 1
    elif hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return max(1, math.floor(min(cores, _cgroup_cores(Path("/sys/fs/cgroup")))))


def _cgroup_cores(root: Path) -> float:
    """The CPU quota under `root` in cores (cgroup v2, then v1); infinity where there is none."""
    try:
        quota, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (root / "cpu/cpu.cfs_quota_us").read_text().strip()
            period = (root / "cpu/cpu.cfs_period_us").read_text()
        except OSError:
            return math.inf
    return math.inf if quota in ("max", "-1") else int(quota) / int(period)
