"""The study's tables and pictures, of what its measurements say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...leaderboard.figures import STYLES, save
from ...leaderboard.tables import markdown_table
from ...report import write_whole
from .. import TASKS, text
from .variants import BEST, GRID, INT8, MORE, OWN, PAPER, RATIOS

SETS = ("gentle", "strong", "full", "lora")
TITLES = {
    "gentle": "images, gentle fine-tuning", "strong": "images, strong fine-tuning",
    "full": "text, full fine-tuning", "lora": "text, LoRA experts of rank 8",
}  # fmt: skip
RIVALS = ("individual", "pretrained", "Task Arithmetic", "TIES", "AdaMerging")
ORACLE, OWN_ORACLE = "the task's own expert", "the task's own expert, own norms"
VARIANTS = [v.name for v in (PAPER, *GRID, *MORE, *OWN, *INT8)]
DRAWN = [PAPER.name, BEST.name, OWN[0].name, OWN[-1].name, ORACLE, OWN_ORACLE]
RESAMPLES = 2000
SHOWN = 1.25  # the budget whose routers are looked at


def write_report(folder: Path, docs: Path) -> None:
    """Write ``routing_results.md``, ``.csv`` and the pictures of what lies in `folder` into `docs`."""
    tables = {chosen: table for chosen in SETS if len(table := with_intervals(everything_of(folder, chosen)))}
    everything = pd.concat([table.assign(set=chosen) for chosen, table in tables.items()])
    columns = ["set", "variant", "budget", "ratio", "bytes", "retention", "low", "high", "average", "right", "closed"]
    write_whole(docs / "routing_results.csv", everything[columns].round(4).to_csv(index=False))
    parts = [part for chosen, table in tables.items() for part in of_set(folder, chosen, table)]
    write_whole(docs / "routing_results.md", "\n".join([*HEAD, *of_ideas(folder, tables), *parts]) + "\n")
    save(retentions(tables), docs / "images" / "routing")
    save(of_layers(folder, tables), docs / "images" / "routing_layers")


def measured(folder: Path, chosen: str, name: str = "rows") -> pd.DataFrame:
    """The tables of all seeds."""
    files = sorted(folder.glob(f"{chosen}-[0-9]*-{name}.csv"))
    return pd.concat(map(pd.read_csv, files)) if files else pd.DataFrame()


def everything_of(folder: Path, chosen: str) -> pd.DataFrame:
    """What was measured of every model, merged ones where they were for all seeds."""
    rows, merged = measured(folder, chosen), measured(folder, chosen, "merged")
    complete = len(merged) and set(merged["seed"]) == set(rows["seed"])
    return pd.concat([rows, merged]) if complete else rows


def flags(packed: str) -> np.ndarray:
    return np.unpackbits(np.frombuffer(bytes.fromhex(packed), dtype=np.uint8))


def with_intervals(rows: pd.DataFrame, resamples: int = RESAMPLES) -> pd.DataFrame:
    """One row for each variant and budget: means over seeds, retention and its 95 % interval.

    The interval is of the bootstrap, over seeds and over each task's inputs, which are the same for all variants.
    ``closed`` is how much of what the paper's routing loses against the oracle of the same budget a variant gains.
    """
    if not len(rows):
        return rows
    rows = pd.concat([rows, *_oracles(rows)])
    tasks = [column for column in rows if column in (*TASKS, *text.TASKS)]
    seeds = sorted(rows["seed"].unique())
    numbers = [c for c in ("ratio", "bytes", "average", "right", "if_right", "if_wrong", "own_if_wrong") if c in rows]
    groups = rows.groupby(["variant", "budget"], dropna=False, sort=False)
    found = groups[[*numbers, *tasks]].mean().reset_index()
    found = found.merge(groups[["gate_k", "allocation"]].first().reset_index(), on=["variant", "budget"])
    right = np.stack([np.stack([flags(c) for c in group.sort_values("seed")["correct"]]) for _, group in groups])
    of_task = right.shape[-1] // len(tasks)
    right = right[..., : of_task * len(tasks)].astype(np.float32)  # (variants, seeds, inputs), without padding
    of_seeds, of_inputs = _resampled(len(seeds), len(tasks), of_task, resamples)
    means = np.einsum("rs,vsr->vr", of_seeds, right @ of_inputs.T)
    individual = int(found.index[found["variant"] == "individual"][0])
    found["seeds"], found["inputs"] = len(seeds), of_task * len(tasks)
    found["retention"] = 100 * found["average"] / found["average"][individual]
    found[["low", "high"]] = np.percentile(100 * means / means[individual], [2.5, 97.5], axis=1).T
    found["closed"] = _closed(found)
    return found


def _oracles(rows: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """The oracle of each budget as a variant of its own."""
    for name, of in {ORACLE: BEST.name, OWN_ORACLE: OWN[0].name}.items():
        mine = rows[rows["variant"] == of]
        changes = {"variant": name, "average": mine["oracle"], "correct": mine["oracle_correct"], "right": 100.0}
        yield mine.assign(**changes)


def _resampled(seeds: int, tasks: int, inputs: int, resamples: int) -> tuple[np.ndarray, np.ndarray]:
    """How much each seed (resamples, seeds) and each input (resamples, tasks · inputs) counts."""
    generator = np.random.default_rng(0)
    of_seeds = generator.multinomial(seeds, np.full(seeds, 1 / seeds), resamples) / seeds
    of_inputs = [generator.multinomial(inputs, np.full(inputs, 1 / inputs), resamples) for _ in range(tasks)]
    return of_seeds, (np.concatenate(of_inputs, axis=1) / (tasks * inputs)).astype(np.float32)


def _closed(table: pd.DataFrame) -> pd.Series:
    """In percent, how much of the way from the paper's routing to the oracle of the same budget a variant goes."""
    of_budget = table.set_index(["variant", "budget"])["average"]
    return pd.Series(
        [
            100 * (row.average - paper) / (best - paper)
            if (paper := of_budget.get((PAPER.name, row.budget))) is not None
            and (best := of_budget.get((ORACLE, row.budget))) is not None
            and best > paper
            else None
            for row in table.itertuples()
        ],
        dtype=float,
    )


HEAD = """# Measurements of routing and budgets

Made by `python -m fusion_bench_smile.embedded.beyond FOLDER --report docs`; [what they say](routing.md). All numbers
are of test inputs, means over seeds of fine-tuning. Retention in percent of the individual models, with the 95 %
interval of the bootstrap over seeds and inputs; `routing_results.csv` has every row, with parameters and bytes.

![retention against parameters](images/routing.png)
""".splitlines()


def of_set(folder: Path, chosen: str, table: pd.DataFrame) -> Iterator[str]:
    """What is told of one set of experts."""
    yield from ["", f"## {TITLES[chosen][0].upper()}{TITLES[chosen][1:]}", ""]
    yield from [f"{table['seeds'].iloc[0]} seeds, {table['inputs'].iloc[0]} test inputs for each.", ""]
    rivals = table[table["variant"].isin(RIVALS)].set_index("variant").reindex(RIVALS).dropna(subset=["average"])
    yield from markdown_table(_named(rivals.assign(retention=_cells(rivals)), {"average": 1, "retention": 0}))
    yield from [
        "",
        "Retention in percent, of models with at most so many times the pretrained parameters (prototypes, less than",
        "1 % more, beside them):",
        "",
    ]
    budgets = table[table["budget"].notna()].assign(cell=lambda t: _cells(t))
    order = [name for name in (*VARIANTS, ORACLE, OWN_ORACLE) if name in set(budgets["variant"])]
    grid = budgets.pivot(index="variant", columns="budget", values="cell").reindex(order).fillna("")
    grid.columns = [f"{ratio:g}×" for ratio in grid.columns]
    yield from markdown_table(_named(grid, {}))
    yield from ["", "What the budgets bought, and the recommended variants:", ""]
    yield from markdown_table(_bought(budgets))
    yield from [
        "",
        "Inputs (tokens, where each is routed on its own) that get their task's expert, at 1.25×, in percent;",
    ]
    yield from [
        "accuracy where it is the right one, where it is another, and what the right one would have had there:",
        "",
    ]
    at = budgets[budgets["budget"] == SHOWN].set_index("variant")
    right = at.reindex([name for name in order if name in at.index and name not in (ORACLE, OWN_ORACLE)])
    digits = {"right": 1, "if_right": 1, "if_wrong": 1, "own_if_wrong": 1}
    yield from markdown_table(_named(right, digits))
    unknown = measured(folder, chosen, "unknown")
    if len(unknown):
        yield from [
            "",
            "Accuracy on inputs of a task whose expert is missing, for a model calibrated by 64 inputs of each other",
            f"task, at 1.5×, and the inputs that it refuses; {unknown['seed'].nunique()} seeds:",
            "",
        ]
        yield from markdown_table(_named(_unknown(unknown), dict.fromkeys(_unknown(unknown).columns, 1)))


def of_ideas(folder: Path, tables: Mapping[str, pd.DataFrame]) -> Iterator[str]:
    """Which scores find the expert of an input in two passes."""
    found = {chosen: table for chosen in tables if len(table := measured(folder, chosen, "ideas"))}
    if not found:
        return
    yield from [
        "",
        "## Scores",
        "",
        f"Inputs that find their task's expert in two passes, in percent, at {SHOWN:g}×; seeds: "
        + ", ".join(f"{chosen} {table['seed'].nunique()}" for chosen, table in found.items())
        + ":",
        "",
    ]
    ways = ["as it is", "against random inputs", "against all test inputs"]
    parts = []
    for chosen, table in found.items():
        means = table.groupby("score", sort=False)[ways].mean()
        parts.append(means.rename(columns=lambda way, chosen=chosen: f"{chosen}: {way}"))
    first = next(iter(found.values())).drop_duplicates("score").set_index("score")["what"]
    table = pd.concat(parts, axis=1)
    yield from markdown_table(_named(table, dict.fromkeys(table.columns, 1)))
    yield from ["", *(f"- *{score}*: {what}." for score, what in first.items() if what != "an option")]


def _unknown(table: pd.DataFrame) -> pd.DataFrame:
    columns = [c for c in table.columns if c not in ("held out", "set", "seed")]
    means = table.groupby("held out", sort=False)[columns].mean()
    means.loc["mean"] = means.mean()
    return means


def _bought(budgets: pd.DataFrame) -> pd.DataFrame:
    chosen = budgets[budgets["variant"].isin([PAPER.name, *(v.name for v in (*OWN, *INT8))])]
    columns = {"budget": "{:g}×", "ratio": "{:.3f}×", "bytes": "{:.3f}×", "gate_k": "{:.0f}", "closed": "{:.0f} %"}
    shown = {
        name: ["" if pd.isna(value) else form.format(value) for value in chosen[name]] for name, form in columns.items()
    }
    headings = {"ratio": "parameters", "closed": "of the gap to the oracle"}
    table = pd.DataFrame({"": list(chosen["variant"]), **shown, "allocation": list(chosen["allocation"])})
    return table.assign(retention=list(chosen["cell"])).rename(columns=headings)


def _cells(table: pd.DataFrame) -> list[str]:
    return [f"{r.retention:.1f} ({r.low:.1f}–{r.high:.1f})" for r in table.itertuples()]


def _named(table: pd.DataFrame, digits: Mapping[str, int]) -> pd.DataFrame:
    """As text, of the columns in `digits` (of all, if there are none), behind the index."""
    text = pd.DataFrame(index=table.index)
    for column in digits or table.columns:
        values = table[column]
        numbers = pd.api.types.is_numeric_dtype(values)
        text[column] = ["" if pd.isna(v) else f"{v:.{digits[column]}f}" if numbers else v for v in values]
    text.insert(0, "", [str(name) for name in table.index])
    return text


def retentions(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Retention against parameters, one panel for each set; hollow markers stand at the bytes of int8 factors."""
    columns = min(2, len(tables))
    lines = -(-len(tables) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(6.2 * columns, 4.4 * lines), squeeze=False, layout="constrained"
    )
    for axis, (chosen, table) in zip(axes.flat, tables.items(), strict=False):
        _panel(axis, table)
        axis.set(title=TITLES[chosen], xlabel="parameters (hollow: bytes), relative to the pretrained model")
        axis.set_ylabel("retention (% of the individual models)")
    for axis in axes.flat[len(tables) :]:
        axis.set_visible(False)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return figure


def _panel(axis: Axes, table: pd.DataFrame) -> None:
    for name, (color, marker) in zip(DRAWN, STYLES, strict=False):
        mine = table[table["variant"] == name].sort_values("ratio")
        dashed = "--" if name in (ORACLE, OWN_ORACLE) else "-"
        axis.plot(mine["ratio"], mine["retention"], dashed, color=color, marker=marker, label=name, zorder=3)
        axis.fill_between(mine["ratio"], mine["low"], mine["high"], color=color, alpha=0.12, linewidth=0)
    small = table[table["variant"] == INT8[-1].name]
    color, marker = STYLES[DRAWN.index(OWN[-1].name)]
    axis.scatter(small["bytes"], small["retention"], s=45, facecolors="none", edgecolors=color, marker=marker,
                 label=f"{INT8[-1].name} (bytes)", zorder=4)  # fmt: skip
    for name, style in zip(
        ("AdaMerging", "TIES", "Task Arithmetic", "pretrained"), (":", "-.", "--", "-"), strict=True
    ):
        level = table.loc[table["variant"] == name, "retention"]
        if len(level):
            axis.axhline(level.iloc[0], color="0.6", linestyle=style, linewidth=1, label=name, zorder=1)
    largest = table.loc[table["budget"].notna(), "ratio"].max() + 0.05  # small ranks can't spend large budgets
    shown = [ratio for ratio in RATIOS if ratio <= largest]
    axis.set_xticks(shown, [f"{ratio:g}×" for ratio in shown])
    axis.grid(alpha=0.3)


def of_layers(folder: Path, tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Each layer's share of right choices at 1.25×, of the variants that choose layer by layer."""
    figure, axes = plt.subplots(len(tables), 1, figsize=(12, 3.4 * len(tables)), squeeze=False, layout="constrained")
    for axis, chosen in zip(axes[:, 0], tables, strict=True):
        rows = measured(folder, chosen)
        rows = rows[(rows["budget"] == SHOWN) & rows["variant"].isin(VARIANTS)]
        shares = {name: _layer_shares(group) for name, group in rows.groupby("variant", sort=False)}
        width = max(len(values) for values in shares.values())
        grid = np.stack([np.broadcast_to(values, width) for values in shares.values()])
        image = axis.imshow(grid, aspect="auto", cmap="cividis", vmin=0, vmax=100)
        axis.set_yticks(range(len(shares)), list(shares), fontsize=6)
        axis.set(title=TITLES[chosen], xlabel="routed layer, in the order of the model")
        figure.colorbar(image, ax=axis, label="right choices (%)")
    return figure


def _layer_shares(group: pd.DataFrame) -> Sequence[float] | np.ndarray:
    if group["layers"].isna().any():  # one choice for all layers
        return np.array([group["right"].mean()])
    return np.mean([[float(value) for value in text.split()] for text in group["layers"]], axis=0)
