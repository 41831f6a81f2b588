"""In the place of the Python interpreter: passes a command line of the framework to tests/fork_server.py.

The server lies in the folder of this program. The program ends as the fork does, passes signals on, and takes the fork
with it when killed. A command line of something else, and an environment with other variables than the server's, of
which imports may read some, are for the real interpreter.
"""

import json
import os
import signal
import socket
import sys

FOLDER = os.path.dirname(os.path.abspath(__file__))
COMMAND_LINE = "fusion_bench.scripts.cli"
PROGRAMS = ("fusion_bench", "smile-sweep")
READ_LATER = {"COLUMNS", "PWD", "OLDPWD", "SHLVL", "_", "SLURM_JOB_NAME", "PL_GLOBAL_SEED", "LOCAL_RANK", "NODE_RANK",
              "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}  # fmt: skip
PREFIXES_READ_LATER = ("PYTEST_", "HYDRA_")


def is_served(arguments: list) -> bool:
    """Whether this is a command line of the framework in the environment of the server."""
    programs = [os.path.join(os.path.dirname(sys.executable), program) for program in PROGRAMS]
    of_framework = arguments[:2] == ["-m", COMMAND_LINE] or arguments[:1] in [[program] for program in programs]
    if not of_framework and arguments[:3] != ["-X", "fork", "-c"]:
        return False
    with open(os.path.join(FOLDER, "environment.json")) as file:
        before, after = json.load(file)
    names = {name for name in {*before, *os.environ} if not is_read_later(name)}
    return all(os.environ.get(name) in (before.get(name), after.get(name)) for name in names)


def is_read_later(name: str) -> bool:
    """Whether the server's imports don't read this variable, or repeat it in the fork."""
    return name in READ_LATER or name.startswith(PREFIXES_READ_LATER)


def main() -> None:
    """Run the command line and end with its exit code."""
    arguments = sys.argv[1:]
    if not is_served(arguments):
        os.execv(sys.executable, [sys.executable, *arguments])
    server = socket.socket(socket.AF_UNIX)
    server.connect(os.path.join(FOLDER, "socket"))
    request = {"arguments": arguments, "cwd": os.getcwd(), "environment": dict(os.environ)}
    line = json.dumps(request).encode() + b"\n"
    sent = socket.send_fds(server, [line], [0, 1, 2])
    server.sendall(line[sent:])
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _: server.sendall(bytes([number])))
    code = int(server.makefile().readline() or 1)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
        os.kill(os.getpid(), -code)
    sys.exit(code)


main()
