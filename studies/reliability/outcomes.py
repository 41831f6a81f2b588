"""Outcomes: right, a clear error, or anything else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Literal, NamedTuple, TypeVar

from fusion_bench_smile import SmileError

T = TypeVar("T")
Kind = Literal["right", "clear error", "other"]
KINDS: tuple[Kind, ...] = ("right", "clear error", "other")
MAX_MESSAGE = 4000  # characters of a clear error
MAX_DETAIL = 300  # characters that are kept of a message


class Outcome(NamedTuple):
    """What came of one attempt. The detail describes an error, or what is wrong."""

    kind: Kind
    detail: str = ""


RIGHT = Outcome("right")


def other(detail: str) -> Outcome:
    """Anything that must not happen."""
    return Outcome("other", _shortened(detail))


def check(holds: bool, problem: str) -> Outcome:
    """Right if a condition holds, otherwise `problem`."""
    return RIGHT if holds else other(problem)


def judge(action: Callable[[], T], examine: Callable[[T], Outcome], allowed: tuple[type, ...] = ()) -> Outcome:
    """The outcome of an action: `examine` judges its result, and `outcome_of` its error."""
    try:
        result = action()
    except BaseException as error:
        return outcome_of(error, allowed)
    return examine(result)


def outcome_of(error: BaseException, allowed: tuple[type, ...] = ()) -> Outcome:
    """A clear error is a `SmileError` (or of a type that is `allowed` here) with a message of one line.

    An error that hides a lack of memory is none: memory must not be asked for because a file says so.
    """
    message, name = str(error), type(error).__name__
    if any(_lacks_memory(each) for each in _chain(error)):
        return other(f"memory was asked for: {name}: {message}")
    if not isinstance(error, (SmileError, *allowed)):
        return other(f"raw {name}: {message}")
    if not message.strip() or len(message.splitlines()) > 1 or len(message) > MAX_MESSAGE:
        return other(f"no message of one line: {name}: {message!r}")
    return Outcome("clear error", _shortened(message))


def combined(outcomes: Iterable[Outcome]) -> Outcome:
    """The worst of several outcomes of one attempt: another one, else a clear error, else right."""
    found = list(outcomes)
    for kind in ("other", "clear error"):
        if matching := [outcome for outcome in found if outcome.kind == kind]:
            return matching[0]
    return RIGHT


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _lacks_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or any(
        text in str(error) for text in ("can't allocate memory", "Cannot allocate memory", "out of memory")
    )


def _shortened(text: str) -> str:
    line = " ".join(ascii(text)[1:-1].split())
    return line if len(line) <= MAX_DETAIL else f"{line[: MAX_DETAIL - 1]}…"
