"""The report: tables and figures in ``docs/`` of the stored measurements."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from textwrap import fill

import pandas as pd

from fusion_bench_smile.io import write_atomically
from fusion_bench_smile.reports import markdown_table, save_figure
from studies.routing.expert_identification import DESCRIPTIONS
from studies.routing.figures import layer_figure, retention_figure
from studies.routing.labels import TITLES, label_of
from studies.routing.stored_tables import EXPERT_SETS, read_accuracies, read_tables
from studies.routing.summary import ORACLE, ORACLE_WITH_NORMS, summarize
from studies.routing.variants import EXPERT_NORMS, INT8, PAPER, VARIANTS, ZERO_SHOT

BASELINES = ("individual", "pretrained", "Task Arithmetic", "TIES", "AdaMerging")
BUDGET = 1.25  # of the tables and the figure of router accuracy
# stored column → column of routing_results.csv
CSV_COLUMNS = {
    "set": "experts", "variant": "variant", "budget": "budget", "ratio": "parameter_ratio", "bytes": "byte_ratio",
    "retention": "retention", "low": "retention_low", "high": "retention_high", "average": "average",
    "right": "router_accuracy", "closed": "closed_gap",
}  # fmt: skip
INTRODUCTION = f"""# Measurements of routing and budgets

Written by `python -m studies.routing FOLDER --report docs`; [routing.md](routing.md) discusses them. All numbers are of
test inputs, and means over seeds of fine-tuning. Retention is in percent of the individual models' average, with the
95 % interval of the bootstrap over seeds and inputs. `routing_results.csv` has all rows, with parameters and bytes.

A variant is named by its routing scope, its score, and further options. `{label_of(PAPER.name)}` has the rank options
that were selected for the paper's routing. All other variants have those that were selected for
`{label_of(ZERO_SHOT.name)}`.

![retention against parameters](images/routing.png)
"""


def write_report(folder: Path, docs: Path) -> None:
    """Write ``routing_results.md``, ``routing_results.csv`` and the figures in ``images/`` into a folder.

    Args:
        folder: Folder of the stored tables.
        docs: The folder; its subfolder ``images`` must exist.
    """
    summaries = {name: summary for name in EXPERT_SETS if len(summary := summarize(read_accuracies(folder, name)))}
    write_atomically(docs / "routing_results.csv", _csv(summaries))
    sections = [_expert_set_section(folder, name, summary) for name, summary in summaries.items()]
    text = "\n".join([INTRODUCTION, *_score_section(folder), *(line for section in sections for line in section)])
    write_atomically(docs / "routing_results.md", text.rstrip() + "\n")
    save_figure(retention_figure(summaries), docs / "images" / "routing")
    save_figure(layer_figure(folder, list(summaries), BUDGET), docs / "images" / "routing_layers")


def _csv(summaries: Mapping[str, pd.DataFrame]) -> str:
    table = pd.concat([summary.assign(set=name) for name, summary in summaries.items()])
    table = table[list(CSV_COLUMNS)].rename(columns=CSV_COLUMNS)
    return table.assign(variant=table["variant"].map(label_of)).round(4).to_csv(index=False)


def _score_section(folder: Path) -> Iterator[str]:
    """Router accuracy of all scores and prototypes, for the sets of experts with such measurements."""
    tables = {name: table for name in EXPERT_SETS if len(table := read_tables(folder, name, "ideas"))}
    if not tables:
        return
    seeds = ", ".join(f"{name} {table['seed'].nunique()}" for name, table in tables.items())
    columns = ["as it is", "against random inputs", "against all test inputs"]
    means = [
        table.groupby("score", sort=False)[columns].mean().rename(columns=lambda c, n=name: f"{n}: {label_of(c)}")
        for name, table in tables.items()
    ]
    yield from ["## Scores", ""]
    yield _paragraph(f"""
        Router accuracy of two passes at {BUDGET:g}×, in percent of the inputs; seeds: {seeds}. Scores are taken
        unchanged, standardised by their mean and deviation on random inputs, or by those on all test inputs, which
        need no labels:
    """)
    yield from ["", _labelled(pd.concat(means, axis=1)), ""]
    scores = means[0].index
    descriptions = {label_of(score): text for score, text in DESCRIPTIONS.items() if score in scores}
    yield from (_paragraph(f"- *{label}*: {text}.", indent="  ") for label, text in descriptions.items())
    yield ""


def _expert_set_section(folder: Path, expert_set: str, summary: pd.DataFrame) -> Iterator[str]:
    title, budgets = TITLES[expert_set], summary[summary["budget"].notna()].assign(cell=_retention_cells)
    baselines = summary[summary["variant"].isin(BASELINES)].assign(retention=_retention_cells).set_index("variant")
    baselines = baselines.reindex([name for name in BASELINES if name in baselines.index])
    yield from [f"## {title[0].upper()}{title[1:]}", ""]
    yield from [f"{summary['seeds'].iloc[0]} seeds, with {summary['inputs'].iloc[0]} test inputs for each.", ""]
    yield from [_labelled(baselines[["average", "retention"]]), ""]
    yield _paragraph("""
        Retention in percent by budget, the upper bound of the parameter ratio. The prototypes of calibrated models,
        less than one percent of the parameters, are not part of the budget:
    """)
    yield from ["", _labelled(_retention_by_budget(budgets)), ""]
    yield _paragraph("""
        Rank options and sizes of the paper's routing and of the recommended variants. The closed gap is the share of
        the gap between the paper's routing and oracle routing at the same budget:
    """)
    yield from ["", _rank_table(budgets), ""]
    yield _paragraph(f"""
        Router accuracy at {BUDGET:g}×, in percent of inputs, or of tokens for the scope `token`; accuracy on inputs
        that are served by the expert of their task, on those that are served by another one, and accuracy of oracle
        routing on the latter:
    """)
    yield from ["", _router_accuracy_table(budgets), ""]
    yield from _refusal_part(folder, expert_set)


def _refusal_part(folder: Path, expert_set: str) -> Iterator[str]:
    """Accuracy on tasks without an expert, if it was measured."""
    table = read_tables(folder, expert_set, "unknown")
    if not len(table):
        return
    columns = [column for column in table.columns if column not in ("held out", "set", "seed")]
    means = table.groupby("held out", sort=False)[columns].mean()
    means.loc["mean"] = means.mean()
    yield _paragraph(f"""
        Accuracy on the inputs of a held-out task, for which the model has no expert, and the share of inputs that
        `refuse_unknown` refuses, in percent. The model is calibrated by 64 inputs of each other task, at 1.5×;
        {table["seed"].nunique()} seeds:
    """)
    yield from ["", _labelled(means), ""]


def _retention_by_budget(budgets: pd.DataFrame) -> pd.DataFrame:
    """Retention of each variant (rows) at each budget (columns)."""
    table = budgets.pivot(index="variant", columns="budget", values="cell").reindex(_variants(budgets))
    return table.rename(columns="{:g}×".format)


def _rank_table(budgets: pd.DataFrame) -> str:
    formats = {"budget": "{:g}×", "ratio": "{:.3f}×", "bytes": "{:.3f}×", "gate_k": "{:.0f}", "closed": "{:.0f} %"}
    names = [variant.name for variant in (PAPER, *EXPERT_NORMS, *INT8)]
    rows = budgets[budgets["variant"].isin(names)].set_index("variant")
    table = pd.DataFrame({name: rows[name].map(form.format, na_action="ignore") for name, form in formats.items()})
    return _labelled(table.assign(allocation=rows["allocation"], retention=rows["cell"]))


def _router_accuracy_table(budgets: pd.DataFrame) -> str:
    rows = budgets[budgets["budget"] == BUDGET].set_index("variant")
    names = [name for name in _variants(budgets) if name in rows.index and name not in (ORACLE, ORACLE_WITH_NORMS)]
    return _labelled(rows.reindex(names)[["right", "if_right", "if_wrong", "own_if_wrong"]])


def _variants(summary: pd.DataFrame) -> list[str]:
    """The names of the variants in a table, in the order of the report."""
    names = [*(variant.name for variant in VARIANTS), ORACLE, ORACLE_WITH_NORMS]
    return [name for name in names if name in set(summary["variant"])]


def _retention_cells(table: pd.DataFrame) -> list[str]:
    return [f"{row.retention:.1f} ({row.low:.1f}–{row.high:.1f})" for row in table.itertuples()]


def _labelled(table: pd.DataFrame) -> str:
    """A Markdown table with the index as first column, without a heading, and labels instead of stored names."""
    table = table.rename_axis(index=None, columns=None).rename(index=label_of, columns=label_of)
    return markdown_table(table, digits=1, index=True)


def _paragraph(text: str, indent: str = "") -> str:
    """A text wrapped to lines of 120 characters, the second and further ones with an indent."""
    words = " ".join(text.split())
    return fill(words, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
