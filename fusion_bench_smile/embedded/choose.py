"""Choose what the comparison uses, on the validation split: λ of Task Arithmetic and TIES, k and gate_k of SMILE.

python -m fusion_bench_smile.embedded.choose
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from copy import deepcopy
from functools import partial
from itertools import product

import pandas as pd
import torch
from fusion_bench.method.task_arithmetic import TaskArithmeticAlgorithm
from fusion_bench.method.ties_merging.ties_merging import TiesMergingAlgorithm
from fusion_bench.modelpool.base_pool import BaseModelPool
from torch import nn

from ..upscale import upscale
from . import STRENGTHS, Strength, load_pretrained
from .measure import accuracies, experts

SCALING = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
RANKS = ((1, 8), (4, 4), (4, 8), (8, 8), (16, 8), (4, 16), (8, 16), (16, 16))


def candidates(strength: Strength) -> Iterator[tuple[str, nn.Module]]:
    """Name and model of everything there is to choose from."""
    models: dict[str, nn.Module] = dict(experts(strength))
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


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for strength in STRENGTHS:
        rows = {}
        for name, model in candidates(strength):
            with torch.no_grad():
                rows[name] = accuracies({name: model.eval()}, "validation").loc[name].mean()
        print(pd.Series(rows, name=f"{strength}: validation accuracy").round(1).to_string())


if __name__ == "__main__":
    main()
