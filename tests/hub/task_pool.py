"""The framework's task pool for lm-eval without an index of lm-eval's own tasks, whose many files take seconds."""

from __future__ import annotations

from functools import partial
from unittest.mock import patch

import lm_eval.loggers.utils
import lm_eval.tasks
from fusion_bench.taskpool import LMEvalHarnessTaskPool
from torch import nn


class LMEvalLocalTaskPool(LMEvalHarnessTaskPool):
    """Knows the tasks in its `include_path` alone, and leaves out lm-eval's list of installed packages."""

    def evaluate(self, model: nn.Module, *arguments: str, **options: object) -> None:
        """See the framework."""
        manager = partial(lm_eval.tasks.TaskManager, include_defaults=False)
        without_pip_list = patch.object(lm_eval.loggers.utils, "get_pretty_env_info", str)
        with patch.object(lm_eval.tasks, "TaskManager", manager), without_pip_list:
            super().evaluate(model, *arguments, **options)
