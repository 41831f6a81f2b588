"""Where a run runs, and what it takes: for its report."""

from __future__ import annotations

import ctypes
import gc
import platform
import re
import subprocess
import time
from contextlib import suppress
from importlib.metadata import distributions
from pathlib import Path

import torch

from .report import Environment, Stage

PEAK = Path("/proc/self/clear_refs")  # 5 written there sets the peak back (proc(5))
STATUS = Path("/proc/self/status")


class Meter:
    """Measures seconds and peak memory, from when it is made until `stop`."""

    def __init__(self) -> None:
        _give_memory_back()
        self._peak_known = _forget_peaks()
        self._held = _host_bytes("VmRSS")
        self._held_on_device = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
        self._started = time.perf_counter()

    def stop(self) -> Stage:
        stage = Stage(seconds=0.0)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            stage.peak_device_bytes = torch.cuda.max_memory_allocated() - self._held_on_device
        stage.seconds = time.perf_counter() - self._started
        stage.peak_host_bytes = _host_bytes("VmHWM") - self._held if self._peak_known else None
        return stage


def _give_memory_back() -> None:
    """What earlier runs of this process freed, but the allocator keeps, would hide what this one takes."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # of glibc


def _forget_peaks() -> bool:
    """Whether the process's peak is measured from here on: not every system can do that."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        PEAK.write_text("5")
        return True
    return False


def _host_bytes(entry: str) -> int:
    """Resident memory of this process (``VmRSS``), or its peak (``VmHWM``), on Linux; 0 where it isn't told."""
    with suppress(OSError):
        found = re.search(rf"{entry}:\s+(\d+) kB", STATUS.read_text())
        return 1024 * int(found[1]) if found else 0
    return 0


def environment(device: torch.device, processes: int) -> Environment:
    """Where this process runs.

    Args:
        device: what the run computes on.
        processes: how many take part.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({_processor()})"
    return Environment(
        python=platform.python_version(),
        platform=platform.platform(),
        accelerator=name,
        processes=processes,
        threads=torch.get_num_threads(),
        packages={d.metadata["Name"]: d.version for d in distributions() if d.metadata["Name"]},
        git_revision=git_revision(Path.cwd()),
    )


def git_revision(folder: Path) -> str | None:
    """The commit that is checked out around a folder, with ``-dirty`` where files differ; None outside of git."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    return None


def _processor() -> str:
    with suppress(OSError):
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()
