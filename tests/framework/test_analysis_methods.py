"""All studies through the framework's command line, on one batch of three tasks of the embedded benchmark."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from command_line import fusion_bench

from smile_zoo.images import TASKS as ALL_TASKS

pytestmark = pytest.mark.cli

PICTURES = {
    "subspace_energy": ["subspace_energy"],
    "projection_merging": ["projection_merging"],
    "explained_variance": ["explained_variance"],
    "routing": ["routing_confusion", "routing_layers", "routing_tokens"],
    "error_accumulation": ["error_accumulation"],
    "ablations": ["ablations"],
    "cost": ["cost"],
}
POOLS = ("modelpool=SmileEmbedded/gentle", "taskpool=SmileEmbedded/test")
TASKS = ("digits", "textures", "planets")
OTHERS = [
    f"~{place}.{task}"
    for task in ALL_TASKS
    if task not in TASKS
    for place in ("modelpool.models", "taskpool.test_datasets")
]


@pytest.fixture(scope="module")
def studied(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("studies")
    completed = fusion_bench(
        "+experiment=smile_analysis",
        *POOLS,
        *OTHERS,
        "fast_dev_run=true",
        "taskpool.dataloader_kwargs.batch_size=25",
        cwd=folder,
    )
    assert completed.returncode == 0, completed.stderr[-3000:]
    return folder / "outputs" / "analysis"


def test_every_study_leaves_tables_and_pictures(studied):
    def table(study: str, name: str, **options) -> pd.DataFrame:
        (file,) = studied.glob(f"*smile_analysis-{study},*/{name}.csv")
        return pd.read_csv(file, **options)

    for study, pictures in PICTURES.items():
        for picture in pictures:
            for ending in ("png", "svg"):
                (file,) = studied.glob(f"*smile_analysis-{study},*/{picture}.{ending}")
                assert file.stat().st_size > 5000
    shares = table("subspace_energy", "subspace_energy")
    assert len(shares) == 24 * len(TASKS)
    assert shares[["I", "II", "II+III"]].apply(lambda column: column.between(0, 1)).all(axis=None)
    projection = table("projection_merging", "projection_merging", index_col=0)
    assert list(projection.index) == ["pretrained", "zone I", "zone II", "zone II+III", "fine-tuned"]
    assert projection.loc["fine-tuned", "average"] > projection.loc["pretrained", "average"]
    advice = table("explained_variance", "recommendation").iloc[0]
    assert 0.95 <= advice["kept"] <= 1
    assert 1 <= advice["k"] <= 16
    confusion = table("routing", "routing_confusion", index_col=0)
    assert list(confusion.index) == list(confusion.columns) == list(TASKS)
    np.testing.assert_allclose(confusion.sum(axis=1), 1, atol=1e-6)
    assert np.diag(confusion).mean() > 2 / len(TASKS)  # far better than chance
    errors = table("error_accumulation", "error_accumulation").groupby("model")["error"].mean()
    assert errors["oracle routing"] < errors["SMILE"] < errors["pretrained"]
    ablations = table("ablations", "ablations", index_col=0)
    assert len(ablations) == 1 + 1 + len(TASKS) + 3 + 3  # top_k=4 and 8 need more experts
    assert ablations.loc["oracle routing", "average"] > ablations.loc["SMILE", "average"]
    for task in TASKS:
        assert ablations.loc[f"without {task}", task] <= ablations.loc["individual models", task]
    cost = table("cost", "cost")
    assert (cost["parameters"] > 1).all()
    assert cost[cost["experts"] == 1]["parameters"].item() < cost[cost["experts"] == 3]["parameters"].max()


def test_a_study_that_needs_inputs_says_so(tmp_path):
    completed = fusion_bench(
        "+experiment=smile_run", "method=smile_analysis/routing", POOLS[0], "taskpool=dummy", cwd=tmp_path
    )
    assert completed.returncode != 0
    assert "the task pool has no task of the expert 'digits'" in completed.stderr.strip().splitlines()[-1]
