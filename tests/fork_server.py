"""A process that has imported the framework and runs command lines in forks of itself.

The imports take most of the time of a short command. `ForkingPython` is the side of the tests: a program that takes the
place of the Python interpreter for the framework's command lines. It is also the `sys.executable` of the forks, so
that the processes which Fabric or a sweep launch are forks too. All else runs in the real interpreter. The file run
as a script is the server; tests/fork_client.py is the program.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

MODULES = (
    "fusion_bench.method", "fusion_bench.modelpool", "fusion_bench.taskpool", "fusion_bench.scripts.cli",
    "fusion_bench_smile.framework.method", "fusion_bench_smile.framework.program",
    "fusion_bench_smile.framework.task_pools",
)  # fmt: skip
COMMAND_LINE = "fusion_bench.scripts.cli"
CLIENT = Path(__file__).with_name("fork_client.py")
LARGEST_REQUEST = 2**20  # bytes
RUN = os.environ.get("PYTEST_XDIST_TESTRUNUID", f"{time.time_ns()}-{os.getpid()}")
FOLDER = Path(tempfile.gettempdir()) / f"fork-server-{RUN}"  # of the run of the tests, for all its workers


class ForkingPython:
    """The program in the place of Python, with a server of an environment; a test run has one server for all workers.

    The server ends with the last of these objects; `in_use` has those of this process.
    """

    in_use: ClassVar[list[ForkingPython]] = []

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._folder = FOLDER
        self._server: subprocess.Popen | None = None
        self._lease = socket.socket(socket.AF_UNIX)
        while self._lease.connect_ex(str(self._folder / "socket")):
            with suppress(FileExistsError):
                self._folder.mkdir()
                self._start(environment)
            assert self._server is None or self._server.poll() is None, "the server has ended"
            time.sleep(0.05)
        self._lease.sendall(b"{}\n")
        self.in_use.append(self)

    @property
    def path(self) -> str:
        """The program."""
        return str(self._folder / "python")

    def close(self) -> None:
        """Close the lease, and wait for the end of a server that this object started."""
        self._lease.close()
        if self._server is not None:
            self._server.wait()
            shutil.rmtree(self._folder)

    def _start(self, environment: Mapping[str, str]) -> None:
        """Write the program and start the server in an empty folder: the framework looks for ``config/`` at import."""
        program, empty = self._folder / "python", self._folder / "empty"
        program.write_text(f"#!{sys.executable} -IS\n{CLIENT.read_text()}")
        program.chmod(0o755)
        empty.mkdir()
        self._server = subprocess.Popen(
            [sys.executable, __file__, str(self._folder)], cwd=empty, env=dict(environment), stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip


class Server:
    """Runs requests in forks until the last lease is closed.

    A request is one line of JSON with the descriptors for standard input, output and error; a lease is an empty one.
    The answer is the exit code. Further bytes of a request's connection are signals for its fork; the fork and the
    processes of its group are killed when the connection ends.
    """

    def __init__(self, folder: Path) -> None:
        self._before = dict(os.environ)
        for name in MODULES:
            importlib.import_module(name)
        self.changes = {key: value for key, value in os.environ.items() if self._before.get(key) != value}
        gc.collect()
        gc.freeze()  # the forks' collections leave out what they share
        (folder / "environment.json").write_text(json.dumps([self._before, dict(os.environ)]))
        self._folder = folder
        self._leases: set[socket.socket] = set()
        self._forks: dict[int, socket.socket] = {}
        self._selector = selectors.DefaultSelector()
        self._ended, notify = os.pipe()
        os.set_blocking(notify, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(notify)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(folder / "socket"))
        self._listener.listen(64)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(self._ended, selectors.EVENT_READ, self._answer)

    def serve(self) -> None:
        """Serve until there was a lease and there is none."""
        waiting = True
        while waiting or self._leases:
            for key, _ in self._selector.select():
                key.data()
            waiting = waiting and not self._leases

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._start(connection))

    def _start(self, connection: socket.socket) -> None:
        """Read a request and fork."""
        line, descriptors, _, _ = socket.recv_fds(connection, LARGEST_REQUEST, 3)
        while line and not line.endswith(b"\n"):
            line += connection.recv(LARGEST_REQUEST)
        request = json.loads(line or "null")
        if not request:
            self._leases.add(connection)
            self._selector.modify(connection, selectors.EVENT_READ, lambda: self._close(connection))
            return
        fork = os.fork()
        if fork == 0:
            run_in_fork(request, descriptors, self.changes, str(self._folder / "python"))
        for descriptor in descriptors:
            os.close(descriptor)
        self._forks[fork] = connection
        self._selector.modify(connection, selectors.EVENT_READ, lambda: self._signal(fork, connection))

    def _close(self, connection: socket.socket) -> None:
        self._leases.discard(connection)
        self._selector.unregister(connection)
        connection.close()

    def _signal(self, fork: int, connection: socket.socket) -> None:
        """Pass on signals; kill the fork whose client has ended."""
        if fork not in self._forks:  # has ended in this round of events
            return
        for number in connection.recv(1):
            os.kill(fork, number)
            return
        self._close(connection)
        os.kill(fork, signal.SIGKILL)
        with suppress(ProcessLookupError):  # no group: killed before it ran
            os.killpg(fork, signal.SIGKILL)

    def _answer(self) -> None:
        """Send the exit codes of forks that have ended."""
        os.read(self._ended, 4096)
        for fork, connection in list(self._forks.items()):
            ended, status = os.waitpid(fork, os.WNOHANG)
            if ended:
                del self._forks[fork]
                with suppress(OSError):
                    connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
                if connection.fileno() >= 0:
                    self._close(connection)


def run_in_fork(request: Mapping[str, Any], descriptors: list[int], changes: Mapping[str, str], python: str) -> None:
    """Run a command line as the interpreter does, as the leader of a group of processes, and exit with its code."""
    os.setsid()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for place, descriptor in enumerate(descriptors):
        os.dup2(descriptor, place)
    os.closerange(3, max(descriptors) + 64)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update({**request["environment"], **changes})
    sys.executable = python
    code: Any = 0
    try:
        forget_the_start()
        run(request["arguments"])
    except SystemExit as error:
        code = error.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()  # what the interpreter does besides freeing memory
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def forget_the_start() -> None:
    """Undo what the imports derived from the server's folder and environment."""
    from lightning.fabric.utilities.rank_zero import _get_rank, rank_zero_only

    rank_zero_only.rank = _get_rank() or 0
    del sys.modules[COMMAND_LINE]  # looks for the folder of the configuration
    del sys.modules["fusion_bench.scripts"].cli


def run(arguments: list[str]) -> None:
    """Run a script, a module after ``-m``, or code after ``-X fork -c``, as the main program."""
    if arguments[0] == "-X":
        sys.path[0] = ""
        sys.argv = ["-c", *arguments[4:]]
        exec(compile(arguments[3], "<string>", "exec"), vars(sys.modules["__main__"]))
    elif arguments[0] == "-m":
        sys.path[0] = os.getcwd()
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(arguments[0]).parent)
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    Server(Path(sys.argv[1])).serve()
