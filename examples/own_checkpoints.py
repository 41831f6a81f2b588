"""From fine-tuning to one model: two fine-tuned checkpoints of your own, upscaled, saved, evaluated and served.

python examples/own_checkpoints.py FOLDER      # about two minutes on two cores; the cells also run in a notebook
"""

# %% Two checkpoints, fine-tuned here: DINOv2-small on 300 images of counts and of flags, with a fixed head
import sys
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import Dinov2Model

import fusion_bench_smile as smile
from smile_zoo.dinov2 import load_head, load_images, load_pretrained, load_processor
from smile_zoo.dinov2.task_pool import features, to_pixels

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "own-checkpoints")
torch.manual_seed(0)


def fine_tuned(task: str, steps: int = 20) -> Dinov2Model:
    """The pretrained model after some steps on 300 images of a task that are not those of its test."""
    model, images, head = load_pretrained().train(), load_images(task, "validation"), load_head(task)
    pixels, labels = to_pixels(images["image"]), torch.tensor(images["label"])
    optimizer = torch.optim.AdamW(model.encoder.parameters())  # the embeddings stay as they are
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-5, total_steps=steps)
    for _ in range(steps):
        batch = torch.randint(len(labels), (32,))
        loss = F.cross_entropy(F.linear(features(model, pixels[batch]), *head), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.inference_mode()
def accuracy(model: Dinov2Model, task: str) -> float:
    """The share of 200 test images that are classified right."""
    images, head = load_images(task)[:200], load_head(task)
    predicted = F.linear(features(model.eval(), to_pixels(images["image"])), *head).argmax(dim=-1)
    return (predicted == torch.tensor(images["label"])).float().mean().item()


load_pretrained().save_pretrained(folder / "dinov2")
for task in ("counts", "flags"):
    expert = fine_tuned(task)
    expert.save_pretrained(folder / task)
    print(f"{task}: {accuracy(load_pretrained(), task):.1%} pretrained, {accuracy(expert, task):.1%} fine-tuned")

# %% One model of both, layer by layer from files to files
smile.upscale_to_folder(
    folder / "dinov2", {"counts": folder / "counts", "flags": folder / "flags"}, folder / "smile",
    smile.SmileConfig(gate_k=None, k=16, storage="int4", routing_scope="input", top_k=2),
)  # fmt: skip

# %% An ordinary checkpoint: evaluated, and asked which expert serves an image
model = Dinov2Model.from_pretrained(folder / "smile").eval()
for task in ("counts", "flags"):
    print(f"{task}: {accuracy(model, task):.1%} SMILE")
router = smile.RequestRouter.from_pretrained(folder / "smile", processor=load_processor())
for task in ("counts", "flags"):
    (route,) = router.route(load_images(task)[:1]["image"])
    print(f"an image of {task}: {route.expert}, confidence {route.confidence:.2f}")

# %% One expert back, as a checkpoint that needs no fusion_bench_smile
smile.export_expert(model, "flags", folder / "flags-again")
again = Dinov2Model.from_pretrained(folder / "flags-again")
print(f"flags: {accuracy(again, 'flags'):.1%} exported, of rank 16 in 4 bits")
