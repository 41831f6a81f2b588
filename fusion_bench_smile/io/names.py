"""Names that become paths: of experts, and of the files that an index lists."""

import unicodedata
from collections.abc import Iterable

from ..exceptions import PlanError
from .text import shortened

MAX_BYTES = 200  # file systems allow 255 for a file's name, of which temporary names need a part
SEPARATORS = "/\\"
MAX_SHOWN = 40  # characters of a refused name in a message


def name_problem(name: object) -> str:
    """Why a name cannot be that of an expert, a file or a folder; empty if it can."""
    if not isinstance(name, str):
        return f"{shortened(repr(name), MAX_SHOWN)} is no string"
    if not name.strip() or name in (".", ".."):
        return f"{name!r} names no file or folder"
    if len(name.encode("utf-8", errors="replace")) > MAX_BYTES:
        return f"{shortened(repr(name), MAX_SHOWN)} is longer than {MAX_BYTES} bytes"
    bad = next((c for c in name if c in SEPARATORS or unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")), None)
    return f"{shortened(repr(name), MAX_SHOWN)} contains {bad!r}" if bad else ""


def check_expert_names(names: Iterable[object]) -> None:
    """Raise PlanError for a name of an expert that cannot be the name of a folder, or that occurs twice.

    Adapters are exported to folders of these names, so that they must not leave the folder around them.
    """
    seen: set[object] = set()
    for name in names:
        if problem := name_problem(name):
            raise PlanError(f"the expert's name {problem}: use a plain name, such as sun397")
        if name in seen:
            raise PlanError(f"two experts are called {name!r}: give each a name of its own")
        seen.add(name)
