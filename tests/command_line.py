"""Runs of the framework's real command line, for tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from conftest import clip_tower, perturbed
from fork_server import FOLDER, ForkingPython
from torch import nn

REPOSITORY = Path(__file__).resolve().parent.parent
HUB_CACHE = FOLDER / "huggingface"  # empty, or filled by the fixture of tests/hub
PATHS = [str(REPOSITORY / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]  # of task pools of the tests
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(HUB_CACHE), "COLUMNS": "200",
    "PYTHONPATH": os.pathsep.join(PATHS),
}  # fmt: skip
POOL = """
_target_: fusion_bench.modelpool.CLIPVisionModelPool
_recursive_: false
models:
"""


def fusion_bench(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``fusion_bench`` in a folder, with further environment variables."""
    return run_program("fusion_bench", *arguments, cwd=cwd, **environment)


def run_program(
    name: str, *arguments: str, cwd: Path, real: bool = False, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a program of the framework; `real` runs all its processes in the real interpreter, not in forks."""
    variables = {**os.environ, **ENVIRONMENT, **environment}
    command = program(name, real)
    return subprocess.run([*command, *arguments], cwd=cwd, env=variables, capture_output=True, text=True, check=False)


def program(name: str, real: bool = False) -> list[str]:
    """The command line that starts a program, in a fork of a process with the imports done or in a real interpreter."""
    return [sys.executable if real else forking_python().path, str(Path(sys.executable).with_name(name))]


def fusion_bench_without(modules: Sequence[str], *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run ``fusion_bench`` in a process that can't import some modules."""
    code = f"""
import runpy, sys
assert not sys.modules.keys() & {set(modules)}
sys.modules.update(dict.fromkeys({list(modules)}))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    process = start_code(code, program("fusion_bench")[-1], *arguments, cwd=cwd, stdout=subprocess.PIPE)
    output, errors = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def start_code(code: str, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    """Start a process of code, with arguments from ``sys.argv[1]`` on, in a fork of one with the imports done."""
    environment = {**os.environ, **ENVIRONMENT}
    command = [forking_python().path, "-X", "fork", "-c", code, *arguments]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, **options)


def in_two_processes(function: Callable[[int, int, str], None], folder: Path) -> None:
    """Call a function of a test module in two processes, with the rank, the number of processes and a folder."""
    module = Path(function.__code__.co_filename)
    code = f"import sys; sys.path[:0] = sys.argv[3:]; from {module.stem} import {function.__name__} as call"
    call, paths = "call(int(sys.argv[1]), 2, sys.argv[2])", [str(module.parent), str(Path(__file__).parent)]
    processes = [start_code(f"{code}; {call}", str(rank), str(folder), *paths) for rank in range(2)]
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)[-3000:]


@cache
def forking_python() -> ForkingPython:
    """The program in the place of Python for this process of the test runner."""
    return ForkingPython({**os.environ, **ENVIRONMENT})


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


def image_pools(folder: Path, samples: Mapping[str, int], batch_size: int = 100) -> list[str]:
    """Arguments that select the experts of a few image tasks, and the first samples of these tasks."""
    pool = [
        "_target_: fusion_bench_smile.framework.task_pools.ExactCLIPVisionModelTaskPool", "_recursive_: false",
        "processor: ${smile_embedded:clip}", "clip_model: ${smile_embedded:clip}",
        "data_processor: {_target_: smile_zoo.images.Pixels}",
        f"dataloader_kwargs: {{batch_size: {batch_size}, num_workers: 0, shuffle: false}}", "fast_dev_run: null",
        "test_datasets:",
    ]  # fmt: skip
    models = [POOL.strip(), "  _pretrained_: ${smile_embedded:clip}"]
    training = ["processor: ${smile_embedded:clip}", "train_datasets:"]
    for task, count in samples.items():
        images = f"{{_target_: smile_zoo.images.load_images, task: {task}}}"
        subset = f"_target_: torch.utils.data.Subset, dataset: {images}, indices: {list(range(count))}"
        pool.append(f"  {task}: {{{subset}}}")
        models.append(f"  {task}: {{_target_: smile_zoo.images.load_expert, task: {task}, strength: gentle}}")
        training.append(f"  {task}: {{_target_: smile_zoo.images.load_images, task: {task}, split: train}}")
    for group, lines in (("taskpool", pool), ("modelpool", models + training)):
        (folder / "conf" / group).mkdir(parents=True)
        (folder / "conf" / group / "few.yaml").write_text("\n".join(lines))
    return ["--config-dir", str(folder / "conf"), "taskpool=few", "modelpool=few"]


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
