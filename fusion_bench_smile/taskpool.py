"""The framework's CLIP task pool, right on any number of processes."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from fusion_bench.taskpool import CLIPVisionModelTaskPool
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler
from tqdm.auto import tqdm

from .ending import one_clear_line
from .errors import SmileError
from .sharing import leave_at_exit


class ExactCLIPVisionModelTaskPool(CLIPVisionModelTaskPool):
    """Evaluates the framework's CLIP task pool with every sample counted once, on any number of processes.

    The framework's own repeats samples where the processes' shares are uneven, and keeps its counts on the CPU, where
    NCCL can't add them up. Here correct answers and losses are summed, and three numbers for each task are exchanged
    on the device. The report tells how many samples each task had.
    """

    @torch.no_grad()
    def _evaluate(
        self, classifier: Any, test_loader: DataLoader, num_classes: int, task_name: str | None = None
    ) -> dict[str, float | int]:
        """Accuracy and mean cross-entropy, in nats, of all processes' samples of one task.

        Raises:
            SmileError: if there are none.
        """
        classifier.eval()
        batches = itertools.islice(test_loader, 1) if self.fast_dev_run else test_loader
        totals = torch.zeros(3, dtype=torch.float64, device=self.fabric.device)
        seen = 0
        for inputs, targets in tqdm(batches, desc=f"Evaluating {task_name}", leave=False, dynamic_ncols=True):
            outputs = classifier(inputs, return_image_embeds=True, return_dict=True, task_name=task_name)
            logits = outputs["logits"].float()
            targets = targets.to(logits.device)
            own = ~_repeated(test_loader, seen, len(targets)).to(logits.device)
            correct = (logits.argmax(dim=-1) == targets)[own]
            losses = F.cross_entropy(logits, targets, reduction="none")[own]
            totals += torch.stack([correct.sum(), losses.double().sum(), own.sum()]).to(totals)
            seen += len(targets)
        leave_at_exit()
        correct_sum, loss_sum, samples = self.fabric.all_reduce(totals, reduce_op="sum").tolist()
        with one_clear_line():
            if not samples:
                raise SmileError(f"the test set of {task_name} is empty")
        # more digits of the loss would tell how the samples were put into batches
        return {"accuracy": correct_sum / samples, "loss": round(loss_sum / samples, 3), "samples": int(samples)}


def _repeated(loader: DataLoader, seen: int, count: int) -> Tensor:
    """Which of this process's next `count` samples, of which it has `seen` some, only fill its share up: (count,)."""
    sampler = loader.sampler
    if not isinstance(sampler, DistributedSampler):
        return torch.zeros(count, dtype=torch.bool)
    place = (seen + torch.arange(count)) * sampler.num_replicas + sampler.rank
    return place >= len(sampler.dataset)  # type: ignore[arg-type]
