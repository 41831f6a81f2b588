"""Hardware and software of a run: processor, packages, git revision."""

import platform
import re
import subprocess
from contextlib import suppress
from importlib.metadata import distributions
from pathlib import Path

import torch

from .report import Environment


def environment(device: torch.device, processes: int) -> Environment:
    """The environment of this process, in a run of some processes with this device."""
    accelerator = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({_processor()})"
    return Environment(
        python=platform.python_version(),
        platform=platform.platform(),
        accelerator=accelerator,
        processes=processes,
        threads=torch.get_num_threads(),
        packages={d.metadata["Name"]: d.version for d in distributions() if d.metadata["Name"]},
        git_revision=git_revision(Path.cwd()),
    )


def git_revision(folder: Path) -> str | None:
    """The commit of a folder: 40 hexadecimal digits, ``-dirty`` with uncommitted changes; None outside of git."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    return None


def _processor() -> str:
    """The model of the CPU, which neither psutil nor `platform` gives on Linux."""
    with suppress(OSError):
        model = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
        if model:
            return model[1].strip()
    return platform.processor() or platform.machine()
