"""Child processes, forked so that nothing has to be imported again."""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, TextIO

import torch

Send = Callable[[Any], None]


class Child:
    """A forked process that runs `work` and sends JSON values to its parent.

    Its output is discarded. An exception of `work` ends it with code 1. With `leads_group`, all processes that it
    starts are ended together with it.
    """

    _inherited: set[int] = set()  # noqa: RUF012  writing ends of pipes that a fork of this process inherits

    def __init__(self, work: Callable[[Send], None], leads_group: bool = False) -> None:
        reading, writing = os.pipe()
        self._leads_group = leads_group
        self.pid = os.fork()
        if self.pid == 0:
            os.close(reading)
            _run_in_child(work, writing, leads_group)
        os.close(writing)
        if leads_group:
            with suppress(OSError):  # the child does the same; whoever comes first
                os.setpgid(self.pid, self.pid)
        self._values: TextIO = os.fdopen(reading, encoding="utf-8")
        self._status: int | None = None

    def values(self) -> Iterator[Any]:
        """The values that the child sends, until it ends."""
        for line in self._values:
            if line.endswith("\n"):
                yield json.loads(line)

    def kill(self) -> None:
        """Kill this process alone."""
        if self._status is None:
            os.kill(self.pid, signal.SIGKILL)

    def interrupt(self) -> None:
        """Interrupt this process as Ctrl-C does."""
        if self._status is None:
            os.kill(self.pid, signal.SIGINT)

    def wait(self) -> int:
        """Wait for the end of the process: its exit code, or the negative number of the signal that ended it."""
        if self._status is None:
            self._status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._status

    def end(self) -> int:
        """End the process and, if it leads a group, all that it has started; its exit code as `wait` returns it."""
        if self._leads_group:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
        else:
            self.kill()
        self._values.close()
        return self.wait()


def _run_in_child(work: Callable[[Send], None], writing: int, leads_group: bool) -> None:
    code = 1
    try:
        if leads_group:
            os.setpgid(0, 0)
        for descriptor in Child._inherited:
            os.close(descriptor)
        Child._inherited = {writing}
        _discard_output()
        torch.set_num_threads(1)  # threads of the parent do not exist here
        gc.freeze()  # the parent's objects are many, and transformers 4.48 collects garbage after every shard
        signal.signal(signal.SIGINT, signal.default_int_handler)
        values = os.fdopen(writing, "w", encoding="utf-8")

        def send(value: Any) -> None:
            values.write(json.dumps(value) + "\n")
            values.flush()

        work(send)
        code = 0
    finally:
        os._exit(code)


def _discard_output() -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
