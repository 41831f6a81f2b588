"""Reader of WordNet's data files; the manual page wndb(5WN) describes the format."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# names of the lexicographer files
KINDS = {4: "act", 5: "animal", 6: "artifact", 7: "attribute", 8: "body", 9: "cognition", 10: "communication",
         11: "event", 12: "feeling", 13: "food", 14: "group", 15: "location", 17: "object", 18: "person",
         19: "phenomenon", 20: "plant", 21: "possession", 22: "process", 23: "quantity", 26: "state",
         27: "substance", 28: "time"}  # fmt: skip
Place = tuple[str, int]  # part of speech, offset


@dataclass(frozen=True)
class Synset:
    """Words of one meaning.

    Attributes:
        kind: name of the lexicographer file.
        words: of the synset.
        gloss: the definition.
        pointers: relations to other synsets: symbol, place of the target, index of the word here and in the target.
    """

    kind: str
    words: tuple[str, ...]
    gloss: str
    pointers: tuple[tuple[str, Place, int, int], ...]


class WordNet:
    """The synsets of an unpacked Debian package ``wordnet-base``."""

    def __init__(self, package: Path) -> None:
        self.folder = package / "usr/share/wordnet"

    def synsets(self, pos: str) -> Iterator[Synset]:
        """Yield all synsets of a part of speech: ``noun``, ``verb`` or ``adj``."""
        yield from _read(self.folder / f"data.{pos}").values()

    def at(self, place: Place) -> Synset:
        """Look up the target of a pointer."""
        return _read(self.folder / f"data.{place[0]}")[place[1]]


@cache
def _read(file: Path) -> dict[int, Synset]:
    lines = (line for line in file.read_text().splitlines() if not line.startswith("  "))
    return {int(line[:8]): _synset(line) for line in lines}


def _synset(line: str) -> Synset:
    fields, _, gloss = line.partition(" | ")
    parts = fields.split()
    count = int(parts[3], 16)
    words = tuple(re.sub(r"\(\w+\)$", "", w).replace("_", " ") for w in parts[4 : 4 + 2 * count : 2])
    rest = parts[4 + 2 * count :]
    pointers = []
    for number in range(int(rest[0])):
        symbol, offset, pos, ends = rest[1 + 4 * number : 5 + 4 * number]
        place = ({"n": "noun", "v": "verb", "a": "adj", "s": "adj", "r": "adv"}[pos], int(offset))
        pointers.append((symbol, place, max(int(ends[:2], 16) - 1, 0), max(int(ends[2:], 16) - 1, 0)))
    meaning = re.split(r'; "|;\s*$', gloss.strip())[0].strip(' "')
    return Synset(KINDS.get(int(parts[1]), "other"), words, meaning, tuple(pointers))
