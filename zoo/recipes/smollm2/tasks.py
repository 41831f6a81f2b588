"""Prompts and answers of the eight tasks, from the text benchmark, from packages, and from a random generator.

The origin of an example is the unit that it is cut from: a text, a base form, a correct word, a name. No origin is in
two splits. Every prompt ends with a colon.
"""

from __future__ import annotations

import gettext
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from recipes.text.tasks import short, split_of
from smile_zoo.smollm2 import CLASSIFICATION, SPLITS, Split
from smile_zoo.text import load_texts

DEBIAN, PYPI = ["wordnet-base", "iso-codes"], ["codespell==2.4.3"]
SIZES = {"train": 1200, "validation": 100, "test": 200}
SHIPPED = 300  # training examples, for calibration
WORDS = 12  # of the longest text in a prompt
LANGUAGES = {"da": "Danish", "de": "German", "en": "English", "es": "Spanish", "fi": "Finnish", "fr": "French",
             "it": "Italian", "nl": "Dutch", "pl": "Polish", "pt": "Portuguese", "sv": "Swedish"}  # fmt: skip


class Example(NamedTuple):
    """A prompt with its answer, and the origin of both."""

    origin: str
    prompt: str
    answer: str


def classification(task: str, split: Split) -> Iterator[Example]:
    """Yield the texts of a task of the text benchmark with the words of their class."""
    dataset = load_texts(task, split)
    classes = dataset.features["label"].names
    for text, label in zip(dataset["text"], dataset["label"], strict=True):
        name = classes[label]
        prompt = f"Text: {short(text, WORDS)}\nCategory:"
        yield Example(prompt, prompt, LANGUAGES[name] if task == "languages" else name)


def arithmetic(root: Path) -> Iterator[Example]:
    """Yield sums and differences of three numbers with both steps."""
    rng = random.Random(0)
    for _ in range(4000):
        a, b, c = (rng.randint(2, 60) for _ in range(3))
        first, second = rng.choice("+-"), rng.choice("+-")
        middle = a + b if first == "+" else a - b
        result = middle + c if second == "+" else middle - c
        if middle >= 0 and result >= 0:
            question = f"{a} {first} {b} {second} {c}"
            answer = f"{a} {first} {b} = {middle}, {middle} {second} {c} = {result}"
            yield Example(question, f"Question: {question}\nAnswer:", answer)


def lemmas(root: Path) -> Iterator[Example]:
    """Yield WordNet's irregular forms of nouns and verbs with their base form."""
    for pos in ("noun", "verb"):
        for line in (root / "wordnet-base/usr/share/wordnet" / f"{pos}.exc").read_text().splitlines():
            form, base = line.split()[:2]
            if form != base and "_" not in form and len(base) > 2:
                yield Example(base, f"Word: {form}\nBase form:", base)


def spelling(root: Path) -> Iterator[Example]:
    """Yield misspelled words with their correction, where there is one alone."""
    for line in (root / "codespell/codespell_lib/data/dictionary.txt").read_text().splitlines():
        wrong, _, right = line.partition("->")
        if right.isalpha() and wrong.isalpha() and len(right) > 5:
            yield Example(right, f"Word: {wrong}\nCorrection:", right)


def translation(root: Path) -> Iterator[Example]:
    """Yield English names of languages, of two words at least, with their French name."""
    file = root / "iso-codes/usr/share/locale/fr/LC_MESSAGES/iso_639-3.mo"
    with file.open("rb") as opened:
        catalogue = gettext.GNUTranslations(opened)
        opened.seek(0)
    for name, french in vars(catalogue)["_catalog"].items():
        if isinstance(name, str) and " " in name and len(name) < 40 and "(" not in name:
            yield Example(name, f"Text: {name}\nFrench:", french)


GENERATORS: dict[str, Callable[[Path], Iterator[Example]]] = {
    "arithmetic": arithmetic, "lemmas": lemmas, "spelling": spelling, "translation": translation,
}  # fmt: skip


def build_task(task: str, root: Path) -> dict[str, list[tuple[str, str]]]:
    """Build the prompts and answers of a task from the unpacked packages below `root`, for each split.

    Every origin occurs once; a split has at most its number in `SIZES`.

    Raises:
        RuntimeError: if there are too few validation or test examples.
    """
    by_split: dict[str, list[Example]] = {split: [] for split in SPLITS}
    if task in CLASSIFICATION:
        by_split = {split: list(classification(task, split)) for split in SPLITS}
    else:
        for example in GENERATORS[task](root):
            by_split[split_of(task, example.origin)].append(example)
    drawn: set[str] = set()
    result: dict[str, list[tuple[str, str]]] = {}
    for split in reversed(SPLITS):  # the test split first: what occurs twice is left out of the others
        examples = by_split[split]
        random.Random(f"{task} {split}").shuffle(examples)
        chosen: list[tuple[str, str]] = []
        for example in examples:
            if example.origin not in drawn and len(chosen) < SIZES[split]:
                drawn.add(example.origin)
                chosen.append((example.prompt, example.answer))
        if len(chosen) < (SHIPPED if split == "train" else SIZES[split]):
            raise RuntimeError(f"{task}, {split}: the packages hold {len(chosen)} examples only")
        result[split] = chosen
    return result
