"""Choose what the comparison uses, on the validation split: λ of Task Arithmetic and TIES, k and gate_k of SMILE.

python -m fusion_bench_smile.embedded.choose                   # of the images
python -m fusion_bench_smile.embedded.choose --benchmark text
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from functools import partial
from itertools import product

import pandas as pd
from fusion_bench.method.task_arithmetic import TaskArithmeticAlgorithm
from fusion_bench.method.ties_merging.ties_merging import TiesMergingAlgorithm
from fusion_bench.modelpool.base_pool import BaseModelPool
from torch import nn

from ..upscale import upscale
from . import STRENGTHS, Strength, load_pretrained, text
from .measure import accuracies, experts
from .text import study

SCALING = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
RANKS = ((1, 8), (4, 4), (4, 8), (8, 8), (16, 8), (4, 16), (8, 16), (16, 16))


def candidates(
    load_pretrained: Callable[[], nn.Module], models: Mapping[str, nn.Module]
) -> Iterator[tuple[str, nn.Module]]:
    """Name and model of everything there is to choose from."""
    methods = {
        "task_arithmetic": TaskArithmeticAlgorithm,
        "ties": partial(TiesMergingAlgorithm, threshold=20, remove_keys=[], merge_func="sum"),
    }
    for (name, method), scale in product(methods.items(), SCALING):
        # a pool of its own for each: the framework's methods may modify the models
        pool = BaseModelPool({"_pretrained_": load_pretrained(), **deepcopy(models)})
        yield f"{name} λ={scale}", method(scaling_factor=scale).run(pool)
    for gate_k, k in RANKS:
        yield f"smile gate_k={gate_k} k={k}", upscale(load_pretrained(), models, gate_k=gate_k, k=k)


def of_images(strength: Strength) -> dict[str, float]:
    """The validation accuracy of each candidate."""
    models = candidates(load_pretrained, experts(strength))
    return {name: accuracies({name: model.eval()}, "validation").loc[name].mean() for name, model in models}


def of_text(kind: text.Kind) -> dict[str, float]:
    """The validation accuracy of each candidate."""
    models = candidates(text.load_pretrained, {task: text.load_expert(task, kind) for task in text.TASKS})
    return {n: study.accuracies(dict.fromkeys(text.TASKS, m.eval()), kind, "validation").mean() for n, m in models}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--benchmark", choices=("images", "text"), default="images")
    images = parser.parse_args().benchmark == "images"
    for chosen in STRENGTHS if images else text.KINDS:
        rows = of_images(chosen) if images else of_text(chosen)
        print(pd.Series(rows, name=f"{chosen}: validation accuracy").round(1).to_string())


if __name__ == "__main__":
    main()
