"""Runs of the framework's real command line, for tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

from conftest import clip_tower, perturbed
from fork_server import ForkServer
from torch import nn

REPOSITORY = Path(__file__).resolve().parent.parent
PROGRAM = str(Path(sys.executable).with_name("fusion_bench"))
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
OWN_PROCESS = ("fabric.devices", "launcher", "sweeper", "smile_optuna")
POOL = """
_target_: fusion_bench.modelpool.CLIPVisionModelPool
_recursive_: false
models:
"""


def fusion_bench(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``fusion_bench`` in a folder, with further environment variables.

    A plain single run is a fork of a process that has the imports done. Whatever depends on how a process starts runs
    in one of its own: several processes, launchers, an environment, a folder with a configuration.
    """
    own_process = environment or any((cwd / name).exists() for name in ("config", "fusion_bench_config"))
    if not own_process and not any(word in argument for word in OWN_PROCESS for argument in arguments):
        return fork_server().run(list(arguments), cwd)
    variables = {**os.environ, **ENVIRONMENT, **environment}
    return subprocess.run([PROGRAM, *arguments], cwd=cwd, env=variables, capture_output=True, text=True, check=False)


@cache
def fork_server() -> ForkServer:
    """The server of this process of the test runner."""
    return ForkServer({**os.environ, **ENVIRONMENT})


def fails_with(completed: subprocess.CompletedProcess[str], message: str) -> None:
    """Check that a command failed with a message in its last line and without a traceback."""
    assert completed.returncode != 0
    last = completed.stderr.strip().splitlines()[-1]
    assert message in last, completed.stderr[-3000:]
    assert "Traceback" not in completed.stdout + completed.stderr


def task_pool_report(folder: Path) -> dict:
    """The framework's report in a folder."""
    return json.loads(next(folder.rglob("program_report.json")).read_text())


def on_one_and_two_processes(*arguments: str, folder: Path) -> list[dict]:
    """The framework's reports of a run on one CPU process, in folder/one, and on two (gloo), in folder/two."""
    for name, devices in {"one": ["fabric.devices=1"], "two": ["fabric.devices=2", "fabric.strategy=ddp"]}.items():
        (folder / name).mkdir()
        completed = fusion_bench(*arguments, "fabric.accelerator=cpu", *devices, cwd=folder / name)
        assert completed.returncode == 0, completed.stderr[-3000:]
    return [task_pool_report(folder / name) for name in ("one", "two")]


class Workplace:
    """A folder with small models on disk and a configuration of a model pool that names them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.models: dict[str, str] = {}
        base = clip_tower()
        self.add("_pretrained_", base)
        for seed, name in enumerate(("red", "green")):
            self.add(name, perturbed(base, seed=seed))

    def add(self, name: str, model: nn.Module) -> Path:
        """Save a model and name it in the pool."""
        folder = self.root / "models" / name
        model.save_pretrained(folder)
        self.models[name] = str(folder)
        return folder

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Upscale the models of the pool."""
        config = self.root / "conf" / "modelpool"
        config.mkdir(parents=True, exist_ok=True)
        (config / "small.yaml").write_text(POOL + "".join(f"  {n}: {path}\n" for n, path in self.models.items()))
        common = ["--config-dir", str(config.parent), "method=smile_upscaling", "modelpool=small", "print_config=false"]
        return fusion_bench(*common, "method.k=4", "method.gate_k=2", *arguments, cwd=self.root)
