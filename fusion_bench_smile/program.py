"""The framework's fusion program, with what a comparison needs beside the accuracies in its report."""

from __future__ import annotations

import time
from typing import Any

from fusion_bench.programs.fabric_fusion_program import FabricModelFusionProgram
from torch import nn


class ReportingFusionProgram(FabricModelFusionProgram):
    """Adds a section ``run`` to the report: label, row, strength, task, and the seconds the method took.

    Args:
        label: the name of the run in tables.
        scaling: for each strength the method's scaling factor; the configuration picks one.
        options: everything else; `row`, `strength` and `task` are put into the report as they are.
    """

    def __init__(self, *args: Any, label: str, scaling: Any = None, **options: Any) -> None:
        notes: dict[str, Any] = {key: options.pop(key) for key in ("row", "strength", "task") if key in options}
        self.notes = {"label": label, **notes}
        self._ready = time.perf_counter()
        super().__init__(*args, **options)

    def _instantiate_and_setup(self, *args: Any, **kwargs: Any) -> Any:
        made = super()._instantiate_and_setup(*args, **kwargs)
        self._ready = time.perf_counter()  # pools and method stand: what follows is the method's run
        return made

    def save_merged_model(self, merged_model: nn.Module) -> None:
        self.notes["method_seconds"] = time.perf_counter() - self._ready
        if self.merged_model_save_path is not None:
            super().save_merged_model(merged_model)

    def evaluate_merged_model(self, *args: Any, **kwargs: Any) -> Any:
        report = super().evaluate_merged_model(*args, **kwargs)
        if isinstance(report, dict):
            report["run"] = self.notes
        return report
