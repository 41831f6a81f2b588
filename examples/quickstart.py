"""Upscale two experts of the image benchmark, save the model, and load it with plain transformers.

python examples/quickstart.py FOLDER
"""

import sys
from pathlib import Path

import torch
from transformers import CLIPVisionModel

from fusion_bench_smile import upscale
from smile_zoo.images import load_expert, load_pretrained

folder = Path(sys.argv[1])
pretrained = load_pretrained()
model = upscale(pretrained, {"digits": load_expert("digits"), "flags": load_expert("flags")}, gate_k=4, k=8)
model.save_pretrained(folder)
reloaded = CLIPVisionModel.from_pretrained(folder)

pixels = torch.randn(2, 3, 28, 28)
with torch.no_grad():
    same = torch.equal(model.eval()(pixels).pooler_output, reloaded.eval()(pixels).pooler_output)
parameters = [sum(p.numel() for p in m.parameters()) for m in (pretrained, reloaded)]
print(f"reloaded bit for bit: {same}; parameters: {parameters[1] / parameters[0]:.2f} times the pretrained model's")
