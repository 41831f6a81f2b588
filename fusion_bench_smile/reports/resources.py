"""Wall-clock time and peak memory of the stages of a run."""

import ctypes
import gc
import re
import time
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from .report import Stage

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
        self._measures_host_peak = _reset_peaks()
        self._host_bytes = psutil.Process().memory_info().rss
        self._device_bytes = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
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


def _reset_peaks() -> bool:
    """Reset the peaks of device and host memory; False if the system cannot reset the host's."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        CLEAR_REFS.write_text("5")
        return True
    return False
