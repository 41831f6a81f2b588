"""Cost of a forward pass by routing, relative to the plain model, on DINOv2-small with the experts of eight tasks.

    python benchmarks/scopes.py                          # batches of 50 images: of one task, and of all eight
    python benchmarks/scopes.py --device cuda --dtype bfloat16
    python benchmarks/scopes.py --compiled --only "token, 8/8"    # also with torch.compile, where tokens are routed

All models process the same images in turn; the ratios are medians of paired rounds. `FRAMEWORK` is the framework's own
SMILE. The multiply-adds of router, experts and first pass, at the speed of the plain model, are in the column *bound*;
they leave out attention, and that the experts of a batch are gathered.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial

import torch
from construction import framework
from forward import add_device, seconds_of, set_up
from torch import Tensor, nn

from fusion_bench_smile import dequantize, upscale
from fusion_bench_smile.nn import RoutedLayer, count_parameters, routed_layers, router_of
from smile_zoo.dinov2 import EIGHT_TASKS, load_expert, load_images, load_pretrained
from smile_zoo.dinov2.task_pool import to_pixels

BATCH = 50
BY_INPUT = {"routing_scope": "input", "top_k": 2}
SETTINGS = {
    "token, 8/8": {"gate_k": None, "k": 8},
    "token, 16/16": {"gate_k": None, "k": 16},
    "token, 16/32": {"gate_k": 16, "k": 32},
    "token, 32/32": {"gate_k": None, "k": 32},
    "input, 8/8": {"gate_k": None, "k": 8, **BY_INPUT},
    "input, 32/32": {"gate_k": None, "k": 32, **BY_INPUT},
    "input, 32/32, int4 unpacked": {"gate_k": None, "k": 32, "storage": "int4", **BY_INPUT},
    "input, 32/32, int4": {"gate_k": None, "k": 32, "storage": "int4", **BY_INPUT},
    "input, 8 rows, 2 % of the entries": {"gate_k": 8, "k": -1, "density": 0.02, **BY_INPUT},
    "input, top_k=1, 32/32": {"gate_k": None, "k": 32, **BY_INPUT, "top_k": 1},
}  # fmt: skip
FRAMEWORK = "framework, 16/32"


# the models are built outside: of parameters made in inference mode nothing is kept from call to call
@torch.inference_mode()
def paired_ratios(functions: Mapping[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, float]:
    """The median over rounds of each function's time, relative to that of the first function in the same round."""
    for run in functions.values():
        seconds_of(run, device)
    times = []
    for turn in range(rounds):
        order = list(functions) if turn % 2 == 0 else list(reversed(functions))
        times.append({name: seconds_of(functions[name], device) for name in order})
    first = next(iter(functions))
    return {name: statistics.median(turn[name] / turn[first] for turn in times) for name in functions}


def build(pretrained: nn.Module, experts: Mapping[str, nn.Module], name: str) -> nn.Module:
    """The model of one row."""
    if name == FRAMEWORK:
        return framework(deepcopy(pretrained), [deepcopy(expert) for expert in experts.values()], full=False)
    model = upscale(pretrained, experts, **SETTINGS[name])  # type: ignore[arg-type]
    return dequantize(model) if name.endswith("unpacked") else model


def bound(model: nn.Module) -> float:
    """Multiply-adds for a token in the linear layers, with those of the first pass, relative to the plain model's."""
    layers = list(routed_layers(model).values())
    plain = sum(layer.weight_matrix(layer.weight).numel() for layer in layers)
    added = sum(map(added_products, layers))
    if (router := router_of(model)) is not None:
        added += sum(scoring_products(layer, router.scored_rows) for layer in router.scored_layers())
    return 1 + added / plain


def added_products(layer: RoutedLayer) -> float:
    """Multiply-adds for a token with the router rows, where tokens are routed, and with the experts that serve it."""
    out_features, in_features = layer.weight_matrix(layer.weight).shape
    layout, config = layer.layout, layer.smile_config
    by_token, used = config.routing_scope == "token", config.top_k / layout.num_experts
    rows = sum(layout.down_ranks if by_token else layout.low_ranks)
    served = rows * in_features + sum(layout.low_ranks) * out_features
    dense = len(layout.dense_experts) * in_features * out_features
    return by_token * sum(layout.gate_ranks) * in_features + used * (served + dense)


def scoring_products(layer: RoutedLayer, rows: int) -> int:
    """Multiply-adds for a token in the first pass: with the plain weight, and with the leading router rows."""
    out_features, in_features = layer.weight_matrix(layer.weight).shape
    return in_features * (out_features + sum(min(rank, rows) for rank in layer.layout.gate_ranks))


def main() -> None:
    """Print the table of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_device(parser)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--only", nargs="+", choices=[*SETTINGS, FRAMEWORK], help="some of the rows")
    parser.add_argument("--compiled", action="store_true", help="add compiled models, which take minutes to compile")
    options = parser.parse_args()
    device, dtype = set_up(options)
    pretrained, experts = load_pretrained(), {task: load_expert(task) for task in EIGHT_TASKS}
    rows = options.only or [*SETTINGS, FRAMEWORK]
    models = {"plain": pretrained, **{name: build(pretrained, experts, name) for name in rows}}
    models = {name: model.eval().to(device, dtype) for name, model in models.items()}
    if options.compiled:
        eager = {name: model for name, model in models.items() if router_of(model) is None and name != FRAMEWORK}
        models |= {f"{name}, compiled": torch.compile(model) for name, model in eager.items()}
        rows += [f"{name}, compiled" for name in eager]
    images = {task: to_pixels(load_images(task)[:BATCH]["image"]).to(device, dtype) for task in EIGHT_TASKS}
    every = torch.cat([pixels[:: len(EIGHT_TASKS)] for pixels in images.values()])[:BATCH]
    batches: dict[str, Tensor] = {"one task": images[EIGHT_TASKS[0]], "eight tasks": every}
    ratios = {
        label: paired_ratios(
            {name: partial(model, pixel_values=pixels) for name, model in models.items()}, device, options.rounds
        )
        for label, pixels in batches.items()
    }
    print(f"| gate_k/k | parameters | bound | {' | '.join(ratios)} |\n|---|---:|---:|{'---:|' * len(ratios)}")
    for name in rows:
        parameters = count_parameters(models[name]) / count_parameters(pretrained)
        limit = f"{bound(models[name]):.2f}×" if routed_layers(models[name]) else ""
        times = " | ".join(f"{values[name]:.2f}×" for values in ratios.values())
        print(f"| {name} | {parameters:.2f}× | {limit} | {times} |")


if __name__ == "__main__":
    main()
