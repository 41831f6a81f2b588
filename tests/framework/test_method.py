"""The framework's method in Python: what it accepts, what it reports, what it refuses."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from conftest import clip_inputs, clip_tower, experts_of, mlp, mlp_inputs, output, t5
from datasets import Dataset
from fusion_bench.compat.taskpool.flan_t5_glue_text_generation import FlanT5GLUETextGenerationTaskPool
from fusion_bench.modelpool import BaseModelPool
from fusion_bench.taskpool import CLIPVisionModelTaskPool, DummyTaskPool
from lightning import Fabric

from fusion_bench_smile import ConfigError, PlanError, SmileUpscalingAlgorithm, calibrate, load, upscale
from fusion_bench_smile.framework.method import check_task_pool
from fusion_bench_smile.framework.task_pools import ExactCLIPVisionModelTaskPool
from fusion_bench_smile.io import metadata_of


@pytest.mark.parametrize("kind", ["list", "mapping", "pool"])
def test_accepts_what_the_frameworks_algorithms_do(kind):
    base = mlp()
    experts = experts_of(base)
    named = {"_pretrained_": base, **{str(i): expert for i, expert in enumerate(experts)}}
    models = {"list": [base, *experts], "mapping": named, "pool": BaseModelPool(dict(named))}[kind]
    result = SmileUpscalingAlgorithm(gate_k=2, k=4, top_k=2).run(models)
    expected = upscale(base, experts, gate_k=2, k=4, top_k=2)
    assert torch.equal(output(result, (x := mlp_inputs())), output(expected, x))


def test_a_pretrained_model_that_the_pool_loads_is_not_held_twice(tmp_path):
    base = clip_tower()
    base.save_pretrained(tmp_path)
    loaded = []

    class Pool(BaseModelPool):
        def load_model(self, name, *arguments, **options):
            loaded.append(super().load_model(name, *arguments, **options))
            return loaded[-1]

    entry = {"_target_": "transformers.CLIPVisionModel.from_pretrained", "pretrained_model_name_or_path": str(tmp_path)}
    experts = {str(number): expert for number, expert in enumerate(experts_of(base))}
    result = SmileUpscalingAlgorithm(gate_k=2, k=4).run(Pool({"_pretrained_": entry, **experts}))
    assert result is loaded[0]
    expected = upscale(base, experts, gate_k=2, k=4)
    assert torch.equal(output(result, (x := clip_inputs())), output(expected, x))


def test_what_is_refused_leaves_a_model_that_may_be_changed_as_it_was():
    base = mlp()
    before = copy.deepcopy(base.state_dict())
    broken = experts_of(base)
    broken[-1][-1].weight.data[0, 0] = torch.nan
    with pytest.raises(PlanError, match="NaN"):
        upscale(base, broken, gate_k=2, k=4, in_place=True)
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


def test_runs_inside_fabric_and_profiles_its_phases():
    base = mlp()
    algorithm = SmileUpscalingAlgorithm(gate_k=2, k=4)
    algorithm._fabric_instance = Fabric(accelerator="cpu", devices=1)
    algorithm.run([base, *experts_of(base)])
    assert {"load pretrained model", "upscale"} <= set(algorithm.profiler.recorded_durations)


def test_logs_and_never_prints(capsys, caplog):
    base = mlp()
    with caplog.at_level("INFO"):
        SmileUpscalingAlgorithm(gate_k=2, k=4).run([base, *experts_of(base)])
    assert capsys.readouterr().out == ""
    assert any("parameter ratio" in record.getMessage() for record in caplog.records)


def test_model_path_saves_and_then_loads(tmp_path, caplog):
    base = clip_tower()
    models = [base, *experts_of(base)]
    first = SmileUpscalingAlgorithm(gate_k=2, k=4, model_path=str(tmp_path / "model")).run(models)
    with caplog.at_level("INFO"):
        second = SmileUpscalingAlgorithm(gate_k=2, k=4, model_path=str(tmp_path / "model")).run([base])
    assert any("loading the upscaled model" in record.getMessage() for record in caplog.records)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), load(tmp_path / "model").parameters(), strict=True)
    )


def test_model_path_of_a_module_that_is_not_of_transformers(tmp_path):
    base = mlp()
    models = [base, *experts_of(base)]
    path = str(tmp_path / "model")
    first = SmileUpscalingAlgorithm(gate_k=2, k=4, model_path=path).run(models)
    second = SmileUpscalingAlgorithm(gate_k=2, k=4, model_path=path).run(models)
    assert torch.equal(output(first, (x := mlp_inputs())), output(second, x))


def test_the_configuration_is_complete():
    algorithm = SmileUpscalingAlgorithm(gate_k=2, k=4, exclude_modules=["a"], model_path="x")
    config = algorithm.config
    assert (config.gate_k, config.k, config.exclude_modules, config.model_path) == (2, 4, ["a"], "x")


def data_set(**columns: list) -> dict[str, object]:
    """As a pool's configuration has it."""
    return {"_target_": "datasets.Dataset.from_dict", "_convert_": "all", "mapping": columns}


def stored_set(file: Path, pixels: torch.Tensor) -> dict[str, object]:
    """The configuration of a data set in a file: OmegaConf takes half a minute for as many numbers."""
    Dataset.from_dict({"pixel_values": pixels.tolist(), "label": [0] * len(pixels)}).to_parquet(file)
    return {"_target_": "datasets.Dataset.from_parquet", "path_or_paths": str(file), "keep_in_memory": True}


def test_calibrates_with_the_pools_training_sets(tmp_path, caplog):
    base = clip_tower()
    models = {"_pretrained_": base, **dict(zip("ab", experts_of(base, 2), strict=True))}
    options = {"gate_k": 2, "k": 4, "routing_scope": "input", "param_ratio": 1.9}
    images = {name: torch.randn(9, 3, 28, 28) + number for number, name in enumerate("ab")}
    sets = {name: stored_set(tmp_path / f"{name}.parquet", pixels) for name, pixels in images.items()}
    pool = BaseModelPool(models, train_datasets=sets)
    result = SmileUpscalingAlgorithm(**options, calibration=6, model_path=str(tmp_path / "model")).run(pool)
    expected = upscale(base, {name: models[name] for name in "ab"}, calibration=6, **options)
    drawn = torch.randperm(9, generator=torch.Generator().manual_seed(0))[:6]
    calibrate(expected, {name: [{"pixel_values": pixels[drawn]}] for name, pixels in images.items()})
    x = clip_inputs()
    torch.testing.assert_close(output(result, x), output(expected, x))
    assert torch.equal(output(load(tmp_path / "model").eval(), x), output(result, x))
    before, after = metadata_of(result).provenance.parameters
    assert after == sum(parameter.numel() for parameter in result.parameters()) <= 1.9 * before


def test_calibration_refuses_what_it_can_not_do():
    base = clip_tower()
    models = {"_pretrained_": base, **dict(zip("ab", experts_of(base, 2), strict=True))}
    options = {"gate_k": 2, "k": 4, "routing_scope": "input"}
    with pytest.raises(PlanError, match=r"calibration needs train_datasets\.a in the model pool"):
        SmileUpscalingAlgorithm(**options, calibration=4).run(BaseModelPool(models))
    strange = {name: data_set(sound=[1, 2]) for name in "ab"}
    models["b"].vision_model.encoder.layers[0].mlp.fc1.weight.data[0, 0] = torch.nan  # found when it is factored
    with pytest.raises(PlanError, match="training examples of 'a' have sound"):
        SmileUpscalingAlgorithm(**options, calibration=4).run(BaseModelPool(models, train_datasets=strange))
    with pytest.raises(ConfigError, match="calibration=4 needs routing_scope=input"):
        SmileUpscalingAlgorithm(calibration=4)
    with pytest.raises(ConfigError, match="calibration=-1 is not a number"):
        SmileUpscalingAlgorithm(**options, calibration=-1)
    with pytest.raises(ConfigError, match="refuse_unknown=true needs calibration"):
        SmileUpscalingAlgorithm(**options, refuse_unknown=True)


def test_refusals():
    base = mlp()
    with pytest.raises(ConfigError, match=r"did you mean 'gate_k'"):
        SmileUpscalingAlgorithm(gatek=3)
    with pytest.raises(ConfigError, match="the option expert_parameters was removed: norms and embeddings are"):
        SmileUpscalingAlgorithm(expert_parameters="norms")
    with pytest.raises(PlanError, match="no '_pretrained_' model; it has: a"):
        SmileUpscalingAlgorithm().run({"a": base})
    with pytest.raises(PlanError, match="no experts"):
        SmileUpscalingAlgorithm().run([base])


def test_the_names_of_the_frameworks_methods_for_language_models(tmp_path, caplog):
    """Those of `smile_mistral_upscaling` and `causal_lm_upscaling`; null in the configuration is no option."""
    path = str(tmp_path / "model")
    method = SmileUpscalingAlgorithm(
        num_experts_per_tok=2, rank_of_router=3, rank_of_expert=-7, model_save_path=path, accelerator="cpu",
        device="auto", gate_k=16, k=32, top_k=1, model_path=None, save_with_remote_code=True, model_type=None,
        model_dtype=None,
    )  # fmt: skip
    options = method.options
    assert (options.top_k, options.gate_k, options.k, method.model_path) == (2, 3, -1, path)
    assert options.compute_device.type == "cpu"
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("save_with_remote_code=True has no effect: checkpoints hold no code")
    assert SmileUpscalingAlgorithm(rank_of_expert=8, k=8).options.k == 8
    with pytest.raises(ConfigError, match="k=4 and rank_of_expert=8 are one option: give one of them"):
        SmileUpscalingAlgorithm(rank_of_expert=8, k=4)
    with pytest.raises(ConfigError, match="unknown option 'rank_of_experts'"):
        SmileUpscalingAlgorithm(rank_of_experts=8)


@pytest.mark.parametrize(
    ("make", "taskpool", "message"),
    [
        (
            t5,
            CLIPVisionModelTaskPool,
            "CLIPVisionModelTaskPool evaluates models of images, and the model pool has a T5For",
        ),
        (
            clip_tower,
            FlanT5GLUETextGenerationTaskPool,
            "evaluates models of texts, and the model pool has a CLIPVision",
        ),
        (clip_tower, CLIPVisionModelTaskPool, None),
        (lambda: clip_tower().vision_model, ExactCLIPVisionModelTaskPool, None),
        (t5, FlanT5GLUETextGenerationTaskPool, None),
        (mlp, DummyTaskPool, None),
        (mlp, type(None), None),
    ],
)
def test_a_task_pool_of_another_kind_is_refused_before_anything_is_built(make, taskpool, message):
    empty = taskpool.__new__(taskpool)
    if message is None:
        check_task_pool(empty, make())
        return
    with pytest.raises(PlanError, match=message):
        check_task_pool(empty, make())
