"""The results of a run in the model card of a checkpoint: ``smile-card FOLDER --report FILE``.

smile-card outputs/smile --report outputs/run/smile_report.json --license apache-2.0 --base-model org/name
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from ..config import SmileConfig
from ..exceptions import CheckpointError, ConfigError, SmileError
from ..io import write_atomically
from ..io.metadata import SmileMetadata
from ..io.model_card import CARD_FILE
from ..io.tables import escape_markdown, markdown_table
from ..io.transformers_hook import read_metadata
from .report import ReportError, RunReport

START, END = "<!-- results of smile-card -->", "<!-- /results of smile-card -->"  # a person's text around them stays
SETTINGS = ("execution", "device", "upscaling_accelerator", "full_matrices")  # of the computation, not of the model


def complete_card(
    folder: Path, report: RunReport | None = None, *, license: str | None = None, base_model: str | None = None,
    task: str = "other",
) -> None:  # fmt: skip
    """Complete the model card of a checkpoint with what the hub shows, atomically. What is not given stays as it is.

    Args:
        folder: Of the checkpoint.
        report: Of a run that evaluated it: its scores become the card's evaluation results, and a table.
        license: The model's licence, by its identifier on the hub; it follows from that of the pretrained model.
        base_model: The name of the pretrained model on the hub.
        task: The task of the results, by its identifier on the hub, such as ``image-classification``.

    Raises:
        ReportError: The report is not of this model.
        CheckpointError: The folder holds no checkpoint, or no model card.
    """
    metadata, _ = read_metadata(folder)
    file = folder / CARD_FILE
    try:
        card = ModelCard.load(file)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} can't be read: {error}; save the model again for a new card") from None
    if license is not None:
        card.data.license = license
    if base_model is not None:
        card.data.base_model = base_model
    if report is not None:
        _check_report(report, metadata)
        card.data.model_name = folder.resolve().name
        card.data.eval_results = _results(report, task)
        before, _, replaced = card.text.partition(START)
        card.text = f"{before.rstrip()}\n\n{_section(report)}{replaced.partition(END)[2]}"
    write_atomically(file, str(card))


def _check_report(report: RunReport, metadata: SmileMetadata) -> None:
    if report.status != "complete":
        raise ReportError(f"the run failed: {report.error}")
    if report.models and sorted(report.models) != sorted(metadata.experts):
        raise ReportError("the report is of other experts than the checkpoint: choose that of its run")
    names = [field.name for field in fields(SmileConfig) if field.name not in SETTINGS]
    options = {name: report.method[name] for name in names if name in report.method}
    try:
        reported = SmileConfig(**options).to_dict()
    except (ConfigError, TypeError) as error:
        raise ReportError(f"the report is of another model: {error}") from None
    stored = metadata.config.to_dict()
    pairs = {name: (reported[name], stored[name]) for name in options}
    if "calibration" in report.method:
        pairs["calibration"] = (bool(report.method["calibration"]), metadata.prototypes is not None)
    for name, (of_run, of_model) in pairs.items():
        if of_run != of_model:
            given = f"{name}={of_run} in the report, {of_model} in the checkpoint"
            raise ReportError(f"the report is of another model, {given}: choose that of its run")


def _results(report: RunReport, task: str) -> list[EvalResult]:
    scores = {name: result for name, result in report.tasks.items() if result.score is not None}
    return [EvalResult(task, name, name, result.metric, result.score) for name, result in scores.items()]


def _section(report: RunReport) -> str:
    """Scores and retention as Markdown."""
    import pandas as pd

    rows: list[dict[str, Any]] = [
        {"task": escape_markdown(name), "metric": escape_markdown(result.metric), "score": result.score}
        for name, result in report.tasks.items()
    ]
    rows.append({"task": "average", "metric": "", "score": report.average})
    retention = "" if report.retention is None else f" Retention: {report.retention:.1f} % of the individual models."
    ratios = {"parameters": report.parameter_ratio, "bytes": report.byte_ratio}
    sizes = [f"{ratio:.3f}× the {name}" for name, ratio in ratios.items() if ratio]
    size = f" {' and '.join(sizes)} of the pretrained model." if sizes else ""
    benchmark = escape_markdown(report.benchmark)
    table = markdown_table(pd.DataFrame(rows))
    return f"{START}\n## Results\n\nBenchmark: {benchmark}.{retention}{size}\n\n{table}\n{END}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Complete the card of the folder that the command line names. An error is one line, and exits with 1."""
    parser = argparse.ArgumentParser(description="Complete the model card of a SMILE checkpoint for the hub.")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder of the checkpoint")
    parser.add_argument("--report", type=Path, metavar="FILE", help="smile_report.json of a run that evaluated it")
    parser.add_argument("--license", help="of the model, such as apache-2.0")
    parser.add_argument("--base-model", metavar="NAME", help="name of the pretrained model on the hub")
    parser.add_argument("--task", default="other", help="of the results, such as image-classification (default: other)")
    given = parser.parse_args(arguments)
    try:
        report = None if given.report is None else RunReport.read(given.report)
        complete_card(given.folder, report, license=given.license, base_model=given.base_model, task=given.task)
    except SmileError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{given.folder / CARD_FILE}: ready for the hub")
