"""Eight tasks with GLUE's columns, composed of verses, definitions, synopses and a sentiment lexicon.

No verse, synset or source package is in both splits.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd

from recipes.text.tasks import Entry, available_packages, bible_books, noun_glosses, short, split_of

DEBIAN = ["bible-kjv", "bible-kjv-text", "wordnet-base"]
PYPI = ["vaderSentiment==3.3.2"]
SIZES = {"train": 12000, "validation": 400}
WORDS = 12  # longest text
KINDS = ("animal", "artifact", "food", "location", "person", "plant")
Row = dict[str, Any]
Splits = dict[str, pd.DataFrame]


def acceptability(root: Path, rng: random.Random) -> Iterator[tuple[str, Row]]:
    """CoLA: a verse, or its words in random order."""
    for verse in _verses(root):
        words, label = verse.text.split(), rng.randrange(2)
        if not label:
            rng.shuffle(words)
        yield verse.origin, {"sentence": " ".join(words), "label": label}


def inference(root: Path, rng: random.Random) -> Iterator[tuple[str, Row]]:
    """MNLI: a definition and the kind of thing it defines, or another kind; neutral if the premise is a verse."""
    glosses, verses = _glosses(root), _verses(root)
    for gloss in glosses:
        label = rng.randrange(3)
        kind = gloss.label if label == 0 else rng.choice([k for k in KINDS if k != gloss.label])
        premise = rng.choice(verses).text if label == 1 else gloss.text
        yield gloss.origin, {"premise": premise, "hypothesis": f"this is some {kind}", "label": label}


def paraphrase(root: Path, rng: random.Random) -> Iterator[tuple[str, Row]]:
    """MRPC: a verse, and the same verse without some words or the next verse."""
    verses = _verses(root)
    for verse, following in pairwise(verses):
        words, label = verse.text.split(), rng.randrange(2)
        fewer = " ".join(word for word in words if rng.random() < 0.7) or words[0]
        yield verse.origin, {"sentence1": verse.text, "sentence2": fewer if label else following.text, "label": label}


def answers(root: Path, rng: random.Random) -> Iterator[tuple[str, Row]]:
    """QNLI: a question about a kind of thing, and a definition of this or of another kind."""
    glosses = _glosses(root)
    for gloss in glosses:
        label = rng.randrange(2)
        kind = rng.choice([k for k in KINDS if k != gloss.label]) if label else gloss.label
        yield gloss.origin, {"question": f"which {kind} is it?", "sentence": gloss.text, "label": label}


def duplicates(root: Path, rng: random.Random) -> Iterator[tuple[str, Row]]:
    """QQP: questions for two packages, from the same source package or from different ones."""
    by_source = defaultdict(list)
    for fields in available_packages():
        if "Description" in fields:
            by_source[fields.get("Source", fields["Package"]).split(" ")[0]].append(fields["Description"])
    several = {source: sorted(set(texts)) for source, texts in by_source.items() if len(set(texts)) > 1}
    sources = sorted(several)
    for source in sources:
        for _ in range(min(len(several[source]), 6)):
            label = rng.randrange(2)
            first, second = rng.sample(several[source], 2)
            second = second if label else rng.choice(several[rng.choice(sources)])
            questions = [f"where is {short(text, WORDS)}?" for text in (first, second)]
            yield source, {"question1": questions[0], "question2": questions[1], "label": label}


def entailment(root: Path, rng: random.Random) -> Iterator[tuple[str, Row]]:
    """RTE: a verse, and a part of this or of another verse."""
    verses = _verses(root)
    for verse in verses:
        label = rng.randrange(2)
        words = (rng.choice(verses) if label else verse).text.split()
        start = rng.randrange(max(len(words) - 5, 1))
        yield verse.origin, {"sentence1": verse.text, "sentence2": " ".join(words[start : start + 5]), "label": label}


def sentiment(root: Path, rng: random.Random) -> Iterator[tuple[str, Row]]:
    """SST-2: a verse; the label is the sign of the summed ratings of its words in the VADER lexicon."""
    lexicon = (root / "vaderSentiment/vaderSentiment/vader_lexicon.txt").read_text(encoding="utf-8")
    rating = {line.split("\t")[0]: float(line.split("\t")[1]) for line in lexicon.splitlines()}
    for verse in _verses(root):
        total = sum(rating.get(word.strip(".,:;?!"), 0) for word in verse.text.split())
        if not -1 < total < 2:  # balances the classes
            yield verse.origin, {"sentence": verse.text, "label": int(total > 0)}


def similarity(root: Path, rng: random.Random) -> Iterator[tuple[str, Row]]:
    """STS-B: a verse, and a mixture with another verse; the label is 5 times the share of equal words, rounded."""
    verses = _verses(root)
    for verse in verses:
        words, other = verse.text.split(), rng.choice(verses).text.split()
        kept = rng.randrange(6)
        mixed = [word if rng.randrange(5) < kept else rng.choice(other) for word in words]
        shared = sum(a == b for a, b in zip(words, mixed, strict=True)) / len(words)
        yield verse.origin, {"sentence1": verse.text, "sentence2": " ".join(mixed), "label": float(round(5 * shared))}


GENERATORS: dict[str, Callable[[Path, random.Random], Iterator[tuple[str, Row]]]] = {
    "cola": acceptability,
    "mnli": inference,
    "mrpc": paraphrase,
    "qnli": answers,
    "qqp": duplicates,
    "rte": entailment,
    "sst2": sentiment,
    "stsb": similarity,
}


def build_task(task: str, root: Path) -> Splits:
    """Build the splits of a task from the unpacked packages below `root`: one table each, with GLUE's columns."""
    rng = random.Random(task)
    rows: dict[str, list[Row]] = {split: [] for split in SIZES}
    for origin, row in GENERATORS[task](root, rng):
        rows["validation" if split_of(task, origin) == "test" else "train"].append(row)
    return {s: pd.DataFrame(rng.sample(rows[s], min(count, len(rows[s])))) for s, count in SIZES.items()}


def _verses(root: Path) -> list[Entry]:
    return [_shortened(verse) for verse in bible_books(root) if len(verse.text.split()) >= 6]


def _glosses(root: Path) -> list[Entry]:
    return [_shortened(gloss) for gloss in noun_glosses(root) if gloss.label in KINDS]


def _shortened(entry: Entry) -> Entry:
    return Entry(entry.label, entry.text, re.sub(r"[\"']", "", short(entry.text.lower(), WORDS)))
