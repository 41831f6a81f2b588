"""The routers' scores of a task as files, laid out as the framework's SMILE task pool has them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import clip_inputs, clip_tower, experts_of, output

from fusion_bench_smile import PlanError, record_routing, upscale
from fusion_bench_smile.framework.task_pools import ExactCLIPVisionModelTaskPool

TOKENS = 6 * 17  # images, patches and class token


def evaluate(pool: ExactCLIPVisionModelTaskPool, model: torch.nn.Module, batches: int = 1) -> None:
    """What the framework does for one task."""
    classifier = SimpleNamespace(clip_model=SimpleNamespace(vision_model=model))
    pool.on_task_evaluation_begin(classifier, "dtd")
    torch.manual_seed(0)
    for _ in range(batches):
        output(model, clip_inputs())
    pool.on_task_evaluation_end()


def pool_of(**options: object) -> ExactCLIPVisionModelTaskPool:
    return ExactCLIPVisionModelTaskPool({}, processor=None, clip_model=None, **options)


def routed_tower() -> torch.nn.Module:
    return upscale(base := clip_tower(), experts_of(base, 2), gate_k=2, k=4)


@pytest.mark.parametrize("inner", [False, True])
def test_files_have_the_scores_of_every_token(tmp_path, inner):
    model = routed_tower()
    model = model.vision_model if inner else model
    pool = pool_of(layer_wise_routing_weights_save_path=str(tmp_path), linear_module_names=["mlp.fc1", "mlp.fc2"])
    evaluate(pool, model)
    names = {f"layer_{i}_mlp.{layer}.pt" for i in (0, 1) for layer in ("fc1", "fc2")}
    assert {file.name for file in (tmp_path / "dtd").iterdir()} == names
    torch.manual_seed(0)
    with record_routing(model) as routing:
        output(model, clip_inputs())
    expected = routing[("" if inner else "vision_model.") + "encoder.layers.1.mlp.fc2"].scores[0]
    saved = torch.load(tmp_path / "dtd" / "layer_1_mlp.fc2.pt")
    assert saved.shape == (TOKENS, 2)
    assert torch.equal(saved, expected.reshape(-1, 2))
    before = saved.clone()
    output(model, clip_inputs())  # recorded no longer
    assert torch.equal(torch.load(tmp_path / "dtd" / "layer_1_mlp.fc2.pt"), before)


@pytest.mark.parametrize(("limit", "rows"), [(5, 5), (TOKENS + 3, TOKENS + 3), (10**6, 2 * TOKENS), (None, 2 * TOKENS)])
def test_the_number_of_tokens_is_limited(tmp_path, limit, rows):
    pool = pool_of(
        layer_wise_routing_weights_save_path=str(tmp_path), layer_wise_routing_weights_max_num=limit
    )  # fmt: skip
    evaluate(pool, routed_tower(), batches=2)
    files = list((tmp_path / "dtd").iterdir())
    assert len(files) == 12
    assert {len(torch.load(file)) for file in files} == {rows}


def test_models_without_such_layers_are_refused(tmp_path):
    pool = pool_of(layer_wise_routing_weights_save_path=str(tmp_path))
    with pytest.raises(PlanError, match="the model has no layers with a router; there are: none"):
        evaluate(pool, clip_tower())
    pool = pool_of(layer_wise_routing_weights_save_path=str(tmp_path), linear_module_names="mlp.fc9")
    with pytest.raises(PlanError, match=r"no layer 'mlp\.fc9' with a router; there are: .*mlp\.fc1"):
        evaluate(pool, routed_tower())
    evaluate(pool_of(), clip_tower())
    assert not list(tmp_path.iterdir())
