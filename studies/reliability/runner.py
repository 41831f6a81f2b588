"""The runner: every attempt in a child process, with bounded time and memory."""

from __future__ import annotations

import random
import resource
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from studies.reliability.children import Child, Send
from studies.reliability.outcomes import KINDS, Kind, Outcome, other, outcome_of

BATCH = 25  # attempts in one child process
MEMORY = 2 * 2**30  # bytes that an attempt may take beyond what the process has mapped before


class Case(NamedTuple):
    """One attempt: its number and random numbers, which depend on the seed and its name alone, and a new folder."""

    number: int
    random: random.Random
    folder: Path


class Trial(NamedTuple):
    """A kind of attempts: the function that makes one, how many there are at scale 1, and its bound of time."""

    attempt: Callable[[Any, Case], Iterable[Outcome]]
    times: int
    seconds: float = 60.0


@dataclass(frozen=True)
class Part:
    """A part of the campaign. `prepare` builds once, in a folder, what all attempts are given."""

    name: str
    prepare: Callable[[Path], Any]
    trials: Mapping[str, Trial]


@dataclass
class Row:
    """The counts of one kind of attempts, and those whose outcome is neither right nor a clear error."""

    part: str
    trial: str
    counts: dict[Kind, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    others: list[str] = field(default_factory=list)
    errors: dict[str, int] = field(default_factory=dict)  # clear error → how often

    @property
    def tried(self) -> int:
        """The number of outcomes: that of attempts, of which some have several."""
        return sum(self.counts.values())

    def add(self, name: str, outcome: Outcome) -> None:
        """Count an outcome of the attempt `name`."""
        self.counts[outcome.kind] += 1
        if outcome.kind == "other":
            self.others.append(f"{name}: {outcome.detail}")
        elif outcome.kind == "clear error":
            self.errors[outcome.detail] = self.errors.get(outcome.detail, 0) + 1


def run_part(
    part: Part, seed: int = 0, scale: float = 1.0, jobs: int = 1, chosen: Callable[[str], bool] = lambda name: True
) -> list[Row]:
    """Make all attempts of a part whose name, ``part/trial/number``, is `chosen`: one row for each kind.

    There are `scale` times as many as stated, at least one of each kind. Of `jobs` processes each makes its share.
    """
    rows = {name: Row(part.name, name) for name in part.trials}
    with tempfile.TemporaryDirectory(prefix="smile-") as folder:
        prepared = part.prepare(Path(folder))
        cases = [
            (name, number)
            for name, trial in part.trials.items()
            for number in range(max(1, round(trial.times * scale)))
            if chosen(_label(part, name, number))
        ]
        batches = [cases[start : start + BATCH] for start in range(0, len(cases), BATCH)]
        worker = _Worker(part, prepared, seed, Path(folder))
        for name, number, outcome in worker.run_all(batches, jobs):
            rows[name].add(_label(part, name, number), outcome)
    return [row for row in rows.values() if row.tried]


class _Worker:
    """Runs batches of attempts in child processes, one after the other."""

    def __init__(self, part: Part, prepared: Any, seed: int, folder: Path) -> None:
        self._part, self._prepared, self._seed, self._folder = part, prepared, seed, folder

    def run_all(self, batches: Sequence[list[tuple[str, int]]], jobs: int) -> Iterator[tuple[str, int, Outcome]]:
        if jobs == 1:
            for batch in batches:
                yield from self.run(batch)
            return

        def share(job: int, send: Send) -> None:
            for batch in batches[job::jobs]:
                for outcome in self.run(batch):
                    send(outcome)

        children = [Child(partial(share, job)) for job in range(jobs)]
        for child in children:
            yield from ((name, number, Outcome(*outcome)) for name, number, outcome in child.values())
            if code := child.wait():
                raise RuntimeError(f"a process of the campaign ended with code {code}")

    def run(self, batch: Sequence[tuple[str, int]]) -> Iterator[tuple[str, int, Outcome]]:
        """The outcomes of a batch. An attempt that ends its process, or takes too long, is another outcome."""
        left = list(batch)
        while left:
            child = Child(partial(self._attempt_all, tuple(left)), leads_group=True)
            try:
                for value in child.values():
                    if value is None:  # the attempt is complete
                        left.pop(0)
                    else:
                        yield (*left[0], Outcome(*value))
            finally:
                code = child.end()
            if left:
                yield (*left.pop(0), other(_ending(code)))

    def _attempt_all(self, cases: Iterable[tuple[str, int]], send: Send) -> None:
        mapped = psutil.Process().memory_info().vms
        resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
        for name, number in cases:
            trial = self._part.trials[name]
            folder = Path(tempfile.mkdtemp(dir=self._folder))
            generator = random.Random(f"{self._seed}/{_label(self._part, name, number)}")
            signal.setitimer(signal.ITIMER_REAL, trial.seconds)  # whose signal ends this process
            try:
                for outcome in trial.attempt(self._prepared, Case(number, generator, folder)):
                    send(outcome)
            except Exception as error:
                send(outcome_of(error)._replace(kind="other"))
            signal.setitimer(signal.ITIMER_REAL, 0)
            shutil.rmtree(folder, ignore_errors=True)
            send(None)


def _ending(code: int) -> str:
    if code == -signal.SIGALRM:
        return "it took too long"
    return f"the process was ended by {signal.Signals(-code).name}" if code < 0 else f"the process exited with {code}"


def _label(part: Part, trial: str, number: int) -> str:
    return f"{part.name}/{trial}/{number}"
