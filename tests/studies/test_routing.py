"""The study of routing and budgets: offline decisions are those of models, and the tables add up."""

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

from fusion_bench_smile import FactorCache, as_expert, calibrate, record_choices, upscale
from fusion_bench_smile.construction import random_inputs
from fusion_bench_smile.nn import layers_with_router, routing_weights
from studies.routing import baselines, first_pass, model_selection, report, variants
from studies.routing.__main__ import main
from studies.routing.alternative_scores import DESCRIPTIONS
from studies.routing.benchmarks import Batch, Benchmark
from studies.routing.evaluation import Evaluator, evaluate_router
from studies.routing.expert_identification import score_rows
from studies.routing.first_pass import FirstPasses, inputs_of, run_first_pass
from studies.routing.labels import label_of
from studies.routing.model_selection import select_options
from studies.routing.models import build_model
from studies.routing.out_of_distribution import held_out_rows
from studies.routing.stored_tables import pack_bits, read_accuracies, tables_folder, unpack_bits
from studies.routing.summary import ORACLE, ORACLE_WITH_NORMS, summarize
from studies.routing.variant_accuracy import merging_rows, variant_rows
from studies.routing.variants import (
    EXTENSIONS,
    INT8,
    PAPER,
    SCOPES_AND_SCORES,
    TWO_PASS,
    VARIANTS,
    ZERO_SHOT,
    RankOptions,
    Variant,
)

COUNT = 10


class SmallBenchmark(Benchmark):
    """Three tasks of images that differ in brightness; the class is the brighter one of two pixels."""

    tasks = ("digits", "clothes", "animals")
    counts = MappingProxyType({"train": 64, "validation": COUNT, "test": COUNT})

    def __init__(self, root: Path) -> None:
        super().__init__(root, "gentle", 0)
        torch.manual_seed(0)
        self.base = clip_tower()
        self.tuned = dict(zip(self.tasks, experts_of(self.base, scale=0.1), strict=True))

    def pretrained(self) -> nn.Module:
        return copy.deepcopy(self.base)  # the framework's methods freeze the models of their pool

    def expert(self, task: str) -> nn.Module:
        return copy.deepcopy(self.tuned[task])

    def batches(self, task: str, split: str) -> list[Batch]:
        number, count = self.tasks.index(task), self.counts[split]
        generator = torch.Generator().manual_seed(100 * len(split) + number)
        pixels = torch.randn(count, 3, 28, 28, generator=generator) + number
        size = 5 if count == COUNT else 32  # several batches, also small ones
        labels = (pixels[:, 0, 3, 3] > pixels[:, 0, 20, 20]).long()
        return [({"pixel_values": x}, y) for x, y in zip(pixels.split(size), labels.split(size), strict=True)]

    def logits(self, model: nn.Module, batch: dict[str, Tensor], task: str) -> Tensor:
        return model(**batch).pooler_output[:, :2]


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SmallBenchmark:
    for module in (model_selection, variants):
        monkeypatch.setattr(module, "MAX_RANK", {"gentle": 12})
    monkeypatch.setattr(model_selection, "BUDGETS", (1.9,))
    monkeypatch.setattr(model_selection, "GATE_RANKS", (1,))
    monkeypatch.setattr(first_pass, "NUM_INPUTS", 64)
    monkeypatch.setattr(baselines, "SCALING_FACTORS", {"Task Arithmetic": (0.3,), "TIES": (0.3,)})
    monkeypatch.setitem(baselines.ADAMERGING, "max_steps", 1)
    return SmallBenchmark(tmp_path)


OPTIONS = {"k": 8, "gate_k": 4, "routing_scope": "two_pass"}


@pytest.fixture(scope="module")
def first_passes(tmp_path_factory: pytest.TempPathFactory) -> FirstPasses:
    small = SmallBenchmark(tmp_path_factory.mktemp("small"))
    return FirstPasses.run(small, upscale(small.base, small.tuned, **OPTIONS))


TWO_PASS_VARIANTS = [variant for variant in [*SCOPES_AND_SCORES, *EXTENSIONS] if variant.scope == "two_pass"]


@pytest.mark.parametrize("variant", TWO_PASS_VARIANTS, ids=lambda variant: variant.name)
def test_weights_from_first_passes_are_the_choice_of_the_model(
    small: SmallBenchmark, first_passes: FirstPasses, variant: Variant
) -> None:
    weights = first_passes.expert_weights(variant)
    routing = {"routing_score": variant.score, "top_k": variant.top_k, "noise_baseline": variant.noise_baseline}
    model = upscale(small.base, small.tuned, **routing, **OPTIONS)
    if variant.calibration:
        training = {t: torch.cat([b["pixel_values"] for b, _ in small.batches(t, "train")]) for t in small.tasks}
        calibrate(model, {t: [{"pixel_values": pixels[: variant.calibration]}] for t, pixels in training.items()})
    with torch.no_grad(), record_choices(model) as calls:
        for batch in inputs_of(small, "test"):
            model(**batch)
    choices = torch.cat([state.choice for state in calls])
    torch.testing.assert_close(weights, choices, atol=1e-4, rtol=1e-4)


def test_an_evaluator_runs_the_given_experts(small: SmallBenchmark) -> None:
    cache = FactorCache(small.root / "factor_cache")
    model = build_model(small, small.tuned, RankOptions(1.9, 2, "uniform"), EXTENSIONS[0], cache)
    evaluator = Evaluator(small, model, "test")
    single = {}
    for task in small.tasks:
        with as_expert(model, task):
            single[task] = evaluate_router(small, model, "test")[0]
    for number, task in enumerate(small.tasks):
        assert torch.equal(evaluator.correct(torch.eye(3)[[number] * 3 * COUNT]), single[task])
    mixed = torch.arange(3 * COUNT) % 3
    expected = torch.stack(list(single.values()), dim=1).gather(1, mixed[:, None])[:, 0]
    assert torch.equal(evaluator.correct(torch.eye(3)[mixed]), expected)
    tasks = [task for task in small.tasks for _ in range(10)]
    assert evaluator.oracle().tolist() == [single[task][index].item() for index, task in enumerate(tasks)]
    # with weights, as the model itself has them
    routed = evaluate_router(small, model, "test")[0]
    weights = FirstPasses.run(small, model).expert_weights(EXTENSIONS[0])
    assert (weights > 0).sum(dim=1).eq(2).all()
    assert torch.equal(evaluator.correct(weights), routed)


def test_alternative_scores_are_scores_of_each_input_and_layer(small: SmallBenchmark) -> None:
    layers = layers_with_router(upscale(small.base, small.tuned, k=8, gate_k=4, routing_scope="two_pass"))
    inputs = inputs_of(small, "test")
    result = run_first_pass(small.base, layers, inputs, with_alternatives=True)
    num_layers = result.features.shape[1] // 6
    for name in DESCRIPTIONS:
        assert result.scores[name].shape == (num_layers, 3 * COUNT, 3)
        assert result.scores[name].isfinite().all()
        assert (result.scores[name] >= 0).all()
    backwards = run_first_pass(small.base, layers, reversed(inputs), with_alternatives=True)
    torch.testing.assert_close(backwards.combined_scores("dual")[:5], result.combined_scores("dual")[-5:])
    # where no direction is shared by two experts, none of the bases changes anything but scale
    images = random_inputs(small.base, 4, torch.Generator().manual_seed(1))
    two_experts = list(small.tuned.values())[:2]
    layers = layers_with_router(upscale(small.base, two_experts, k=1, gate_k=1, routing_scope="two_pass"))
    few = run_first_pass(small.base, layers, [images], with_alternatives=True)
    assert (few.combined_scores("dual").argmax(-1) == few.combined_scores("relative").argmax(-1)).all()


@pytest.fixture
def tables(small: SmallBenchmark) -> tuple[Path, pd.DataFrame]:
    cache, folder = FactorCache(small.root / "factor_cache"), tables_folder(small.root)
    folder.mkdir()
    options = select_options(small, cache)
    assert [ranks["ratio"] for ranks in options["ours"]] == [1.9]
    paper, two_pass = ([RankOptions(**values) for values in options[name]] for name in ("paper", "ours"))
    for seed in (0, 1):
        measured = {
            "rows": variant_rows(small, paper, two_pass, cache), "merged": merging_rows(small, options["scaling"]),
            "ideas": score_rows(small, two_pass[0], cache), "unknown": held_out_rows(small, two_pass[0], cache),
        }  # fmt: skip
        for name, rows in measured.items():
            table = pd.DataFrame(rows).assign(set="gentle", seed=seed)
            table.to_csv(folder / f"gentle-{seed}-{name}.csv", index=False)
    return folder, summarize(read_accuracies(folder, "gentle"), num_resamples=50)


def test_the_whole_study_in_small(
    small: SmallBenchmark, tables: tuple[Path, pd.DataFrame], monkeypatch, tmp_path: Path
) -> None:
    _, table = tables
    by_variant = table[table["budget"] == 1.9].set_index("variant")
    assert set(by_variant.index) == {variant.name for variant in VARIANTS} | {ORACLE, ORACLE_WITH_NORMS}
    zero_shot = by_variant.drop(index=[name for name in by_variant.index if "calibrated" in name or "noise" in name])
    assert zero_shot["ratio"].max() <= 1.9
    assert by_variant.loc[INT8[0].name, "bytes"] < 0.6 * by_variant.loc[ZERO_SHOT.name, "bytes"] + 0.4
    assert table.set_index("variant").loc["individual", "retention"] == pytest.approx(100)
    # with all ranks and the right expert, only changes outside the layers are lost
    assert by_variant.loc[ORACLE, "average"] == pytest.approx(oracle_accuracy(small, by_variant))
    monkeypatch.setattr(report, "BUDGET", 1.9)
    (tmp_path / "images").mkdir()
    monkeypatch.setattr("sys.argv", ["routing", str(small.root), "--report", str(tmp_path)])
    main()
    text = (tmp_path / "routing_results.md").read_text()
    assert all(label_of(name) in text for name in by_variant.index)
    assert "| held out" not in text  # the index has no heading
    assert {"digits", "clothes", "animals", "mean"} <= set(text.replace("|", " ").split())
    written = pd.read_csv(tmp_path / "routing_results.csv")
    assert len(written) == len(table)
    assert all((tmp_path / "images" / f"{name}.png").stat().st_size > 10_000 for name in ("routing", "routing_layers"))


@pytest.mark.parametrize(
    ("arguments", "message"), [(["{}", "lorra"], "no set 'lorra'"), (["{}/missing"], "missing is no folder")]
)
def test_the_command_refuses_bad_arguments(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr("sys.argv", ["routing", *(argument.format(tmp_path) for argument in arguments)])
    with pytest.raises(SystemExit):
        main()
    assert message in capsys.readouterr().err


def oracle_accuracy(small: SmallBenchmark, by_variant: pd.DataFrame) -> float:
    row = by_variant.loc[TWO_PASS.name]
    ranks = RankOptions(1.9, int(row["gate_k"]), row["allocation"])
    model = build_model(small, small.tuned, ranks, TWO_PASS, None)
    accuracies = []
    for task in small.tasks:
        with as_expert(model, task):
            accuracies.append(small.correct(model, task, "test").float().mean().item())
    return 100 * sum(accuracies) / 3


def test_intervals_are_of_seeds_and_inputs() -> None:
    generator = np.random.default_rng(0)
    tasks = ("digits", "clothes")

    def row(variant: str, seed: int, chance: float, budget: float | None = None) -> dict[str, object]:
        flags = torch.tensor(generator.random(80) < chance)
        accuracies = 100 * flags.view(2, 40).float().mean(dim=1)
        packed = pack_bits(flags)
        assert unpack_bits(packed).astype(bool).tolist() == flags.tolist()
        by_task = dict(zip(tasks, accuracies.tolist(), strict=True))
        more = {"budget": budget, "gate_k": 1, "allocation": "gain", "oracle": 90.0, "oracle_correct": packed}
        average = accuracies.mean().item()
        return {"variant": variant, "seed": seed, "average": average, "correct": packed, **by_task, **more}

    rows = [row("individual", seed, 0.9) for seed in range(3)]
    rows += [row(name, s, p, 1.5) for s in range(3) for name, p in ((PAPER.name, 0.5), (TWO_PASS.name, 0.7))]
    table = summarize(pd.DataFrame(rows), num_resamples=400).set_index("variant")
    for name, share in ((PAPER.name, 5 / 9), (TWO_PASS.name, 7 / 9)):
        assert table.loc[name, "low"] < table.loc[name, "retention"] < table.loc[name, "high"]
        assert table.loc[name, "low"] < 100 * share < table.loc[name, "high"]
        assert table.loc[name, "high"] - table.loc[name, "low"] < 30
    assert table.loc["individual", ["low", "high"]].tolist() == [100, 100]
    assert table.loc[PAPER.name, "closed"] == 0
    gain = table.loc[TWO_PASS.name, "average"] - table.loc[PAPER.name, "average"]
    assert table.loc[TWO_PASS.name, "closed"] == pytest.approx(100 * gain / (90 - table.loc[PAPER.name, "average"]))


def test_weights_of_scores() -> None:
    weights = routing_weights(torch.tensor([[0.0, 2.0, 1.0]]), 2)
    torch.testing.assert_close(weights, torch.tensor([[0.0, 0.7310586, 0.2689414]]))


def test_the_stored_measurements_can_be_summarized() -> None:
    folder = tables_folder(Path(__file__).parents[2] / "studies" / "measurements")
    table = summarize(read_accuracies(folder, "lora"), num_resamples=50).set_index("variant")
    assert {variant.name for variant in VARIANTS} <= set(table.index)
    assert table.loc["pretrained", "retention"] == pytest.approx(94.6, abs=0.05)  # of docs/routing_results.md
