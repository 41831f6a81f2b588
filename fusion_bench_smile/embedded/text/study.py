"""What routing costs on the text benchmark, and why LoRA experts are hard to route.

python -m fusion_bench_smile.embedded.text.study docs/embedded_text_results.md
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pandas as pd
import torch
from torch import Tensor, nn

from ...analysis.cost import parameters_of
from ...layers import Routed
from ...text_classification import batch_of
from ...upscale import upscale
from ..measure import run, to_markdown
from . import DATA, KINDS, TASKS, Kind, load_expert, load_head, load_pretrained, load_texts, load_tokenizer
from .evaluate import accuracy, arrays

RANKS = ((1, 8), (4, 8), (8, 8), (16, 16))  # gate_k, k
TEXTS = 150  # of each task, for looking at the router


def accuracies(models: Mapping[str, nn.Module], kind: Kind, split: str = "test") -> pd.Series:
    """Accuracy in percent of every task's model on its task."""
    tokenizer = load_tokenizer()
    values = {}
    for task, model in models.items():
        values[task] = accuracy(model, tokenizer, load_head(task, kind), *arrays(load_texts(task, split), task))
    return pd.Series(values)


@contextmanager
def seen_by_routers(model: nn.Module) -> Iterator[list[tuple[Routed, Tensor]]]:
    """Yields a list of all routed layers with the inputs (…, in) that they get meanwhile."""
    seen: list[tuple[Routed, Tensor]] = []
    hooks = [
        layer.register_forward_pre_hook(lambda layer, inputs: seen.append((layer, inputs[0])))
        for layer in model.modules()
        if isinstance(layer, Routed)
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def router_statistics(model: nn.Module, texts: int = TEXTS) -> pd.Series:
    """What the routers of an upscaled encoder tell apart; means over routed layers and tasks, of tokens but padding.

    - ``own``, ``others``: the energy of a token that the router rows of its task's expert, or of another one, capture,
      over what random rows would: ‖V_gate x‖² / ‖x‖² · in / gate_k. 1 means that the rows know nothing of the inputs.
    - ``accuracy``: the share of tokens whose best expert is their task's own, in percent.
    - ``favourite``: the share of tokens that the layer's favourite expert gets, over all tasks, in percent.
    """
    tokenizer = load_tokenizer()
    captured, chosen = [], []  # for each task: (layers, experts)
    for task in TASKS:
        batch = batch_of(tokenizer, arrays(load_texts(task), task)[0][:texts])
        real = batch["attention_mask"].bool()
        with seen_by_routers(model) as seen:
            model(**batch)
        of_layers = [_of_layer(layer, x[real]) for layer, x in seen]
        captured.append(torch.stack([energy for energy, _ in of_layers]))
        chosen.append(torch.stack([load for _, load in of_layers]))
    energy, load = torch.stack(captured), torch.stack(chosen)  # (tasks, layers, experts)
    own = torch.eye(len(TASKS), dtype=torch.bool)[:, None].expand_as(energy)
    return pd.Series(
        {
            "own": energy[own].mean().item(),
            "others": energy[~own].mean().item(),
            "accuracy": 100 * load[own].mean().item(),
            "favourite": 100 * load.mean(0).amax(-1).mean().item(),
        }
    )


def _of_layer(layer: Routed, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of tokens (n, in): the energy that each expert's router rows capture, and each expert's load; both (T,)."""
    scores = layer.scores(x)
    assert scores is not None
    rows = torch.tensor(layer.layout.gate_ranks).clamp(min=1)
    energy = scores.square().sum(0) / x.square().sum() * x.shape[-1] / rows
    load = scores.argmax(dim=-1).bincount(minlength=len(rows)) / len(x)
    return energy, load


def study(kind: Kind) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Accuracies, retention and parameter ratio for each model; what the routers tell apart."""
    pretrained = load_pretrained().eval()
    experts = {task: load_expert(task, kind).eval() for task in TASKS}
    rows: dict[str, dict[str, float]] = {}
    routers: dict[str, pd.Series] = {}

    def put(name: str, models: Mapping[str, nn.Module], parameters: int) -> None:
        values = accuracies(models, kind)
        average = values.mean()
        whole = rows["individual"]["average"] if rows else average
        ratio = parameters / parameters_of(pretrained)
        rows[name] = {**values, "average": average, "retention": 100 * average / whole, "parameters": ratio}

    put("individual", experts, sum(map(parameters_of, experts.values())))
    put("pretrained", dict.fromkeys(TASKS, pretrained), parameters_of(pretrained))
    for gate_k, k in RANKS:
        model = upscale(pretrained, experts, gate_k=gate_k, k=k).eval()
        put(f"SMILE (gate_k={gate_k}, k={k})", dict.fromkeys(TASKS, model), parameters_of(model))
        routers[f"gate_k={gate_k}"] = router_statistics(model)
    for k in (8, 16):
        alone = {task: upscale(pretrained, {task: expert}, k=k).eval() for task, expert in experts.items()}
        put(f"oracle routing (k={k})", alone, parameters_of(upscale(pretrained, experts, gate_k=k, k=k)))
    return pd.DataFrame(rows).T, pd.DataFrame(routers).T


def report() -> str:
    """Everything as Markdown."""
    lines = ["# Measurements of the text benchmark", ""]
    lines += [
        "Made by `python -m fusion_bench_smile.embedded.text.study`; accuracies are of the test split, in percent."
    ]
    for kind in KINDS:
        table, routers = study(kind)
        lines += ["", f"## {kind} fine-tuning", ""]
        lines += [to_markdown(table, 1, {"parameters": 3}), ""]
        lines += ["Oracle routing gives every token to its task's own expert.", ""]
        lines += [
            "What the routers tell apart (`own`, `others`: energy captured, 1 is what random rows would; `accuracy`"
        ]
        lines += ["and `favourite` in percent; chance is 12.5):", "", to_markdown(routers, 2)]
    sizes = {p.name: sum(f.stat().st_size for f in p.rglob("*") if f.is_file()) / 1e6 for p in sorted(DATA.iterdir())}
    sizes["total"] = sum(sizes.values())
    return "\n".join([*lines, "", "## Sizes", "", "In MB:", "", to_markdown(pd.DataFrame({"size": sizes}), 1), ""])


if __name__ == "__main__":
    run(report, __doc__)
