"""Hardware, software, wall-clock time and peak memory of a run."""

import ctypes
import gc
import platform
import re
import subprocess
import time
from contextlib import suppress
from importlib.metadata import distributions
from pathlib import Path

import psutil
import torch

from .report import Environment, Stage

CLEAR_REFS = Path("/proc/self/clear_refs")  # proc(5): writing 5 resets the peak resident memory
STATUS = Path("/proc/self/status")


class ResourceMeter:
    """Measures seconds and peak memory of this process, from the creation of the meter until `stop`.

    Memory counts beyond what the process holds at the start. The peak resident memory of the host is measured on Linux
    only; psutil has neither the peak of a Linux process nor a reset. Device memory is that of the current CUDA device.
    """

    def __init__(self) -> None:
        # memory that Python and the allocator keep would hide what the stage takes
        gc.collect()
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # glibc only
        self._device_bytes, self._measures_host_peak = 0, False
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self._device_bytes = torch.cuda.memory_allocated()
        with suppress(OSError):
            CLEAR_REFS.write_text("5")
            self._measures_host_peak = True
        self._host_bytes = psutil.Process().memory_info().rss
        self._start = time.perf_counter()

    def stop(self) -> Stage:
        """The usage since the creation of the meter, in seconds and bytes."""
        stage = Stage(seconds=0.0)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            stage.peak_device_bytes = torch.cuda.max_memory_allocated() - self._device_bytes
        stage.seconds = time.perf_counter() - self._start
        if self._measures_host_peak:
            peak = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())
            stage.peak_host_bytes = (1024 * int(peak[1]) if peak else 0) - self._host_bytes
        return stage


def environment(device: torch.device, processes: int) -> Environment:
    """The environment of this process, in a run of some processes with this device."""
    accelerator = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({_processor()})"
    return Environment(
        python=platform.python_version(), platform=platform.platform(), accelerator=accelerator, processes=processes,
        threads=torch.get_num_threads(), git_revision=git_revision(Path.cwd()),
        packages={d.metadata["Name"]: d.version for d in distributions() if d.metadata["Name"]},
    )  # fmt: skip


def git_revision(folder: Path) -> str | None:
    """The commit of a folder: 40 hexadecimal digits, ``-dirty`` with uncommitted changes; None outside of git."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    return None


def _processor() -> str:
    """The model of the CPU, which neither psutil nor `platform` gives on Linux."""
    with suppress(OSError):
        if model := re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text()):
            return model[1].strip()
    return platform.processor() or platform.machine()
