"""``smile-sweep``: the framework's command line, with the return value that optimisers need."""

from __future__ import annotations

from typing import Any

import hydra
from fusion_bench.scripts import cli
from fusion_bench.utils.hydra_utils import get_default_config_path
from omegaconf import DictConfig


@hydra.main(config_path=get_default_config_path(), config_name="fabric_model_fusion", version_base=None)
def main(config: DictConfig) -> float | None:
    """Run one job, and return its objective; see `fusion_bench_smile.program.objective_of`."""
    result: Any = cli.main(config)  # type: ignore[func-returns-value]  # its annotation says None
    report = result.get("run_report") if isinstance(result, dict) else None
    return None if report is None else report.objective


if __name__ == "__main__":
    main()
