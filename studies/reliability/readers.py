"""Readers: a checkpoint is loaded again and again while another process replaces it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torch import nn
from transformers import CLIPVisionModel

from fusion_bench_smile import load
from studies.reliability.children import Child, Send
from studies.reliability.models import identity, perceptron
from studies.reliability.outcomes import Outcome, check, judge
from studies.reliability.runner import Case, Part, Trial
from studies.reliability.targets import Target, checkpoint_targets, sampled

LOADS = 2  # in a session, during which a writer and an observer are at work
PAUSES = {"writer": 0.15, "reader": 0.05}  # seconds between two writes and two loads, at most


class Session(NamedTuple):
    """What is replaced, how it is read, and the exceptions that transformers raises for missing files."""

    target: str  # of `checkpoint_targets`
    read: Callable[[Path], str]
    allowed: tuple[type, ...] = ()


def _from_pretrained(path: Path) -> nn.Module:
    try:
        model: nn.Module = CLIPVisionModel.from_pretrained(path)
    except RuntimeError as error:  # torch's error of a shard that is gone when it is mapped into memory
        if "unable to open file" not in str(error):
            raise
        raise OSError(str(error)) from None
    return model


def _session(target: str, read: Callable[[Path], nn.Module], allowed: tuple[type, ...] = ()) -> Session:
    return Session(target, lambda path: identity(read(path)), allowed)


SESSIONS = {
    "load, same shards": _session("save, shards", load),
    "load, other numbers of shards": _session("save, other numbers of shards", load),
    "load(verify=True)": _session("save, shards", partial(load, verify=True)),
    "load, router for whole inputs": _session("save, router for whole inputs", load),
    "load, not of transformers": _session("save, not of transformers", lambda path: load(path, perceptron())),
    "from_pretrained, same shards": _session("save, shards", _from_pretrained, (OSError,)),
    "from_pretrained, other numbers of shards": _session("save, other numbers of shards", _from_pretrained, (OSError,)),
}


def prepare(folder: Path) -> dict[str, Target]:
    """All checkpoints."""
    return sampled(checkpoint_targets(folder), folder)


def attempt(prepared: dict[str, Target], case: Case, session: Session) -> Iterator[Outcome]:
    """The outcome of every load in one session, and one of the path, which must never be absent."""
    target, path = prepared[session.target], case.folder / "target"
    expected = {value for version in target.versions[:2] for value in version.values()}
    target.begin(path)
    writer = Child(lambda send: _replace_for_ever(target, path, case))
    observer = Child(lambda send: _observe(path, send))
    for _ in range(LOADS):
        time.sleep(case.random.uniform(0, PAUSES["reader"]))
        yield judge(
            lambda: session.read(path), lambda found: check(found in expected, "another model"), session.allowed
        )
    observer.kill()
    yield check(not list(observer.values()), "the path was absent")
    yield check(writer.end() < 0, "the writer failed")


def _replace_for_ever(target: Target, path: Path, case: Case) -> None:
    version = 0
    while True:
        version = 1 - version
        target.write(path, version)
        time.sleep(case.random.uniform(0, PAUSES["writer"]))


def _observe(path: Path, send: Send) -> None:
    while path.is_dir():
        time.sleep(0.0003)  # it must not take a core
    send("absent")


PART = Part(
    "readers", prepare, {name: Trial(partial(attempt, session=session), 50) for name, session in SESSIONS.items()}
)
