"""How an error of ours ends the framework's command line: with its own line."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from .errors import SmileError

CLI = "fusion_bench.scripts.cli"


@contextmanager
def one_clear_line() -> Iterator[None]:
    """Under the framework's command line, end the program with the error's own line.

    Hydra would end it with a traceback and a hint about HYDRA_FULL_ERROR. In a sweep the error goes on as it is, for
    the launcher to record.
    """
    try:
        yield
    except SmileError as error:
        alone = HydraConfig.initialized() and HydraConfig.get().mode != RunMode.MULTIRUN
        if alone and CLI in sys.modules:
            logging.getLogger(CLI).addFilter(_without_traceback)  # the framework logs whatever ends its program
            raise SystemExit(f"error: {error}") from None
        raise


def _without_traceback(record: logging.LogRecord) -> bool:
    record.exc_info = None
    return True
