"""Short-lived forks of the test process. They start at once, unlike new interpreters."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Sequence


def start(function: Callable[[], object]) -> int:
    """Run a function in a fork of this process, which must not use torch; the process number is returned."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        function()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def succeed(children: Sequence[int]) -> bool:
    """Wait for some processes; whether the functions of all returned."""
    ended = [os.waitpid(child, 0) for child in children]
    return all(status == 0 for _, status in ended)
