"""What becomes of inputs of a task whose expert is missing: one row for each task."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ...prototypes import Prototypes
from ...scopes import shares
from ...store import FactorStore
from .benches import Bench
from .judge import Judge
from .models import Seen, build
from .variants import OWN, Ranks


def of_held_out(at: Bench, ranks: Ranks, store: FactorStore) -> Iterator[dict[str, Any]]:
    """For each task: a model without its expert, calibrated, and what this task's inputs get."""
    experts, pretrained, calibrated = at.experts(), at.pretrained(), OWN[-1]
    model = build(at, experts, ranks, calibrated, store)
    judge, seen = Judge(at, model, "test"), Seen.by(at, model)
    for number, held_out in enumerate(at.tasks):
        kept = [i for i in range(len(at.tasks)) if i != number]
        # features are in two blocks of all experts for each layer, of which the held-out one's are left out
        columns = torch.tensor([c for c in range(seen.test.features.shape[1]) if c % len(at.tasks) != number])
        prototypes = Prototypes.fit([seen.calibration[i][:, columns] for i in kept])
        features, mine = seen.test.features[:, columns], judge.own == number
        weights = torch.zeros(len(mine), len(at.tasks))
        weights[:, kept] = shares(prototypes.scores(features), calibrated.top_k)
        correct, refused = judge.correct(weights), ~prototypes.known(features)
        plain = at.correct(pretrained, held_out, "test")
        shown = {
            "pretrained": plain,
            "always an expert": correct[mine],
            "with refusal": torch.where(refused[mine], plain, correct[mine]),
            "refused": refused[mine],
            "refused of known tasks": refused[~mine],
        }
        yield {"held out": held_out, **{name: 100 * part.float().mean().item() for name, part in shown.items()}}
