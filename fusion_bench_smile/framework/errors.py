"""Errors of this package at the framework's command line: one line instead of two tracebacks."""

import logging

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from ..exceptions import SmileError

log = logging.getLogger(__name__)
COMMAND_LINE = "fusion_bench.scripts.cli"  # the framework's module, and the name of its logger


def exit_on_smile_error(record: logging.LogRecord) -> bool:
    """End the framework's command line with the message of a `SmileError`: a filter for its logger.

    The framework logs the exception that ends a run with a traceback, and raises it again for Hydra, which prints the
    traceback a second time. This filter logs the message alone and exits before that. In a sweep the exception is
    passed on, so that the launcher records it and the other jobs run. All other records are logged as they are.
    Raises SystemExit for a `SmileError` that ends a single run.
    """
    error = record.exc_info[1] if record.exc_info else None
    single_run = HydraConfig.initialized() and HydraConfig.get().mode != RunMode.MULTIRUN
    if isinstance(error, SmileError) and single_run:
        log.error("%s", error)
        raise SystemExit(f"error: {error}")
    return True
