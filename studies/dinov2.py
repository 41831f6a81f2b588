"""SMILE on the DINOv2 benchmark, with experts of up to three seeds in full rank, on eight and on fourteen tasks.

python -m studies.dinov2 FOLDER docs/dinov2_results.md eight   # experts of recipes.images.seeds FOLDER
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F
from transformers import Dinov2Model

from fusion_bench_smile import calibrate, upscale
from fusion_bench_smile.io import write_atomically
from fusion_bench_smile.nn import count_parameters
from fusion_bench_smile.reports import markdown_table
from smile_zoo.dinov2 import EIGHT_TASKS, TASKS, load_head, load_images, load_inputs, load_pretrained
from smile_zoo.dinov2.task_pool import features, to_pixels

log = logging.getLogger(__name__)

SEEDS = (0, 1, 2)
IMAGES = 200  # of each task
RANKS = ((8, 8), (16, 16), (16, 32), (32, 32))  # gate_k and k
TWO_PASS: dict[str, Any] = {
    "routing_scope": "two_pass",
    "routing_score": "dual",
    "top_k": 2,
    "expert_parameters": "norms",
}
TASK_SETS = {"eight": EIGHT_TASKS, "fourteen": TASKS}

HEADER = f"""# Measurements of the DINOv2 benchmark

Written by `python -m studies.dinov2 FOLDER docs/dinov2_results.md SET …`: the first {IMAGES} test images of each task,
experts in full rank of the seeds of fine-tuning in the last columns, retention in percent. The interval is a paired
bootstrap over the images; it leaves out the variance between seeds.
"""

Models = Mapping[str, nn.Module]  # task → the model that serves it
Outcomes = dict[str, np.ndarray]  # task → whether each image is classified right, (N,)


@torch.inference_mode()
def outcomes(model: nn.Module, task: str) -> np.ndarray:
    """Whether a backbone with the head of a task classifies its first test images right: (N,), bool."""
    dataset, head = load_images(task), load_head(task)
    pixels, labels = to_pixels(dataset[:IMAGES]["image"]), torch.tensor(dataset[:IMAGES]["label"])
    logits = torch.cat([F.linear(features(model, batch), *head) for batch in pixels.split(50)])
    return (logits.argmax(dim=-1) == labels).numpy()


def retention(correct: Outcomes, individual: Outcomes) -> float:
    """Mean accuracy over the tasks, relative to that of the individual models, in percent."""
    return 100 * float(np.mean([v.mean() for v in correct.values()]) / np.mean([v.mean() for v in individual.values()]))


def resampled(correct: Outcomes, index: Mapping[str, np.ndarray]) -> Outcomes:
    """The outcomes of the images with some indices (N,) of each task."""
    return {task: values[index[task]] for task, values in correct.items()}


def interval(correct: list[Outcomes], individual: list[Outcomes], resamples: int = 1000) -> tuple[float, float]:
    """The 95 % interval of the mean retention over the seeds, by a paired bootstrap of the images of each task."""
    generator = np.random.default_rng(0)
    drawn = []
    for _ in range(resamples):
        index = {task: generator.integers(0, IMAGES, IMAGES) for task in correct[0]}
        pairs = zip(correct, individual, strict=True)
        drawn.append(np.mean([retention(resampled(one, index), resampled(other, index)) for one, other in pairs]))
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)


def variants(pretrained: Dinov2Model, experts: Mapping[str, Dinov2Model]) -> dict[str, Callable[[], Models]]:
    """Row of the table → function that builds its models."""

    def shared(model: nn.Module) -> Models:
        return dict.fromkeys(experts, model.eval())

    def smile(gate_k: int, k: int, calibrated: bool = False, **options: Any) -> Models:
        model = upscale(pretrained, experts, gate_k=gate_k, k=k, **options)
        if calibrated:
            calibrate(model, {task: [load_inputs(task)[:64]] for task in experts})
        return shared(model)

    def oracle(k: int) -> Models:
        return {task: upscale(pretrained, {task: expert}, gate_k=k, k=k).eval() for task, expert in experts.items()}

    return {
        "pretrained": lambda: shared(pretrained),
        **{f"token (the paper), {g}/{k}": partial(smile, g, k) for g, k in RANKS},
        "two-pass, 16/32": partial(smile, 16, 32, **TWO_PASS),
        "calibrated by 64, 16/32": partial(smile, 16, 32, calibrated=True, **TWO_PASS),
        **{f"oracle routing, k={k}": partial(oracle, k) for k in (8, 16, 32)},
    }


def folders_of(root: Path, seed: int, tasks: tuple[str, ...]) -> dict[str, Path]:
    """Task → folder of its expert with a seed."""
    return {task: root / "experts" / "dinov2" / str(seed) / task for task in tasks}


def measure(root: Path, tasks: tuple[str, ...]) -> tuple[float, pd.DataFrame]:
    """The accuracy of the individual models, in percent, and the retention of every variant with its interval.

    Args:
        root: folder of the experts.
        tasks: of the experts that are upscaled together.
    """
    pretrained = load_pretrained().eval()
    individual: list[Outcomes] = []
    correct: dict[str, list[Outcomes]] = {}
    ratios: dict[str, float] = {}
    seeds = [seed for seed in SEEDS if all(folder.exists() for folder in folders_of(root, seed, tasks).values())]
    for seed in seeds:
        folders = folders_of(root, seed, tasks)
        experts = {task: Dinov2Model.from_pretrained(folder).eval() for task, folder in folders.items()}
        individual.append({task: outcomes(expert, task) for task, expert in experts.items()})
        for name, build in variants(pretrained, experts).items():
            models = build()
            ratios[name] = count_parameters(models[tasks[0]]) / count_parameters(pretrained)
            correct.setdefault(name, []).append({task: outcomes(model, task) for task, model in models.items()})
            log.info(
                "%d tasks, seed %d, %s: %.1f", len(tasks), seed, name, retention(correct[name][-1], individual[-1])
            )
    rows = [_row(name, ratios[name], each, individual, seeds) for name, each in correct.items()]
    accuracy = np.mean([[v.mean() for v in each.values()] for each in individual])
    return 100 * float(accuracy), pd.DataFrame(rows)


def _row(
    name: str, ratio: float, correct: list[Outcomes], individual: list[Outcomes], seeds: list[int]
) -> dict[str, object]:
    kept = [retention(*pair) for pair in zip(correct, individual, strict=True)]
    low, high = interval(correct, individual)
    values = {f"seed {seed}": f"{value:.1f}" for seed, value in zip(seeds, kept, strict=True)}
    parameters = "" if name.startswith("oracle") else f"{ratio:.2f}×"
    return {"routing, gate_k/k": name, "parameters": parameters, "retention": f"{np.mean(kept):.1f}",
            "95 % interval": f"{low:.1f} – {high:.1f}", **values}  # fmt: skip


def report(root: Path, task_sets: list[str]) -> str:
    """The measurements of some sets of tasks as Markdown."""
    lines = [HEADER]
    for name in task_sets:
        accuracy, table = measure(root, TASK_SETS[name])
        individual = f"Accuracy of the individual models, mean over tasks and seeds: {accuracy:.1f} %."
        lines += [f"## {name.capitalize()} tasks", "", individual, "", markdown_table(table), ""]
    return "\n".join(lines)


def main() -> None:
    """Measure, and write the report into the file of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="working folder of the recipe")
    parser.add_argument("file", type=Path, help="file of the report, in Markdown")
    parser.add_argument("task_sets", nargs="+", choices=TASK_SETS, help="sets of tasks that are upscaled together")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    write_atomically(arguments.file, report(arguments.folder, arguments.task_sets))
    print(arguments.file)


if __name__ == "__main__":
    main()
