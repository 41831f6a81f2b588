"""Errors of this package end a single run of the framework's command line in one line; all others are passed on."""

from __future__ import annotations

import logging

import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf

from fusion_bench_smile import PlanError
from fusion_bench_smile.framework import exit_on_smile_error


def end_with(error: Exception) -> None:
    """What the framework's command line does with the error that ends a run."""
    log = logging.getLogger("tests.framework.command_line")
    log.addFilter(exit_on_smile_error)
    try:
        raise error
    except Exception as raised:
        log.error(raised, exc_info=True)
        raise


@pytest.fixture
def hydra_mode(monkeypatch, request) -> None:
    mode = request.param
    config = None if mode is None else OmegaConf.create({"hydra": {"mode": mode}})
    monkeypatch.setattr(HydraConfig.instance(), "cfg", config)


@pytest.mark.parametrize("hydra_mode", [RunMode.RUN], indirect=True)
def test_a_single_run_exits_with_the_message(hydra_mode, caplog):
    with pytest.raises(SystemExit) as ended:
        end_with(PlanError("no experts"))
    assert ended.value.code == "error: no experts"
    (record,) = caplog.records
    assert (record.getMessage(), record.exc_info) == ("no experts", None)


@pytest.mark.parametrize("hydra_mode", [RunMode.MULTIRUN, None], indirect=True)
def test_sweeps_and_programs_without_hydra_get_the_error(hydra_mode):
    with pytest.raises(PlanError):
        end_with(PlanError("no experts"))


@pytest.mark.parametrize("hydra_mode", [RunMode.RUN], indirect=True)
def test_other_errors_keep_their_traceback(hydra_mode, caplog):
    with pytest.raises(RuntimeError):
        end_with(RuntimeError("out of memory"))
    (record,) = caplog.records
    assert record.exc_info is not None
