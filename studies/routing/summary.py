"""The summary of all seeds: means, retention with bootstrap intervals, and the closed gap to oracle routing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pandas as pd

from smile_zoo import images, text
from studies.routing.stored_tables import unpack_bits
from studies.routing.variants import PAPER, TWO_PASS, ZERO_SHOT

ORACLE, ORACLE_WITH_NORMS = "oracle routing", "oracle routing, expert norms"
NUM_RESAMPLES = 2000
MEANS = ("ratio", "bytes", "average", "right", "if_right", "if_wrong", "own_if_wrong")  # columns of the stored tables


def summarize(rows: pd.DataFrame, num_resamples: int = NUM_RESAMPLES) -> pd.DataFrame:
    """One row for each variant and budget.

    Args:
        rows: The stored rows of all seeds; see `stored_tables.read_accuracies`.
        num_resamples: Number of bootstrap samples.

    Returns:
        Means over seeds; ``retention`` in percent with its 95 % interval ``low`` to ``high``; ``closed``, the share in
        percent of the gap between the paper's routing and oracle routing at the same budget; the number of ``seeds``
        and of ``inputs``. The bootstrap resamples seeds, and the inputs of each task, alike for all variants.
    """
    if not len(rows):
        return rows
    rows = pd.concat([rows, *_oracle_rows(rows)])
    tasks = [column for column in rows if column in (*images.TASKS, *text.TASKS)]
    groups = rows.groupby(["variant", "budget"], dropna=False, sort=False)
    summary = groups[[*(column for column in MEANS if column in rows), *tasks]].mean().reset_index()
    summary = summary.merge(groups[["gate_k", "allocation"]].first().reset_index(), on=["variant", "budget"])
    correct = _correct(groups, len(tasks))
    individual = int(summary.index[summary["variant"] == "individual"][0])
    summary["seeds"], summary["inputs"] = correct.shape[1:]
    summary["retention"] = 100 * summary["average"] / summary["average"][individual]
    accuracies = _bootstrap(correct, len(tasks), num_resamples)
    intervals = np.percentile(100 * accuracies / accuracies[individual], [2.5, 97.5], axis=1)
    summary[["low", "high"]] = intervals.T
    summary["closed"] = _closed_gap(summary)
    return summary


def _oracle_rows(rows: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """Oracle routing at each budget, as further variants."""
    for name, variant in {ORACLE: TWO_PASS, ORACLE_WITH_NORMS: ZERO_SHOT}.items():
        selected = rows[rows["variant"] == variant.name]
        changes = {"average": selected["oracle"], "correct": selected["oracle_correct"], "right": 100.0}
        yield selected.assign(variant=name, **changes)


def _correct(groups: Iterable[tuple[Any, pd.DataFrame]], num_tasks: int) -> np.ndarray:
    """Whether each input is classified correctly, from the rows of each variant: (variants, seeds, inputs), float32."""
    flags = [np.stack([unpack_bits(c) for c in group.sort_values("seed")["correct"]]) for _, group in groups]
    correct = np.stack(flags)
    num_inputs = correct.shape[-1] // num_tasks * num_tasks  # without the zeros at the end
    return correct[..., :num_inputs].astype(np.float32)


def _bootstrap(correct: np.ndarray, num_tasks: int, num_resamples: int) -> np.ndarray:
    """Mean accuracies (variants, resamples) of resampled seeds and inputs of each task."""
    _, num_seeds, num_inputs = correct.shape
    generator, per_task = np.random.default_rng(0), num_inputs // num_tasks
    seeds = generator.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), num_resamples) / num_seeds
    inputs = [generator.multinomial(per_task, np.full(per_task, 1 / per_task), num_resamples) for _ in range(num_tasks)]
    weights = (np.concatenate(inputs, axis=1) / num_inputs).astype(np.float32)  # (resamples, inputs)
    return np.einsum("rs,vsr->vr", seeds, correct @ weights.T)


def _closed_gap(summary: pd.DataFrame) -> pd.Series:
    """The share of the gap between the paper's routing and oracle routing that a variant closes, in percent."""
    averages = summary.set_index(["variant", "budget"])["average"]
    shares = []
    for row in summary.itertuples():
        paper, oracle = (averages.get((name, row.budget)) for name in (PAPER.name, ORACLE))
        has_gap = paper is not None and oracle is not None and oracle > paper
        shares.append(100 * (row.average - paper) / (oracle - paper) if has_gap else None)
    return pd.Series(shares, dtype=float)
