"""The study of the image benchmark."""

from __future__ import annotations

import copy

import pytest
import torch

from fusion_bench_smile import upscale
from smile_zoo.images import TASKS, load_expert, load_pretrained
from studies import hyperparameters
from studies.images import accuracies, relative_deltas, router_accuracy, size_section


def test_every_expert_is_best_at_home():
    """On its own task an expert beats the pretrained model clearly."""
    models = {"pretrained": load_pretrained().eval(), "digits": load_expert("digits").eval()}
    table = accuracies(models, "validation")
    assert table.loc["digits", "digits"] > table.loc["pretrained", "digits"] + 10


def test_router_accuracy_of_an_oracle_is_one():
    """A single expert differs from the pretrained model, and gets all tokens."""
    base = load_pretrained().eval()
    experts = {task: copy.deepcopy(base) for task in TASKS}
    with torch.no_grad():
        for parameter in experts["planets"].parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    shares = router_accuracy(upscale(base, experts, gate_k=4, k=4).eval(), "validation", count=5)
    assert shares["planets"] == 100
    assert shares.drop("planets").max() == 0


def test_relative_deltas():
    base = load_pretrained()
    other = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.25)
    assert relative_deltas(base, other).tolist() == pytest.approx([25.0] * 24, rel=1e-5)


def test_sizes_add_up(tmp_path):
    for name, count in {"first": 1_000_000, "second": 500_000}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(bytes(count))
    rows = [line.replace("|", " ").split() for line in size_section(tmp_path)[-1].splitlines()[2:]]
    assert rows == [["first", "1.0"], ["second", "0.5"], ["total", "1.5"]]


def test_candidates_are_named_by_their_options(monkeypatch):
    monkeypatch.setattr(hyperparameters, "SCALING_FACTORS", (0.3,))
    monkeypatch.setattr(hyperparameters, "RANKS", ((1, 2),))
    experts = {task: load_expert(task) for task in TASKS[:2]}
    names = [name for name, _ in hyperparameters.candidates(load_pretrained, experts)]
    assert names == ["task_arithmetic λ=0.3", "ties λ=0.3", "smile gate_k=1 k=2"]
