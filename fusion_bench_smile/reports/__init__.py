"""Reports of runs: schema, environment, resource usage, labels; helpers for the tables and figures made from them."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names
from ..io import markdown_table
from .labels import label_of
from .program_report import PROGRAM_REPORT_FILE, read_program_report
from .report import (
    REPORT_FILE,
    Environment,
    LayerRouting,
    ReportError,
    Routing,
    RunReport,
    Stage,
    TaskResult,
    UnusedChange,
    average_of,
    fingerprint,
    retention_of,
    task_results,
)

if TYPE_CHECKING:
    from .plotting import STYLES, figure_text, grouped_bars, heatmap, panels, render_figure, save_figure
    from .resources import ResourceMeter, environment, git_revision

__all__ = [
    "PROGRAM_REPORT_FILE", "REPORT_FILE", "STYLES", "Environment", "LayerRouting", "ReportError", "ResourceMeter",
    "Routing", "RunReport", "Stage", "TaskResult", "UnusedChange", "average_of", "environment", "figure_text",
    "fingerprint", "git_revision", "grouped_bars", "heatmap", "label_of", "markdown_table", "panels",
    "read_program_report", "render_figure", "retention_of", "save_figure", "task_results",
]  # fmt: skip
__getattr__ = lazy_names(__name__, {
    "plotting": ("STYLES", "figure_text", "grouped_bars", "heatmap", "panels", "render_figure", "save_figure"),
    "resources": ("ResourceMeter", "environment", "git_revision"),
})  # fmt: skip
