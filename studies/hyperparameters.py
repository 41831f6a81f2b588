"""Select hyperparameters on the validation split: λ of Task Arithmetic and TIES, k and gate_k of SMILE.

python -m studies.hyperparameters                   # images
python -m studies.hyperparameters --benchmark text
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from functools import partial
from itertools import product
from typing import Any, get_args

import pandas as pd
from fusion_bench.method.task_arithmetic import TaskArithmeticAlgorithm
from fusion_bench.method.ties_merging.ties_merging import TiesMergingAlgorithm
from fusion_bench.modelpool.base_pool import BaseModelPool
from torch import nn

from fusion_bench_smile import upscale
from smile_zoo import images, text
from studies import images as image_study
from studies import text as text_study

SCALING_FACTORS = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
RANKS = ((1, 8), (4, 4), (4, 8), (8, 8), (16, 8), (4, 16), (8, 16), (16, 16))  # gate_k, k


def candidates(
    load_pretrained: Callable[[], nn.Module], experts: Mapping[str, nn.Module]
) -> Iterator[tuple[str, nn.Module]]:
    """Name and model of every candidate."""
    methods: dict[str, Callable[..., Any]] = {
        "task_arithmetic": TaskArithmeticAlgorithm,
        "ties": partial(TiesMergingAlgorithm, threshold=20, remove_keys=[], merge_func="sum"),
    }
    for (name, method), scaling in product(methods.items(), SCALING_FACTORS):
        # the framework's methods may modify the models of their pool
        pool = BaseModelPool({"_pretrained_": load_pretrained(), **deepcopy(experts)})
        yield f"{name} λ={scaling}", method(scaling_factor=scaling).run(pool)
    for gate_k, k in RANKS:
        yield f"smile gate_k={gate_k} k={k}", upscale(load_pretrained(), experts, gate_k=gate_k, k=k)


def image_accuracies(strength: images.Strength) -> dict[str, float]:
    """Candidate → validation accuracy in percent, the mean over tasks."""
    models = candidates(images.load_pretrained, image_study.load_experts(strength))
    return {name: image_study.accuracies({name: model.eval()}, "validation").loc[name].mean() for name, model in models}


def text_accuracies(kind: text.Kind) -> dict[str, float]:
    """Candidate → validation accuracy in percent, the mean over tasks."""
    models = candidates(text.load_pretrained, {task: text.load_expert(task, kind) for task in text.TASKS})
    return {
        name: text_study.accuracies(dict.fromkeys(text.TASKS, model.eval()), kind, "validation").mean()
        for name, model in models
    }


def main() -> None:
    """Print the validation accuracy of all candidates for each set of experts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--benchmark", choices=("images", "text"), default="images")
    if parser.parse_args().benchmark == "images":
        tables = ((strength, image_accuracies(strength)) for strength in get_args(images.Strength))
    else:
        tables = ((kind, text_accuracies(kind)) for kind in get_args(text.Kind))
    for name, values in tables:
        print(pd.Series(values, name=f"{name}: validation accuracy").round(1).to_string())


if __name__ == "__main__":
    main()
