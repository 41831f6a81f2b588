"""How far routing and ranks go beyond the paper's: every scope and score, at every budget, on experts of several seeds.

python -m fusion_bench_smile.embedded.build.seeds FOLDER --benchmark images   # and text: makes the experts
python -m fusion_bench_smile.embedded.beyond FOLDER gentle strong full lora   # measures; what is there is kept
python -m fusion_bench_smile.embedded.beyond FOLDER --report docs             # tables and the figure

gate_k and allocation of each budget are chosen on validation inputs of the first seed; all else is of test inputs.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, cast, get_args

import pandas as pd
import torch
from fusion_bench.method.task_arithmetic import TaskArithmeticAlgorithm
from fusion_bench.method.ties_merging.ties_merging import TiesMergingAlgorithm
from fusion_bench.modelpool.base_pool import BaseModelPool
from torch import Tensor, nn
from transformers import CLIPVisionModel

from ..analysis.cost import parameters_of
from ..budget import Allocation
from ..calibration import calibrate
from ..config import SmileConfig
from ..errors import ConfigError
from ..layers import Routed, Score
from ..oracle import as_expert
from ..report import write_whole
from ..scopes import ROUTER, InputRouter, Scope, detach
from ..storage import bytes_of
from ..store import FactorStore
from ..upscale import put_router, upscale
from . import STRENGTHS, text
from .benches import Bench, bench
from .build.seeds import SEEDS

log = logging.getLogger(__name__)

RATIOS = (1.1, 1.25, 1.5, 2.0)
GATES = (32, 16, 8, 4, 2, 1)
CANDIDATES = 2  # of the gate ranks that fit a budget, the largest
LARGEST_RANK = {"gentle": 64, "strong": 64, "full": 128, "lora": 8}
SCALING = {"task_arithmetic": (0.1, 0.2, 0.3, 0.5), "ties": (0.3, 0.5, 0.7, 1.0)}
VALIDATION = 50  # inputs of each task
TEST = {"gentle": 150, "strong": 150, "full": 80, "lora": 80}
CALIBRATION = (4, 16, 64)


@dataclass(frozen=True)
class Variant:
    """A way to route.

    Attributes:
        inputs: of each task, for calibration; 0 is zero-shot.
        own: what of an expert is used.
    """

    scope: Scope
    score: Score = "norm"
    top_k: int = 1
    noise: bool = False
    inputs: int = 0
    own: str = "layers"
    storage: str = "same"

    @property
    def name(self) -> str:
        parts = [self.scope, f"calibrated, {self.inputs} inputs" if self.inputs else self.score]
        parts += [f"top_k={self.top_k}"] if self.top_k > 1 else []
        parts += ["noise baseline"] if self.noise else []
        parts += ["own norms"] if self.own == "norms" else []
        parts += ["int8"] if self.storage == "int8" else []
        return ", ".join(parts)

    @property
    def options(self) -> dict[str, Any]:
        return {
            "routing_scope": self.scope, "routing_score": self.score, "top_k": self.top_k,
            "noise_baseline": self.noise, "expert_parameters": self.own, "storage": self.storage,
        }  # fmt: skip


# a token's relative scores rank the experts as their norms do
GRID = [Variant(o, s) for o, s in product(get_args(Scope), get_args(Score)) if (o, s) != ("token", "relative")]
ORACLE = Variant("two_pass", "relative")  # with the ranks of which the oracle is measured
MORE = [
    Variant("two_pass", "relative", top_k=2),
    Variant("two_pass", "weighted", noise=True),
    *(Variant("two_pass", "relative", inputs=n) for n in CALIBRATION),
]
OWN = [
    Variant("two_pass", "relative", top_k=2, own="norms"),
    *(Variant("two_pass", "relative", top_k=2, inputs=n, own="norms") for n in CALIBRATION[1:]),
]
INT8 = [replace(variant, storage="int8") for variant in (OWN[0], OWN[-1])]


@dataclass(frozen=True)
class Ranks:
    """What validation chose for a budget."""

    ratio: float
    gate_k: int
    allocation: Allocation


def build(
    at: Bench, experts: dict[str, nn.Module], ranks: Ranks, variant: Variant, store: FactorStore | None
) -> nn.Module:
    """A model with the ranks of a budget, routed in one way."""
    options = config_of(at, ranks, variant)
    model = upscale(at.pretrained(), {t: experts[t] for t in experts}, options, store=store).eval()
    if variant.inputs:
        _calibrate(at, model, variant, list(experts))
    return model


def config_of(at: Bench, ranks: Ranks, variant: Variant) -> SmileConfig:
    return SmileConfig(
        k=LARGEST_RANK[at.chosen],
        gate_k=ranks.gate_k,
        param_ratio=ranks.ratio,
        allocation=ranks.allocation,
        **variant.options,
    )


def rerouted(at: Bench, model: nn.Module, ranks: Ranks, variant: Variant) -> None:
    """Route a model that holds the same experts in another way: `build` would factor them again."""
    detach(model)
    for layer in model.modules():
        if isinstance(layer, Routed):
            layer.layout = replace(layer.layout, score=variant.score, top_k=variant.top_k)
    put_router(model, config_of(at, ranks, variant), len(at.tasks))
    if variant.inputs:
        _calibrate(at, model, variant, at.tasks)


def _calibrate(at: Bench, model: nn.Module, variant: Variant, tasks: Sequence[str]) -> None:
    calibrate(model, {t: [batch for batch, _ in at.batches(t, "train", variant.inputs)] for t in tasks})


@contextmanager
def first_choices(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Layer → for each call the expert that each token, or each input, has first: whole numbers."""
    seen: dict[str, list[Tensor]] = {}
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Routed) and m.gate is not None}
    for name, layer in layers.items():
        calls = seen.setdefault(name, [])
        layer.see = lambda _, chosen, __, calls=calls: calls.append(chosen[..., 0])
    try:
        yield seen
    finally:
        for layer in layers.values():
            layer.see = None


def measure(at: Bench, model: nn.Module, split: str, count: int) -> dict[str, Any]:
    """Average accuracy in percent, each layer's share of right choices, accuracy where they are right or wrong."""
    accuracies, rights = [], []
    layers: dict[str, list[float]] = {}
    of_right: list[Tensor] = []
    of_wrong: list[Tensor] = []
    router = getattr(model, ROUTER, None)
    for number, task in enumerate(at.tasks):
        correct, right = [], []
        with first_choices(model) as seen, torch.inference_mode():
            for batch, labels in at.batches(task, split, count):
                correct.append(at.logits(model, batch, task).argmax(-1) == labels)
                if isinstance(router, InputRouter) and router.scope == "two_pass":
                    right.append(cast(Tensor, router.choice).argmax(-1) == number)
                masks = batch.get("attention_mask")
                for name, calls in seen.items():
                    chosen = calls.pop()
                    real = chosen if masks is None or masks.shape != chosen.shape else chosen[masks.bool()]
                    layers.setdefault(name, []).append((real == number).float().mean().item())
        flags = torch.cat(correct)
        accuracies.append(100 * flags.float().mean().item())
        if right:
            mine = torch.cat(right)
            rights.append(mine.float().mean().item())
            of_right.append(flags[mine])
            of_wrong.append(flags[~mine])
    of_layers = {name: 100 * sum(shares) / len(shares) for name, shares in layers.items()}
    found: dict[str, Any] = dict(zip(at.tasks, accuracies, strict=True))
    found["average"] = sum(accuracies) / len(accuracies)
    found["right"] = sum(of_layers.values()) / len(of_layers) if of_layers else float("nan")
    found["layers"] = " ".join(f"{share:.1f}" for share in of_layers.values())
    if rights:
        for name, parts in {"if_right": of_right, "if_wrong": of_wrong}.items():
            together = torch.cat(parts)
            found[name] = 100 * together.float().mean().item() if len(together) else None
    return found


def choose(at: Bench, experts: dict[str, nn.Module], ratio: float, store: FactorStore) -> Ranks:
    """gate_k and allocation of a budget, on validation inputs."""
    found: dict[Ranks, float] = {}
    fitting: set[int] = set()
    for gate_k in GATES:
        if len(fitting) == CANDIDATES or gate_k > LARGEST_RANK[at.chosen]:
            continue
        for allocation in get_args(Allocation):
            ranks = Ranks(ratio, gate_k, allocation)
            try:
                model = build(at, experts, ranks, OWN[0], store)  # what takes the most
            except ConfigError:
                break  # this many router rows don't fit
            fitting.add(gate_k)
            found[ranks] = measure(at, model, "validation", VALIDATION)["average"]
    return max(found, key=lambda ranks: found[ranks])


def oracle(model: nn.Module, at: Bench, count: int) -> float:
    """Average accuracy where every input gets its own task's expert."""
    accuracies = []
    for task in at.tasks:
        with as_expert(model, task):
            accuracies.append(100 * at.correct(model, task, "test", count).float().mean().item())
    return sum(accuracies) / len(accuracies)


def merged(at: Bench, experts: dict[str, nn.Module]) -> Iterator[dict[str, Any]]:
    """Task Arithmetic and TIES, with the scaling that validation chooses."""
    methods = {
        "task_arithmetic": TaskArithmeticAlgorithm,
        "ties": lambda scaling_factor: TiesMergingAlgorithm(scaling_factor, 20, [], "sum"),
    }
    for name, method in methods.items():
        best: tuple[float, nn.Module] | None = None
        for scale in SCALING[name]:
            pool = BaseModelPool({"_pretrained_": at.pretrained(), **{t: at.expert(t) for t in at.tasks}})
            model = method(scaling_factor=scale).run(pool).eval()
            score = _average(at, dict.fromkeys(at.tasks, model), "validation", VALIDATION)
            best = max(best or (score, model), (score, model), key=lambda pair: pair[0])
        assert best is not None
        yield {"variant": name, "average": _average(at, dict.fromkeys(at.tasks, best[1])), "ratio": 1.0}
    if at.chosen in STRENGTHS:
        adapted = dict.fromkeys(at.tasks, adamerging(at))
        yield {"variant": "adamerging", "average": _average(at, adapted), "ratio": 1.0}


def adamerging(at: Bench) -> nn.Module:
    """The framework's, by its own command, with the settings of the embedded benchmark."""
    made = at.root / "adamerging" / at.chosen / str(at.seed)
    if not made.exists():
        command = [str(Path(sys.executable).with_name("fusion_bench")), f"+experiment=smile_embedded/{at.chosen}"]
        command += ["+smile_row=adamerging", f"merged_model_save_path={made.resolve()}"]
        command += [f"study=adamerging-{at.chosen}-{at.seed}", "taskpool=dummy"]
        command += [f"modelpool.models.{task}={at.folder(task).resolve()}" for task in at.tasks]
        done = subprocess.run(command, cwd=at.root, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
    return CLIPVisionModel.from_pretrained(made).eval()


def _average(at: Bench, models: dict[str, nn.Module], split: str = "test", count: int | None = None) -> float:
    count = count or TEST[at.chosen]
    return sum(100 * at.correct(m, t, split, count).float().mean().item() for t, m in models.items()) / len(models)


def run(root: Path, chosen: str) -> None:
    """Measure one set of experts; each seed's table is a file."""
    ranks: dict[float, Ranks] = {}
    folder = root / "beyond"
    folder.mkdir(exist_ok=True)
    for seed in SEEDS:
        at = bench(root, chosen, seed)
        experts = at.experts()
        store = FactorStore(root / "store")
        ranks = ranks or {ratio: choose(at, experts, ratio, store) for ratio in RATIOS}
        file = folder / f"{chosen}-{seed}.csv"
        unknowns = folder / f"{chosen}-unknown.csv"
        if not unknowns.exists():
            table = pd.DataFrame(unknown(at, experts, ranks[1.5], store)).assign(set=chosen)
            write_whole(unknowns, table.to_csv(index=False))
        if not file.exists():
            rows = list(_rows(at, experts, ranks, store))
            write_whole(file, pd.DataFrame(rows).assign(set=chosen, seed=seed).to_csv(index=False))
            log.info("%s", file)


def _rows(
    at: Bench, experts: dict[str, nn.Module], ranks: dict[float, Ranks], store: FactorStore
) -> Iterator[dict[str, Any]]:
    pretrained = at.pretrained()
    parameters, size = parameters_of(pretrained), bytes_of(pretrained)
    yield {"variant": "individual", "average": _average(at, experts), "ratio": float(len(experts))}
    alone = dict.fromkeys(at.tasks, pretrained)
    yield {"variant": "pretrained", "average": _average(at, alone), "ratio": 1.0}
    yield from merged(at, experts)
    seen: dict[tuple[str, int], dict[str, Any]] = {}
    for ratio, of_ratio in ranks.items():
        for model, variant in _models(at, experts, of_ratio, store):
            key = (variant.name, parameters_of(model))  # with all the ranks there are, a larger budget buys nothing
            if key not in seen:
                seen[key] = measure(at, model, "test", TEST[at.chosen])
                if variant in (ORACLE, OWN[0], INT8[0]):
                    seen[key]["oracle"] = oracle(model, at, TEST[at.chosen])
            yield {
                "variant": variant.name,
                "budget": ratio,
                "gate_k": of_ratio.gate_k,
                "allocation": of_ratio.allocation,
                "ratio": parameters_of(model) / parameters,
                "bytes": bytes_of(model) / size,
                "zero_shot": not variant.inputs,
                **seen[key],
            }
            log.info("%s %s %s %s: %.1f", at.chosen, at.seed, ratio, variant.name, seen[key]["average"])


def _models(
    at: Bench, experts: dict[str, nn.Module], ranks: Ranks, store: FactorStore
) -> Iterator[tuple[nn.Module, Variant]]:
    """Every variant with its model, which the next one may change."""
    model = build(at, experts, ranks, GRID[0], store)
    for variant in [*GRID, *MORE]:
        rerouted(at, model, ranks, variant)
        yield model, variant
    for variants in (OWN, INT8):  # what experts own can't be given to another router
        model = build(at, experts, ranks, variants[0], store)
        for variant in variants:
            if variant.inputs:
                _calibrate(at, model, variant, at.tasks)
            yield model, variant


def unknown(at: Bench, experts: dict[str, nn.Module], ranks: Ranks, store: FactorStore) -> Iterator[dict[str, Any]]:
    """For each task: a model without its expert, that refuses what it doesn't know, and this task's inputs."""
    pretrained = at.pretrained()
    for held_out in at.tasks:
        others = {task: expert for task, expert in experts.items() if task != held_out}
        variant = Variant("two_pass", "relative", inputs=CALIBRATION[-1])
        model = build(at, others, ranks, variant, store)
        router = cast(InputRouter, model.get_submodule(ROUTER))
        row: dict[str, Any] = {"held out": held_out}
        row["pretrained"] = 100 * at.correct(pretrained, held_out, "test", VALIDATION).float().mean().item()
        row["always an expert"] = 100 * at.correct(model, held_out, "test", VALIDATION).float().mean().item()
        router.refuse = True
        refused = []
        for task in at.tasks:
            correct = at.correct(model, task, "test", VALIDATION).float().mean().item()
            # the last batch is the whole of these inputs
            none = cast(Tensor, router.choice).sum(-1).eq(0).float().mean().item()
            if task == held_out:
                row |= {"with refusal": 100 * correct, "refused": 100 * none}
            else:
                refused.append(none)
        row["refused of known tasks"] = 100 * sum(refused) / len(refused)
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the experts lie, and the measurements go")
    parser.add_argument("sets", nargs="*", choices=[*STRENGTHS, *text.KINDS], help="which experts to measure")
    parser.add_argument("--report", type=Path, metavar="DOCS", help="write tables and the figure of what is there")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    log.setLevel(logging.INFO)
    for chosen in arguments.sets:
        run(arguments.folder, chosen)


if __name__ == "__main__":
    main()
