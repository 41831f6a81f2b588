"""Reports of runs: schema, environment, resource usage, labels; helpers for the tables and figures made from them."""

from ..io import markdown_table
from .labels import label_of
from .plotting import STYLES, figure_text, grouped_bars, heatmap, panels, render_figure, save_figure
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
from .resources import ResourceMeter, environment, git_revision

__all__ = [
    "REPORT_FILE", "STYLES", "Environment", "LayerRouting", "ReportError", "ResourceMeter", "Routing", "RunReport",
    "Stage", "TaskResult", "UnusedChange", "average_of", "environment", "figure_text", "fingerprint", "git_revision",
    "grouped_bars", "heatmap", "label_of", "markdown_table", "panels", "render_figure", "retention_of", "save_figure",
    "task_results",
]  # fmt: skip
