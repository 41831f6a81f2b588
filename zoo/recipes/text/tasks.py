"""Texts of the eight tasks, from unpacked Debian packages.

The origin of a text is the unit that it is cut from: a source package, a fortune, a manual page, a chapter, a word.
No origin is in two splits.
"""

from __future__ import annotations

import gzip
import hashlib
import logging
import random
import re
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from recipes.text.wordnet import WordNet

log = logging.getLogger(__name__)

DEBIAN = ["bible-kjv", "bible-kjv-text", "fortunes", "manpages", "manpages-dev", "wordnet-base"]
TRANSLATED = {"da": "da", "de": "de", "es": "es", "fi": "fi", "fr": "fr", "it": "it", "nl": "nl", "pl": "pl",
              "pt": "pt-br", "sv": "sv"}  # fmt: skip
DEBIAN += [f"manpages-{package}" for package in TRANSLATED.values()]

SIZES = {"train": 2400, "validation": 300, "test": 600}
WORDS = 20  # longest text
SHARES = (("test", 0.25), ("validation", 0.15), ("train", 0.6))  # of the origins


@dataclass(frozen=True)
class Entry:
    """A text or a pair of texts with its class and its origin."""

    label: str
    origin: str
    text: str
    pair: str | None = None


def package_sections(root: Path) -> Iterator[Entry]:
    """Yield synopses of Debian packages with the section of the archive, one per source package."""
    sections = ("admin", "database", "devel", "games", "graphics", "mail", "math", "net", "science", "sound", "text",
                "web")  # fmt: skip
    sources = set()
    for fields in available_packages():
        source = fields.get("Source", fields.get("Package", "")).split(" ")[0]
        if fields.get("Section") in sections and "Description" in fields and source not in sources:
            sources.add(source)
            yield Entry(fields["Section"], source, fields["Description"])


def available_packages() -> Iterator[dict[str, str]]:
    """Yield the single-line fields of every package in apt's index."""
    index = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=True).stdout
    for paragraph in index.split("\n\n"):
        yield dict(line.split(": ", 1) for line in paragraph.splitlines() if re.match(r"[A-Z][\w-]*: ", line))


def noun_glosses(root: Path) -> Iterator[Entry]:
    """Yield WordNet's definitions of nouns with their lexicographer file."""
    kinds = {"act", "animal", "artifact", "body", "cognition", "communication", "food", "location", "person", "plant",
             "state", "substance"}  # fmt: skip
    for synset in WordNet(root / "wordnet-base").synsets("noun"):
        if synset.kind in kinds and len(synset.gloss.split()) >= 4:
            yield Entry(synset.kind, synset.words[0], synset.gloss)


def fortunes(root: Path) -> Iterator[Entry]:
    """Yield fortunes with the name of their file."""
    files = ("computers", "definitions", "men-women", "people", "perl", "platitudes", "politics", "science",
             "songs-poems", "startrek", "work", "zippy")  # fmt: skip
    for name in files:
        text = (root / "fortunes/usr/share/games/fortunes" / name).read_text(errors="replace")
        for fortune in re.split(r"\n%\n", text):
            body = fortune.split("\n\t\t--")[0].replace("\b", "")
            yield Entry(name, body, body)


def manual_languages(root: Path) -> Iterator[Entry]:
    """Yield sentences of manual pages with their language."""
    folders = {"en": root / "manpages"} | {lang: root / f"manpages-{name}" for lang, name in TRANSLATED.items()}
    for language, folder in folders.items():
        for page, _, sentence in _manual_sentences(folder):
            yield Entry(language, page, sentence)


def bible_books(root: Path) -> Iterator[Entry]:
    """Yield verses of the King James Version with the group of their book."""
    groups = {"law": 5, "history": 12, "poetry": 5, "prophets": 17, "gospels": 5, "epistles": 22}
    book_groups = [group for group, books in groups.items() for _ in range(books)]
    titles: list[str] = []
    chapter = ""
    for line in _verses(root):
        if (verse := re.match(r"\s+\d+ (.*)", line)) and titles:
            yield Entry(book_groups[len(titles) - 1], chapter, verse[1])
        elif re.match(r"\S.* \d+$", line):
            chapter = line
            if line.rsplit(" ", 1)[0] not in titles:
                titles.append(line.rsplit(" ", 1)[0])


def _verses(root: Path) -> list[str]:
    command = [str(root / "bible-kjv/usr/bin/bible"), "-p", str(root / "bible-kjv-text/usr/lib"), "-l10000"]
    return subprocess.run([*command, "gen1:1-rev22:21"], capture_output=True, text=True, check=True).stdout.splitlines()


def manual_headings(root: Path) -> Iterator[Entry]:
    """Yield sentences of English manual pages with the heading of their section."""
    names = {"DESCRIPTION": "description", "RETURN VALUE": "return value", "ERRORS": "errors", "NOTES": "notes",
             "VERSIONS": "versions", "BUGS": "bugs"}  # fmt: skip
    for folder in (root / "manpages", root / "manpages-dev"):
        for page, heading, sentence in _manual_sentences(folder):
            if heading in names:
                yield Entry(names[heading], page, sentence)


def _manual_sentences(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Yield page, heading and sentence."""
    for file in sorted(folder.rglob("*.[1-8]*.gz")):
        if file.is_symlink() or "doc" in file.parts:
            continue
        source = gzip.decompress(file.read_bytes()).decode(errors="replace")
        for section in re.split(r"\n\.SH ", source)[1:]:
            heading, _, body = section.partition("\n")
            for sentence in re.split(r"(?<=[.:!?])\s+|\n\n", _plain(body)):
                if len(sentence.split()) >= 5:
                    yield file.name, heading.strip().strip('"'), sentence


def _plain(roff: str) -> str:
    lines = []
    for line in roff.splitlines():
        if re.match(r"\.(B|I|BR|IR|RB|RI|BI|IB) ", line):
            line = line.split(" ", 1)[1].replace('" "', "").replace('"', "")
        elif line.startswith((".", "'")):
            line = ""  # macros separate paragraphs
        lines.append(line)
    text = re.sub(r"\\f(\[\w*\]|\(..|.)|\\[,/&%|^]|\\m\[\w*\]|\\s[+-]?\d", "", "\n".join(lines))
    text = re.sub(r"\\\((..)", _special, text).replace(r"\-", "-").replace(r"\(aq", "'").replace(r"\e", "\\")
    return re.sub(r"[ \t]+", " ", re.sub(r"(?<!\n)\n(?!\n)", " ", text))


def _special(match: re.Match[str]) -> str:
    return {"aq": "'", "dq": '"', "lq": '"', "rq": '"', "em": "-", "en": "-", "co": "©", "ti": "~"}.get(match[1], "")


def word_relations(root: Path) -> Iterator[Entry]:
    """Yield pairs of WordNet's words with the relation of the second to the first."""
    net, rng = WordNet(root / "wordnet-base"), random.Random(0)
    named = {"!": "antonym", "@": "kind of", "#p": "part of"}
    words_by_pos = []
    for pos in ("noun", "verb", "adj"):
        synsets = list(net.synsets(pos))
        words_by_pos.append([s.words[0] for s in synsets])
        for synset in synsets:
            word = synset.words[0]
            if len(synset.words) > 1:
                yield Entry("synonym", word, word, synset.words[1])
            for symbol, target, here, there in synset.pointers:
                if symbol in named and not (symbol != "!" and rng.random() > 0.2):
                    other = net.at(target)
                    yield Entry(named[symbol], synset.words[here], synset.words[here], other.words[there])
    for words in words_by_pos:
        for _ in range(len(words) // 8):
            first, second = rng.sample(words, 2)
            yield Entry("unrelated", first, first, second)


def definitions(root: Path) -> Iterator[Entry]:
    """Yield words, each with its definition or that of another word of the same lexicographer file."""
    net, rng = WordNet(root / "wordnet-base"), random.Random(1)
    by_kind = defaultdict(list)
    for synset in net.synsets("noun"):
        if len(synset.gloss.split()) >= 4:
            by_kind[synset.kind].append(synset)
    for synsets in by_kind.values():
        for synset in synsets:
            fits = rng.random() < 0.5
            gloss = synset.gloss if fits else rng.choice(synsets).gloss
            yield Entry("fits" if fits else "another", synset.words[0], synset.words[0], gloss)


GENERATORS: dict[str, Callable[[Path], Iterator[Entry]]] = {
    "sections": package_sections,
    "glosses": noun_glosses,
    "fortunes": fortunes,
    "languages": manual_languages,
    "bible": bible_books,
    "headings": manual_headings,
    "relations": word_relations,
    "definitions": definitions,
}
Texts = dict[str, pd.DataFrame]


def build_task(task: str, root: Path) -> Texts:
    """Build the splits of a task from the unpacked packages below `root`.

    Returns:
        For each split a table with the columns ``text``, ``pair`` (for pairs of texts) and ``label`` (class name).
        Classes are as balanced as their sizes allow, and every text occurs once.

    Raises:
        RuntimeError: if the packages hold too few texts.
    """
    entries: dict[str, dict[str, list[Entry]]] = {split: defaultdict(list) for split in SIZES}
    drawn = set()
    for entry in GENERATORS[task](root):
        text, pair = short(entry.text), None if entry.pair is None else short(entry.pair)
        if (text, pair) not in drawn and len(text) > 2 and text != pair:
            drawn.add((text, pair))
            entries[split_of(task, entry.origin)][entry.label].append(Entry(entry.label, entry.origin, text, pair))
    splits = {split: _balanced(by_label, SIZES[split], task) for split, by_label in entries.items()}
    for split, table in splits.items():
        log.info("%s, %s: %s", task, split, table["label"].value_counts().to_dict())
    return splits


def short(text: str, words: int = WORDS) -> str:
    """Cut a text after a number of words; whitespace is normalised."""
    return " ".join(text.split()[:words])


def split_of(task: str, origin: str) -> str:
    """Assign an origin to a split, by a hash of its name."""
    place = int.from_bytes(hashlib.sha256(f"{task} {origin}".encode()).digest()[:4], "big") / 2**32
    for split, share in SHARES[:-1]:
        if place < share:
            return split
        place -= share
    return "train"


def _balanced(by_label: dict[str, list[Entry]], count: int, task: str) -> pd.DataFrame:
    """Draw `count` texts, one class after the other in turn."""
    rng = random.Random(f"{task} {count}")
    queues = [rng.sample(entries, len(entries)) for _, entries in sorted(by_label.items())]
    drawn: list[Entry] = []
    while len(drawn) < count and any(queues):
        drawn += [queue.pop() for queue in queues if queue]
    if len(drawn) < count:
        raise RuntimeError(f"{task}: the packages hold {len(drawn)} texts, {count} are needed")
    drawn = rng.sample(drawn[:count], count)
    columns: dict[str, Sequence[str | None]] = {"text": [e.text for e in drawn]}
    if drawn[0].pair is not None:
        columns["pair"] = [e.pair for e in drawn]
    return pd.DataFrame({**columns, "label": [e.label for e in drawn]})
