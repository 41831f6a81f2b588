"""``smile-sweep``: the framework's command line with a return value for the optimisers among Hydra's sweepers."""

from typing import Any

import hydra
from fusion_bench.scripts import cli
from fusion_bench.utils.hydra_utils import get_default_config_path
from omegaconf import DictConfig


@hydra.main(config_path=get_default_config_path(), config_name="fabric_model_fusion", version_base=None)
def main(config: DictConfig) -> float | None:
    """Run one job and return its objective, in percent (see `objective_of`); None without a report."""
    result: Any = cli.main(config)  # type: ignore[func-returns-value]  # annotated as None
    report = result.get("run_report") if isinstance(result, dict) else None
    return None if report is None else report.objective
