"""A process that has imported the framework and runs its command line in forks of itself.

The imports take most of the time of a short command. `ForkServer` is the side of the tests; the file run as a script is
the server. It reads one JSON request a line: arguments, folder, and the files for standard output and error.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

MODULES = (
    "fusion_bench.method", "fusion_bench.modelpool", "fusion_bench.taskpool", "fusion_bench.scripts.cli",
    "fusion_bench_smile.framework.method", "fusion_bench_smile.framework.program",
    "fusion_bench_smile.framework.task_pools",
)  # fmt: skip


class ForkServer:
    """Starts the server with an environment, in an empty folder: the framework looks for ``config/`` when imported."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._server = subprocess.Popen(
            [sys.executable, __file__], cwd=self._folder.name, env=dict(environment), stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        atexit.register(self.close)

    def run(self, arguments: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
        """Run ``fusion_bench`` with arguments in a folder."""
        output, error = (Path(self._folder.name) / name for name in ("stdout", "stderr"))
        request = {"arguments": arguments, "cwd": str(cwd), "stdout": str(output), "stderr": str(error)}
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        code = int(self._server.stdout.readline())
        return subprocess.CompletedProcess(["fusion_bench", *arguments], code, output.read_text(), error.read_text())

    def close(self) -> None:
        """End the server."""
        self._server.kill()
        self._server.wait()
        self._folder.cleanup()


def serve() -> None:
    """Answer requests until standard input is closed, each with the exit code of its fork."""
    # one pipe for the answers, which the forks don't inherit as their standard output
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import_everything()
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            run_in_fork(request)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


def import_everything() -> None:
    """Import what commands import, without starting a thread."""
    for name in MODULES:
        import_module(name)


def run_in_fork(request: Mapping[str, Any]) -> None:
    """Run the command as the console script does, with the interpreter's exit codes."""
    os.chdir(request["cwd"])
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(request[name], os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        os.dup2(file, descriptor)
    sys.argv = [str(Path(sys.executable).with_name("fusion_bench")), *request["arguments"]]
    code: Any = 0
    try:
        from fusion_bench.scripts.cli import _hydra_main

        code = _hydra_main()
    except SystemExit as error:
        code = error.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    serve()
