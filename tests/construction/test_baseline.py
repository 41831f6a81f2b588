"""The scores of random inputs as a baseline."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import clip_tower, experts_of, mlp, perturbed, t5, tied_llama

from fusion_bench_smile import PlanError, load, metadata_of, save, upscale
from fusion_bench_smile.construction import measure_baseline, random_inputs
from fusion_bench_smile.nn import count_parameters, router_of


@pytest.mark.parametrize("make", [clip_tower, t5, tied_llama])
def test_a_noise_baseline_makes_random_inputs_neutral(make, tmp_path: Path) -> None:
    base = make()
    experts = [perturbed(base, scale, seed) for seed, scale in enumerate((0.02, 0.05, 0.3), 1)]
    options = {"k": 4, "gate_k": 4, "routing_scope": "two_pass", "routing_score": "weighted"}
    plain, standardised = (upscale(base, experts, noise_baseline=b, **options) for b in (False, True))
    assert metadata_of(standardised).provenance.parameters[1] == count_parameters(standardised)
    router, generator = router_of(standardised), torch.Generator().manual_seed(7)
    entry_point = standardised.get_encoder() if make is t5 else standardised
    scores = router.observe(entry_point, random_inputs(standardised, 300, generator)).scores
    assert scores.mean(0).abs().max() < 0.35
    assert (scores.std(0) - 1).abs().max() < 0.35
    inputs = random_inputs(plain, 300, torch.Generator().manual_seed(7))
    biased = router_of(plain).observe(plain.get_encoder() if make is t5 else plain, inputs).scores
    assert biased.mean(0).std() > 0
    save(standardised, tmp_path / "model")
    assert torch.equal(router_of(load(tmp_path / "model")).baseline, router.baseline)


def test_the_baseline_is_deterministic_and_leaves_the_mode() -> None:
    base = clip_tower()
    model = upscale(base, experts_of(base), k=4, gate_k=2, routing_scope="two_pass").train()
    first, second = (measure_baseline(model, router_of(model)) for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape == (2, 3)
    assert first.dtype == torch.float32
    assert model.training


def test_random_inputs_of_each_kind_of_model() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = random_inputs(tied_llama(), 5, generator)
    assert ids["input_ids"].shape == ids["attention_mask"].shape == (5, 32)
    assert 0 <= ids["input_ids"].min() <= ids["input_ids"].max() < 40
    images = random_inputs(clip_tower().half(), 5, generator)["pixel_values"]
    assert images.shape == (5, 3, 28, 28)
    assert images.dtype == torch.float16
    torch.testing.assert_close(images.float().std(dim=(1, 2, 3)), torch.ones(5), rtol=0, atol=1e-3)


def test_other_models_have_no_random_inputs() -> None:
    base = mlp()
    with pytest.raises(PlanError, match="noise_baseline"):
        upscale(base, experts_of(base), k=4, gate_k=2, routing_scope="two_pass", noise_baseline=True)
