"""The individual models: a task pool with the task of one expert."""

from __future__ import annotations

import pytest
from conftest import mlp
from fusion_bench.modelpool import BaseModelPool
from fusion_bench.programs.fabric_fusion_program import FabricModelFusionProgram
from omegaconf import OmegaConf

from fusion_bench_smile import PlanError
from fusion_bench_smile.framework import IndividualModelsAlgorithm
from fusion_bench_smile.framework.program import single_task_config


def test_the_task_of_an_expert():
    pool = OmegaConf.create({"_target_": "pool", "test_datasets": {"a": 1, "b": 2}, "fast_dev_run": True})
    OmegaConf.set_struct(pool, True)
    assert single_task_config(pool, "b") == {"_target_": "pool", "test_datasets": {"b": 2}, "fast_dev_run": True}
    assert set(pool.test_datasets) == {"a", "b"}
    assert single_task_config(OmegaConf.create({"tasks": {"a": 1}}), "a") == {"tasks": {"a": 1}}
    with pytest.raises(PlanError, match="no task of the expert 'c'; its tasks are: a, b"):
        single_task_config(pool, "c")
    with pytest.raises(PlanError, match="its tasks are: unknown"):
        single_task_config(OmegaConf.create({}), "c")


def test_a_program_without_reports_can_not_evaluate_individual_models():
    method, pool = IndividualModelsAlgorithm(), BaseModelPool({"a": mlp()})
    assert [name for name, _ in method.run(pool).items()] == ["a"]
    method._program = FabricModelFusionProgram(modelpool=None, method=None)
    with pytest.raises(PlanError, match=r"add \+experiment=smile_run"):
        method.run(pool)
