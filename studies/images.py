"""Measure the image benchmark: every expert on every task, sizes of task vectors, router accuracy, file sizes.

python -m studies.images docs/embedded_results.md
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast, get_args

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from transformers import CLIPModel, CLIPProcessor, CLIPVisionModel

from fusion_bench_smile import record_routing, upscale
from fusion_bench_smile.io import write_atomically
from fusion_bench_smile.reports import markdown_table
from smile_zoo.images import DATA, TASKS, Split, Strength, load_expert, load_images, load_pretrained
from smile_zoo.images.evaluate import Classifier, accuracy, to_pixels, zero_shot_head

GATE_RANKS = (1, 4, 8, 16)


def labelled_pixels(task: str, split: Split = "test") -> tuple[Tensor, Tensor]:
    """Pixels (N, 3, 28, 28), float32, and labels (N,) of a task."""
    images = load_images(task, split)
    return to_pixels(np.stack([np.asarray(image) for image in images["image"]])), torch.tensor(images["label"])


def accuracies(models: dict[str, nn.Module], split: Split = "test") -> pd.DataFrame:
    """Accuracy in percent of every model (rows) on every task (columns)."""
    clip = CLIPModel.from_pretrained(DATA / "clip", torch_dtype=torch.float32).eval()
    processor = CLIPProcessor.from_pretrained(DATA / "clip", use_fast=False)
    table = pd.DataFrame(index=list(models), columns=list(TASKS), dtype=float)
    for task in TASKS:
        head, (pixels, labels) = zero_shot_head(clip, processor, task), labelled_pixels(task, split)
        for name, model in models.items():
            table.loc[name, task] = 100 * accuracy(Classifier(clip, model, head), pixels, labels)
    return table


def relative_deltas(pretrained: nn.Module, expert: nn.Module) -> pd.Series:
    """‖ΔW‖ / ‖W₀‖ (Frobenius norms) of every linear layer, in percent."""
    values = {}
    for name, layer in pretrained.named_modules():
        if isinstance(layer, nn.Linear):
            delta = cast(nn.Linear, expert.get_submodule(name)).weight - layer.weight
            values[name] = 100 * (delta.norm() / layer.weight.norm()).item()
    return pd.Series(values)


@torch.no_grad()
def router_accuracy(upscaled: nn.Module, split: Split = "test", count: int = 200) -> pd.Series:
    """Task → share of its tokens with the task's expert in first place, in percent; the mean over routed layers.

    Args:
        upscaled: A model with the tasks' experts in the order of `TASKS`.
        split: The split of the images.
        count: Number of images of each task.
    """
    shares = {}
    for number, task in enumerate(TASKS):
        with record_routing(upscaled) as routing:
            upscaled(pixel_values=labelled_pixels(task, split)[0][:count])
        shares[task] = 100 * np.mean([layer.loads[number].item() for layer in routing.values()])
    return pd.Series(shares)


def load_experts(strength: Strength) -> dict[str, CLIPVisionModel]:
    """Task → expert, in evaluation mode."""
    return {task: load_expert(task, strength).eval() for task in TASKS}


def report() -> str:
    """All measurements as Markdown."""
    lines = [
        "# Measurements of the image benchmark",
        "",
        "Written by `python -m studies.images docs/embedded_results.md`. Accuracies are of the test split, in percent.",
        "",
    ]
    for strength in get_args(Strength):
        lines += _strength_section(strength)
    return "\n".join([*lines, *size_section(DATA), ""])


def _strength_section(strength: Strength) -> Iterator[str]:
    pretrained, experts = load_pretrained().eval(), load_experts(strength)
    yield from [f"## {strength} fine-tuning", "", "Every expert (rows) on every task (columns):", ""]
    table = accuracies({"pretrained": pretrained, **experts})
    yield from [_with_average(table), ""]
    yield from ["Size of the task vectors, ‖ΔW‖ / ‖W₀‖ over the linear layers, in percent:", ""]
    deltas = pd.DataFrame({task: relative_deltas(pretrained, expert) for task, expert in experts.items()})
    norms = deltas.agg(["min", "mean", "max"]).set_axis(["smallest", "mean", "largest"])
    yield from [markdown_table(norms, 2, index=True), ""]
    yield from ["Router accuracy, in percent of the tokens (chance: 12.5):", ""]
    models = {f"gate_k={gate_k}": upscale(pretrained, experts, gate_k=gate_k, k=8) for gate_k in GATE_RANKS}
    routing = pd.DataFrame({name: router_accuracy(model.eval()) for name, model in models.items()}).T
    yield from [_with_average(routing), ""]


def _with_average(table: pd.DataFrame) -> str:
    """A Markdown table with the average of all columns as last column."""
    return markdown_table(table.assign(average=table.mean(axis=1)), 1, index=True)


def size_section(data: Path) -> list[str]:
    """The sizes of the folders of a benchmark's data, as lines of Markdown."""
    sizes = {p.name: sum(f.stat().st_size for f in p.rglob("*") if f.is_file()) / 1e6 for p in sorted(data.iterdir())}
    table = pd.DataFrame({"size": {**sizes, "total": sum(sizes.values())}})
    return ["## Sizes", "", "In MB:", "", markdown_table(table, 1, index=True)]


def run(report: Callable[[], str], description: str | None) -> None:
    """Write a report into the file of the command line.

    Args:
        report: Returns the report.
        description: Description of the command.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="file of the report, in Markdown")
    file = parser.parse_args().file
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, report())
    print(file)


if __name__ == "__main__":
    run(report, __doc__)
