"""Which layers are upscaled: patterns as in PEFT, and models that routing can't serve."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import experts_of, output, perturbed, tied_llama
from torch import Tensor, nn

from fusion_bench_smile import ConfigError, PlanError, SmileConfig, upscale
from fusion_bench_smile.construction import make_plan
from fusion_bench_smile.construction.layer_selection import candidate_layers, matching_layers
from fusion_bench_smile.nn.compatibility import read_layers


class Block(nn.Module):
    """A block whose projection is used by its weight where `fused` is set."""

    def __init__(self, fused: bool = True, twice: bool = False) -> None:
        super().__init__()
        self.qkv, self.proj, self.fused, self.twice = nn.Linear(8, 8), nn.Linear(8, 8), fused, twice
        nn.init.zeros_(self.qkv.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.qkv.weight.dtype)
        x = F.linear(x, self.qkv.weight, self.qkv.bias) if self.fused else self.qkv(x)
        if self.qkv.bias is not None and self.twice and len(x) > 100:
            return x @ self.proj.weight
        return self.proj(x)


def names(patterns: list[str]) -> set[str]:
    model = tied_llama()
    return matching_layers(model, patterns, candidate_layers(model, SmileConfig()))


def test_patterns_are_read_as_by_peft() -> None:
    assert names(["q_proj"]) == {name for name in names(["*"]) if name.endswith(".q_proj")}
    assert names(["q_proj", "0.mlp.up_proj"]) == names(["q_proj"]) | {"model.layers.0.mlp.up_proj"}
    assert names([r".*\.(q|v)_proj"]) == names(["q_proj", "v_proj"])
    assert names(["model.layers.0.*"]) == {name for name in names(["*"]) if ".0." in name}
    assert names(["all-linear"]) == names(["*"]) - {"lm_head"}
    assert "lm_head" in names(["*"])


def test_the_whole_name_wins_over_a_regular_expression() -> None:
    """As a regular expression, ``layer.1.*`` would match ``layer.10`` too."""
    model = nn.ModuleDict({"layer": nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(4, 4)}) for _ in range(11))})
    found = matching_layers(model, ["layer.1.*"], candidate_layers(model, SmileConfig()))
    assert found == {"layer.1.fc"}


@pytest.mark.parametrize(
    ("pattern", "nearest"), [("qproj", "q_proj"), ("model.layers.*.o_prj", "o_proj"), ("*(", None), ("dense", None)]
)
def test_a_miss_names_the_nearest(pattern: str, nearest: str | None) -> None:
    with pytest.raises(ConfigError, match="its layers are called q_proj, k_proj") as error:
        names([pattern])
    assert ("did you mean" in str(error.value)) == (nearest is not None)
    assert nearest is None or f"(did you mean {nearest!r}?)" in str(error.value)


def test_the_nearest_is_of_the_same_kind() -> None:
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("q_proj", "out_proj", "up_proj")})
    with pytest.raises(ConfigError, match="did you mean 'out_proj'"):
        matching_layers(model, ["ou_proj"], candidate_layers(model, SmileConfig()))


def test_layers_whose_weight_is_read_are_refused() -> None:
    base = nn.Sequential(Block(), nn.ReLU())
    with pytest.raises(PlanError, match=r"reads the weight of 0\.qkv .* exclude_modules=\['0\.qkv'\]"):
        upscale(base, experts_of(base), k=4, gate_k=2)
    model = upscale(base, experts_of(base), k=4, gate_k=2, exclude_modules=["qkv"])
    assert (output(model, {"input": torch.randn(3, 8)}) - output(base, {"input": torch.zeros(3, 8)})).abs().max() > 0


def test_only_branches_that_can_run_are_read() -> None:
    layers = ["qkv", "proj"]
    assert read_layers(Block(), layers) == ["qkv"]
    assert read_layers(Block(fused=False), layers) == []
    assert read_layers(Block(fused=False, twice=True), layers) == ["proj"]  # whether len(x) > 100 is not known


def test_parametrised_weights_are_refused() -> None:
    for norm in (nn.utils.parametrizations.weight_norm, nn.utils.spectral_norm, nn.utils.weight_norm):
        base = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), norm(nn.Linear(8, 8)))
        with pytest.raises(PlanError, match=r"the weight of 2 is computed from other parameters"):
            upscale(base, [base], k=2, gate_k=2)
        make_plan(base, 1, SmileConfig(k=2, gate_k=2, exclude_modules=["2"]))


def test_a_model_without_weights_is_refused() -> None:
    with torch.device("meta"):
        base = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(PlanError, match=r"0\.weight is on the meta device"):
        upscale(base, [nn.Sequential(nn.Linear(8, 8))], k=2, gate_k=2)


def test_a_router_that_sees_everything_is_named(caplog: pytest.LogCaptureFixture) -> None:
    base = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 8))
    experts = [perturbed(base, 0.1, seed) for seed in (1, 2)]
    upscale(base, experts, k=4, gate_k=4)
    assert "a router of rank 4 spans all inputs of 1 of 2 layers" in caplog.text
    caplog.clear()
    upscale(base, experts, k=4, gate_k=3)
    assert "spans all inputs" not in caplog.text
