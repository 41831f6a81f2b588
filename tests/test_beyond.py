"""The study of routing and budgets: what it decides offline is what models decide, and its tables add up."""

from __future__ import annotations

import copy
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import clip_tower, experts_of
from torch import Tensor, nn

from fusion_bench_smile import as_expert, calibrate, upscale
from fusion_bench_smile.embedded.beyond import choices, models, report, rivals, rows, variants
from fusion_bench_smile.embedded.beyond.__main__ import main
from fusion_bench_smile.embedded.beyond.benches import Bench
from fusion_bench_smile.embedded.beyond.finding import of_scores
from fusion_bench_smile.embedded.beyond.judge import Judge, run
from fusion_bench_smile.embedded.beyond.looks import IDEAS, look
from fusion_bench_smile.embedded.beyond.models import Seen, bare, build
from fusion_bench_smile.embedded.beyond.unknown import of_held_out
from fusion_bench_smile.embedded.beyond.variants import BEST, GRID, INT8, MORE, OWN, PAPER, Ranks, Variant
from fusion_bench_smile.noise import random_inputs
from fusion_bench_smile.scopes import ROUTER, shares
from fusion_bench_smile.store import FactorStore

COUNT = 10


class Small(Bench):
    """Three tasks of images that differ in brightness; a class is whichever of two pixels is brighter."""

    tasks = ("digits", "clothes", "animals")
    counts = MappingProxyType({"train": 64, "validation": COUNT, "test": COUNT})

    def __init__(self, root: Path) -> None:
        super().__init__(root, "gentle", 0)
        torch.manual_seed(0)
        self.base = clip_tower()
        self.tuned = dict(zip(self.tasks, experts_of(self.base, scale=0.1), strict=True))

    def pretrained(self) -> nn.Module:
        return copy.deepcopy(self.base)  # the framework's methods freeze what they are given

    def expert(self, task: str) -> nn.Module:
        return copy.deepcopy(self.tuned[task])

    def batches(self, task: str, split: str) -> list[tuple[dict[str, Tensor], Tensor]]:
        number, count = self.tasks.index(task), self.counts[split]
        generator = torch.Generator().manual_seed(100 * len(split) + number)
        pixels = torch.randn(count, 3, 28, 28, generator=generator) + number
        size = 5 if count == COUNT else 32  # several batches, also small ones
        labels = (pixels[:, 0, 3, 3] > pixels[:, 0, 20, 20]).long()
        return [({"pixel_values": x}, y) for x, y in zip(pixels.split(size), labels.split(size), strict=True)]

    def logits(self, model: nn.Module, batch: dict[str, Tensor], task: str) -> Tensor:
        return model(**batch).pooler_output[:, :2]


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Small:
    for module in (choices, variants):
        monkeypatch.setattr(module, "LARGEST_RANK", {"gentle": 12})
    monkeypatch.setattr(choices, "RATIOS", (1.9,))
    monkeypatch.setattr(choices, "GATES", (1,))
    monkeypatch.setattr(models, "INPUTS", 64)
    monkeypatch.setattr(rivals, "SCALING", {"Task Arithmetic": (0.3,), "TIES": (0.3,)})
    monkeypatch.setitem(rivals.ADAMERGING, "max_steps", 1)
    return Small(tmp_path)


def inputs(small: Small, split: str) -> list[dict[str, Tensor]]:
    return [batch for task in small.tasks for batch, _ in small.batches(task, split)]


OPTIONS = {"k": 8, "gate_k": 4, "routing_scope": "two_pass"}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    small = Small(tmp_path_factory.mktemp("small"))
    return Seen.by(small, upscale(small.base, small.tuned, **OPTIONS))


@pytest.mark.parametrize("variant", [v for v in [*GRID, *MORE] if v.scope == "two_pass"], ids=lambda v: v.name)
def test_what_is_decided_of_looks_is_what_the_model_decides(small: Small, seen: Seen, variant: Variant) -> None:
    weights = seen.test.decided(variant, seen.neutral, seen.calibration)
    how = {"routing_score": variant.score, "top_k": variant.top_k, "noise_baseline": variant.noise}
    model = upscale(small.base, small.tuned, **how, **OPTIONS)
    if variant.inputs:
        training = {t: torch.cat([b["pixel_values"] for b, _ in small.batches(t, "train")]) for t in small.tasks}
        calibrate(model, {t: [{"pixel_values": pixels[: variant.inputs]}] for t, pixels in training.items()})
    found = []
    with torch.no_grad():
        for batch in inputs(small, "test"):
            model(**batch)
            found.append(model.get_submodule(ROUTER).choice)
    torch.testing.assert_close(weights, torch.cat(found), atol=1e-4, rtol=1e-4)


def test_a_judge_runs_the_experts_that_it_is_given(small: Small) -> None:
    model = build(small, small.tuned, Ranks(1.9, 2, "uniform"), MORE[0], FactorStore(small.root / "store"))
    judge = Judge(small, model, "test")
    alone = {}
    for task in small.tasks:
        with as_expert(model, task):
            alone[task] = run(small, model, "test")[0]
    for number, task in enumerate(small.tasks):
        assert torch.equal(judge.correct(torch.eye(3)[[number] * 3 * COUNT]), alone[task])
    mixed = torch.arange(3 * COUNT) % 3
    expected = torch.stack(list(alone.values()), dim=1).gather(1, mixed[:, None])[:, 0]
    assert torch.equal(judge.correct(torch.eye(3)[mixed]), expected)
    assert judge.oracle().tolist() == [
        alone[t][i].item() for i, t in enumerate(t for t in small.tasks for _ in range(10))
    ]
    # with weights, as the model itself has them
    free = run(small, model, "test")[0]
    weights = look(bare(model), inputs(small, "test"), 3).decided(MORE[0], None, [])
    assert (weights > 0).sum(dim=1).eq(2).all()
    assert torch.equal(judge.correct(weights), free)


def test_ideas_are_scores_of_each_input_and_layer(small: Small) -> None:
    alone = bare(upscale(small.base, small.tuned, k=8, gate_k=4, routing_scope="two_pass"))
    seen = look(alone, inputs(small, "test"), 3, with_ideas=True)
    layers = seen.features.shape[1] // 6
    for name in IDEAS:
        assert seen.scores[name].shape == (layers, 3 * COUNT, 3)
        assert seen.scores[name].isfinite().all()
        assert (seen.scores[name] >= 0).all()
    apart = look(alone, reversed(inputs(small, "test")), 3, with_ideas=True)
    torch.testing.assert_close(apart.total("dual")[:5], seen.total("dual")[-5:])
    # where no direction is shared by two experts, none of the bases changes anything but scale
    images = random_inputs(small.base, 4, torch.Generator().manual_seed(1))
    one = bare(upscale(small.base, list(small.tuned.values())[:2], k=1, gate_k=1, routing_scope="two_pass"))
    few = look(one, [images], 2, with_ideas=True)
    assert (few.total("dual").argmax(-1) == few.total("relative").argmax(-1)).all()


@pytest.fixture
def tables(small: Small) -> tuple[Path, pd.DataFrame]:
    store, folder = FactorStore(small.root / "store"), small.root / "beyond"
    folder.mkdir()
    found = choices.choices(small, store)
    assert [ranks["ratio"] for ranks in found["ours"]] == [1.9]
    paper, ours = ([Ranks(**values) for values in found[name]] for name in ("paper", "ours"))
    for seed in (0, 1):
        made = {
            "rows": rows.of_variants(small, paper, ours, store), "merged": rows.of_merged(small, found["scaling"]),
            "ideas": of_scores(small, ours[0], store), "unknown": of_held_out(small, ours[0], store),
        }  # fmt: skip
        for name, table in made.items():
            whole = pd.DataFrame(table).assign(set="gentle", seed=seed)
            whole.to_csv(folder / f"gentle-{seed}-{name}.csv", index=False)
    return folder, report.with_intervals(report.everything_of(folder, "gentle"), resamples=50)


def test_the_whole_study_in_small(small: Small, tables: tuple[Path, pd.DataFrame], monkeypatch, tmp_path: Path) -> None:
    _, table = tables
    of_budget = table[table["budget"] == 1.9].set_index("variant")
    assert set(of_budget.index) == {v.name for v in (PAPER, *GRID, *MORE, *OWN, *INT8)} | {
        report.ORACLE, report.OWN_ORACLE,
    }  # fmt: skip
    zero_shot = of_budget.drop(index=[name for name in of_budget.index if "calibrated" in name or "noise" in name])
    assert zero_shot["ratio"].max() <= 1.9
    assert of_budget.loc[INT8[0].name, "bytes"] < 0.6 * of_budget.loc[OWN[0].name, "bytes"] + 0.4
    assert table.set_index("variant").loc["individual", "retention"] == pytest.approx(100)
    # with all ranks and the right expert, what is lost is what belongs to no layer
    right = judged_by_hand(small, of_budget)
    assert of_budget.loc[report.ORACLE, "average"] == pytest.approx(right)
    monkeypatch.setattr(report, "SHOWN", 1.9)
    (tmp_path / "images").mkdir()
    monkeypatch.setattr("sys.argv", ["beyond", str(small.root), "--report", str(tmp_path)])
    main()
    text = (tmp_path / "routing_results.md").read_text()
    assert all(name in text for name in of_budget.index)
    assert "| held out" not in text  # the index has no heading
    assert {"digits", "clothes", "animals", "mean"} <= set(text.replace("|", " ").split())
    written = pd.read_csv(tmp_path / "routing_results.csv")
    assert len(written) == len(table)
    assert all((tmp_path / "images" / f"{name}.png").stat().st_size > 10_000 for name in ("routing", "routing_layers"))


@pytest.mark.parametrize(
    ("arguments", "message"), [(["{}", "lorra"], "no set 'lorra'"), (["{}/missing"], "missing is no folder")]
)
def test_the_command_says_what_is_wrong(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr("sys.argv", ["beyond", *(argument.format(tmp_path) for argument in arguments)])
    with pytest.raises(SystemExit):
        main()
    assert message in capsys.readouterr().err


def judged_by_hand(small: Small, of_budget: pd.DataFrame) -> float:
    row = of_budget.loc[BEST.name]
    ranks = Ranks(1.9, int(row["gate_k"]), row["allocation"])
    model = build(small, small.tuned, ranks, BEST, None)
    shares = []
    for task in small.tasks:
        with as_expert(model, task):
            shares.append(small.correct(model, task, "test").float().mean().item())
    return 100 * sum(shares) / 3


def test_intervals_are_of_seeds_and_inputs() -> None:
    generator = np.random.default_rng(0)
    tasks = ("digits", "clothes")

    def row(variant: str, seed: int, chance: float, budget: float | None = None) -> dict[str, object]:
        flags = torch.tensor(generator.random(80) < chance)
        shares = 100 * flags.view(2, 40).float().mean(dim=1)
        packed = rows.packed(flags)
        assert report.flags(packed).astype(bool).tolist() == flags.tolist()
        each = dict(zip(tasks, shares.tolist(), strict=True))
        more = {"budget": budget, "gate_k": 1, "allocation": "gain", "oracle": 90.0, "oracle_correct": packed}
        return {"variant": variant, "seed": seed, "average": shares.mean().item(), "correct": packed, **each, **more}

    made = [row("individual", seed, 0.9) for seed in range(3)]
    made += [row(name, s, p, 1.5) for s in range(3) for name, p in ((PAPER.name, 0.5), (BEST.name, 0.7))]
    table = report.with_intervals(pd.DataFrame(made), resamples=400).set_index("variant")
    for name, share in ((PAPER.name, 5 / 9), (BEST.name, 7 / 9)):
        assert table.loc[name, "low"] < table.loc[name, "retention"] < table.loc[name, "high"]
        assert table.loc[name, "low"] < 100 * share < table.loc[name, "high"]
        assert table.loc[name, "high"] - table.loc[name, "low"] < 30
    assert table.loc["individual", ["low", "high"]].tolist() == [100, 100]
    assert table.loc[PAPER.name, "closed"] == 0
    gap = (table.loc[BEST.name, "average"] - table.loc[PAPER.name, "average"]) / (90 - table.loc[PAPER.name, "average"])
    assert table.loc[BEST.name, "closed"] == pytest.approx(100 * gap)


def test_weights_of_scores() -> None:
    weights = shares(torch.tensor([[0.0, 2.0, 1.0]]), 2)
    torch.testing.assert_close(weights, torch.tensor([[0.0, 0.7310586, 0.2689414]]))
