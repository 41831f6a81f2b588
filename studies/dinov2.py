"""Retention against bytes on the DINOv2 benchmark: SMILE by ranks, routing and storage, and other methods.

python -m studies.dinov2 FOLDER docs/dinov2_results.md eight fourteen   # experts of recipes.images.seeds FOLDER

Outcomes are kept in FOLDER/outcomes; a command that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Dinov2Model

from fusion_bench_smile import calibrate, record_choices, upscale
from fusion_bench_smile.exceptions import SmileError
from fusion_bench_smile.io import write_atomically
from fusion_bench_smile.nn import count_bytes, count_parameters
from fusion_bench_smile.reports import STYLES, markdown_table, panels, save_figure
from smile_zoo.dinov2 import EIGHT_TASKS, TASKS, load_head, load_images, load_inputs, load_pretrained
from smile_zoo.dinov2.task_pool import features, to_pixels
from studies import rivals

log = logging.getLogger(__name__)

SEEDS = (0, 1, 2)
IMAGES = 200  # of each task
CALIBRATION = 64  # inputs of each task
VALIDATION = 50  # images of each task, by which MASS takes its layer
ONE_SEED = ("merging", "MASS", "task known")  # groups that are measured with the first seed alone
TASK_SETS = {"eight": EIGHT_TASKS, "fourteen": TASKS}

HEADER = f"""# Measurements of the DINOv2 benchmark

Written by `python -m studies.dinov2 FOLDER docs/dinov2_results.md SET …`: the first {IMAGES} test images of each task,
retention in percent of the individual models' average, and the seeds of fine-tuning in the last columns. The experts of
seed 0 are those that are shipped, the others have full rank; other methods than SMILE have seed 0 alone. The interval
is a paired bootstrap over the images; it leaves out the variance between seeds. Bytes are those of the whole model,
relative to the pretrained one in float32 or in bfloat16; heads do not count.

With *head unknown* the task of an image is not given. SMILE with `routing_scope=input` and MASS name it themselves, and
an image counts as right if both the task and the class are. For a merged model the head with the largest probability
names it. *Task known* marks methods that are told which expert serves an image.

![retention against bytes](images/frontier.png)
"""

Outcomes = dict[str, np.ndarray]  # task → whether each image is classified right, (N,), bool
Serve = Callable[[str, Tensor], tuple[Tensor, list[str] | None]]  # task, images → features, names of their tasks


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        serve: from images, and the task where a method is told it, to their features (N, 2·D) and the tasks that the
            method names for them.
        parameters: relative to the pretrained model; NaN is unknown.
        bytes32: the same for bytes, for a pretrained model in float32.
        bytes16: in bfloat16.
    """

    serve: Serve
    parameters: float = np.nan
    bytes32: float = np.nan
    bytes16: float = np.nan


@dataclass(frozen=True)
class Entry:
    """How to build a row: its group in the figure, and a function of the pretrained model and the experts."""

    group: str
    build: Callable[[nn.Module, Mapping[str, nn.Module]], Method]
    sets: tuple[str, ...] = ("eight", "fourteen")  # of tasks


# -- SMILE


def sizes(model: nn.Module, pretrained: nn.Module) -> dict[str, float]:
    """The sizes of an upscaled model, relative to the pretrained one; what is not quantized follows its dtype."""
    count, whole = count_parameters(pretrained), count_bytes(model)
    floats = sum(p.numel() for p in model.parameters() if p.is_floating_point())
    return {
        "parameters": count_parameters(model) / count, "bytes32": whole / (4 * count),
        "bytes16": (whole - 2 * floats) / (2 * count),
    }  # fmt: skip


def served_by(model: nn.Module) -> Serve:
    """One model for all tasks, which names tasks if it routes whole inputs."""
    model = model.eval()

    def serve(task: str, pixels: Tensor) -> tuple[Tensor, list[str] | None]:
        if not hasattr(model, "smile_router"):
            return features(model, pixels), None
        with record_choices(model) as choices:
            embedded = features(model, pixels)
        return embedded, choices[-1].served_by

    return serve


def smile(pretrained: nn.Module, experts: Mapping[str, nn.Module], calibrated: bool = False, **options: Any) -> Method:
    """SMILE with some options."""
    if calibrated or options.pop("by_input", False):
        options = {"routing_scope": "input", "top_k": 2} | options
    model = upscale(pretrained, experts, calibration=CALIBRATION * calibrated, **options)
    if calibrated:
        calibrate(model, {task: [load_inputs(task)[:CALIBRATION]] for task in experts})
    return Method(served_by(model), **sizes(model, pretrained))


def oracle(pretrained: nn.Module, experts: Mapping[str, nn.Module], **options: Any) -> Method:
    """Each expert in low rank on its own task, without a router."""
    models = {task: upscale(pretrained, {task: expert}, gate_k=1, **options) for task, expert in experts.items()}
    every = [sizes(model, pretrained) for model in models.values()]
    total = {name: 1 + sum(size[name] - 1 for size in every) for name in every[0]}
    return Method(lambda task, pixels: (features(models[task].eval(), pixels), None), **total)


# -- others


def merged(pretrained: nn.Module, experts: Mapping[str, nn.Module], method: str) -> Method:
    """A merging method of the framework."""
    return Method(served_by(rivals.merged(pretrained, experts, method)), 1.0, 1.0, 1.0)


def emr(pretrained: nn.Module, experts: Mapping[str, nn.Module]) -> Method:
    """EMR-Merging: an elected vector in the size of the model, and one bit a parameter for each task."""
    models = rivals.emr(pretrained, experts)
    bits = len(experts) / 8  # bytes of the masks for each parameter
    return Method(lambda task, pixels: (features(models[task], pixels), None), np.nan, 2 + bits / 4, 2 + bits / 2)


def mass(pretrained: nn.Module, experts: Mapping[str, nn.Module]) -> Method:
    """MASS, with the layer that names most validation images right."""
    model, names = rivals.Mass(pretrained, experts), list(experts)
    images = {task: to_pixels(load_images(task, "validation")[:VALIDATION]["image"]) for task in experts}
    share = model.choose_layer(features, images)
    log.info("MASS: %s names the task of %.1f %% of the validation images", model.layer, share)

    def serve(task: str, pixels: Tensor) -> tuple[Tensor, list[str] | None]:
        chosen, best = model.choose(features, pixels)
        embedded = [features(model.model(each), pixels[i : i + 1]) for i, each in enumerate(chosen)]
        return torch.cat(embedded), [names[index] for index in best.tolist()]

    ratio = model.num_bytes / count_bytes(pretrained)
    return Method(serve, ratio, ratio, ratio)


def ranked(gate_k: int | None, k: int, **options: Any) -> partial[Method]:
    """SMILE with these ranks."""
    return partial(smile, gate_k=gate_k, k=k, **options)


EIGHT = ("eight",)
DROPPED: dict[str, Any] = {"k": -1, "density": 0.02, "storage": "int4"}
ENTRIES: dict[str, Entry] = {
    "pretrained": Entry("merging", lambda pretrained, experts: Method(served_by(pretrained), 1.0, 1.0, 1.0)),
    **{name: Entry("merging", partial(merged, method=name)) for name in rivals.MERGING},
    "MASS": Entry("MASS", mass),
    "EMR-Merging": Entry("task known", emr),
    "TSV-C": Entry("task known", lambda p, e: oracle(p, e, k=384 // len(e))),
    **{f"own expert, k={k}, int4": Entry("task known", partial(oracle, k=k, storage="int4"), EIGHT) for k in (16, 32)},
    "own expert, 2 % of the entries, int4": Entry("task known", partial(oracle, **DROPPED), EIGHT),
    "token (the paper), 8/8": Entry("token", ranked(8, 8), EIGHT),
    "token (the paper), 16/32": Entry("token", ranked(16, 32)),
    "token (the paper), 32/32": Entry("token", ranked(32, 32), EIGHT),
    "token, 16/16, int4": Entry("token", ranked(None, 16, storage="int4"), EIGHT),
    "token, 32/32, int4": Entry("token", ranked(None, 32, storage="int4")),
    **{f"input, {k}/{k}": Entry("input", ranked(None, k, by_input=True), EIGHT) for k in (8, 32)},
    "input, 16/16, int4": Entry("input", ranked(None, 16, by_input=True, storage="int4")),
    "input, 32/32, int4": Entry("input", ranked(None, 32, by_input=True, storage="int4")),
    "input, top_k=3, 32/32, int4": Entry(
        "input", ranked(None, 32, by_input=True, top_k=3, storage="int4"), ("fourteen",)
    ),
    "input, 64/64, int4": Entry("input", ranked(None, 64, by_input=True, storage="int4"), EIGHT),
    "input, 8 rows, 2 % of the entries, int4": Entry("input", partial(smile, gate_k=8, by_input=True, **DROPPED)),
    "calibrated, 8/8": Entry("calibrated", ranked(None, 8, calibrated=True), EIGHT),
    "calibrated, 14/14, int4": Entry("calibrated", ranked(None, 14, calibrated=True, storage="int4"), EIGHT),
    "calibrated, 28/28, int4": Entry("calibrated", ranked(None, 28, calibrated=True, storage="int4")),
    "calibrated, 8 rows, 2 % of the entries, int4": Entry(
        "calibrated", partial(smile, gate_k=8, calibrated=True, **DROPPED)
    ),
}  # fmt: skip


# -- evaluation


@cache
def test_images(task: str) -> tuple[Tensor, Tensor]:
    """The first test images of a task as pixels (N, 3, 56, 56), and their labels (N,)."""
    dataset = load_images(task)[:IMAGES]
    return to_pixels(dataset["image"]), torch.tensor(dataset["label"])


@torch.inference_mode()
def outcomes(serve: Serve, tasks: Sequence[str]) -> tuple[Outcomes, Outcomes]:
    """Whether each test image is classified right, with the head of its task, and with that of the named task."""
    heads = {task: load_head(task) for task in tasks}
    known: Outcomes = {}
    unknown: Outcomes = {}
    for task in tasks:
        pixels, labels = test_images(task)
        parts = [serve(task, batch) for batch in pixels.split(50)]
        embedded = torch.cat([part for part, _ in parts])
        right = (F.linear(embedded, *heads[task]).argmax(dim=-1) == labels).numpy()
        if parts[0][1] is None:
            best = torch.stack([F.linear(embedded, *head).softmax(dim=-1).amax(dim=-1) for head in heads.values()])
            named = [tasks[index] for index in best.argmax(dim=0).tolist()]
        else:
            named = [name for _, names in parts for name in names or ()]
        known[task] = right
        unknown[task] = right & np.array([name == task for name in named])
    return known, unknown


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
        index = {task: generator.integers(0, len(values), len(values)) for task, values in correct[0].items()}
        pairs = zip(correct, individual, strict=True)
        drawn.append(np.mean([retention(resampled(one, index), resampled(other, index)) for one, other in pairs]))
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)


# -- the study


@dataclass(frozen=True)
class Result:
    """The measurements of one method with one seed: outcomes with the head known and unknown, and sizes."""

    known: Outcomes
    unknown: Outcomes
    sizes: tuple[float, float, float]  # parameters and bytes; NaN for unknown

    def save(self, file: Path) -> None:
        """Write to a file of numpy arrays."""
        file.parent.mkdir(parents=True, exist_ok=True)
        arrays = {f"known {t}": v for t, v in self.known.items()} | {f"unknown {t}": v for t, v in self.unknown.items()}
        scratch = file.with_suffix(".part.npz")
        np.savez(scratch, sizes=np.array(self.sizes), **arrays)  # type: ignore[arg-type]
        scratch.rename(file)

    @classmethod
    def load(cls, file: Path) -> Result:
        """Read what `save` wrote."""
        with np.load(file) as arrays:
            known, unknown = (
                {name.removeprefix(kind): arrays[name] for name in arrays if name.startswith(kind)}
                for kind in ("known ", "unknown ")
            )
            parameters, bytes32, bytes16 = arrays["sizes"].tolist()
        return cls(known, unknown, (parameters, bytes32, bytes16))


def folders_of(root: Path, seed: int, tasks: Sequence[str]) -> dict[str, Path]:
    """Task → folder of its expert with a seed."""
    return {task: root / "experts" / "dinov2" / str(seed) / task for task in tasks}


def measure(root: Path, task_set: str, seed: int) -> dict[str, Result]:
    """The results of all rows, and of the individual models, for experts of one seed."""
    tasks = TASK_SETS[task_set]
    left_out = {name for name, e in ENTRIES.items() if task_set not in e.sets or (seed and e.group in ONE_SEED)}
    names = [name for name in ("individual", *ENTRIES) if name not in left_out]
    files = {name: root / "outcomes" / task_set / str(seed) / f"{name.replace('/', '-')}.npz" for name in names}
    if missing := [name for name, file in files.items() if not file.exists()]:
        pretrained = load_pretrained().eval()
        folders = folders_of(root, seed, tasks)
        experts = {task: Dinov2Model.from_pretrained(folder).eval() for task, folder in folders.items()}
    for name in missing:
        if name == "individual":
            method = Method(lambda task, pixels: (features(experts[task], pixels), None), len(tasks), len(tasks))
        else:
            method = ENTRIES[name].build(pretrained, experts)
        known, unknown = outcomes(method.serve, tasks)
        shares = (method.parameters, method.bytes32, method.bytes16)
        Result(known, unknown, shares).save(files[name])
        accuracy = 100 * np.mean([values.mean() for values in known.values()])
        log.info("%s tasks, seed %d, %s: %.1f", task_set, seed, name, accuracy)
    return {name: Result.load(file) for name, file in files.items()}


def row(name: str, results: Sequence[Mapping[str, Result]], seeds: Sequence[int]) -> dict[str, object]:
    """A row of the table from the results of all seeds."""
    measured = [(seed, result) for seed, result in zip(seeds, results, strict=True) if name in result]
    each = [result[name] for _, result in measured]
    individual = [result["individual"].known for _, result in measured]
    kept = [retention(result.known, one) for result, one in zip(each, individual, strict=True)]
    low, high = interval([result.known for result in each], individual)
    unknown = [retention(result.unknown, one) for result, one in zip(each, individual, strict=True)]
    parameters, bytes32, bytes16 = each[-1].sizes  # of experts in full rank, if there are some
    told = ENTRIES[name].group == "task known"
    return {
        "method": name, "parameters": "" if np.isnan(parameters) else f"{parameters:.2f}×", "bytes": f"{bytes32:.3f}×",
        "bytes, bfloat16": f"{bytes16:.3f}×", "retention": f"{np.mean(kept):.1f}",
        "95 % interval": f"{low:.1f} – {high:.1f}", "head unknown": "task known" if told else f"{np.mean(unknown):.1f}",
        **dict.fromkeys((f"seed {seed}" for seed in seeds), ""),
        **{f"seed {seed}": f"{value:.1f}" for (seed, _), value in zip(measured, kept, strict=True)},
    }  # fmt: skip


def tables(root: Path, task_sets: Sequence[str]) -> dict[str, tuple[float, pd.DataFrame]]:
    """Set of tasks → accuracy of the individual models in percent, and the table.

    Raises:
        SmileError: if the experts of a set are missing.
    """
    result = {}
    for task_set in task_sets:
        tasks = TASK_SETS[task_set]
        seeds = [s for s in SEEDS if all(folder.exists() for folder in folders_of(root, s, tasks).values())]
        if not seeds:
            raise SmileError(f"{root} has no experts of {task_set} tasks: run python -m recipes.images.seeds first")
        results = [measure(root, task_set, seed) for seed in seeds]
        accuracy = np.mean([[v.mean() for v in each["individual"].known.values()] for each in results])
        result[task_set] = (
            100 * float(accuracy),
            pd.DataFrame([row(name, results, seeds) for name in ENTRIES if name in results[0]]),
        )
    return result


def figure(measured: Mapping[str, tuple[float, pd.DataFrame]], file: Path) -> None:
    """Draw retention against bytes for each set of tasks, with intervals."""
    drawing, axes = panels(5.5 * len(measured), 4.5, 1, len(measured), squeeze=False)
    groups = list(dict.fromkeys(entry.group for entry in ENTRIES.values()))
    for axis, (task_set, (_, table)) in zip(axes[0], measured.items(), strict=True):
        for group, (colour, marker) in zip(groups, STYLES, strict=False):
            rows = table[[ENTRIES[name].group == group for name in table["method"]]]
            x = rows["bytes"].str.rstrip("×").astype(float)
            y = rows["retention"].astype(float)
            ends = rows["95 % interval"].str.split(" – ", expand=True).astype(float)
            errors = [y - ends[0], ends[1] - y]
            axis.errorbar(x, y, errors, fmt=marker, color=colour, label=group, capsize=2, markersize=5, alpha=0.85)
        axis.set_xscale("log")
        axis.set_xticks([1, 1.1, 1.25, 1.5, 2, 3], ["1", "1.1", "1.25", "1.5", "2", "3"])
        axis.minorticks_off()
        axis.set(title=f"{task_set} tasks", xlabel="bytes relative to the pretrained model", ylabel="retention in %")
        axis.set_ylim(80, 101)
        axis.grid(alpha=0.3)
    axes[0][0].legend(loc="lower right")
    save_figure(drawing, file)


def main() -> None:
    """Measure, and write the report into the file of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="working folder of the recipe")
    parser.add_argument("file", type=Path, help="file of the report, in Markdown")
    parser.add_argument("task_sets", nargs="+", choices=TASK_SETS, help="sets of tasks that are upscaled together")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        measured = tables(arguments.folder, arguments.task_sets)
    except SmileError as error:
        parser.exit(1, f"{error}\n")
    lines = [HEADER]
    for name, (accuracy, table) in measured.items():
        individual = f"Accuracy of the individual models, mean over tasks and seeds: {accuracy:.1f} %."
        lines += [f"## {name.capitalize()} tasks", "", individual, "", markdown_table(table), ""]
    write_atomically(arguments.file, "\n".join(lines))
    figure(measured, arguments.file.parent / "images" / "frontier")
    print(arguments.file)


if __name__ == "__main__":
    main()
