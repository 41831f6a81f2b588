"""The backbone of an ONNX file as a `Dinov2Model` of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fusion_bench_smile.exceptions import SmileError

if TYPE_CHECKING:
    from torch import Tensor

PREFIX = "backbone."


def read_backbone(file: Path) -> dict[str, Tensor]:
    """Read the backbone from an ONNX file under the names of transformers' `Dinov2Model`, in float32.

    Exporting renamed and transposed the weights of linear layers, which are initializers of ``MatMul`` nodes, and split
    the position embeddings. The bias that is added to a product has the name of its layer.

    Raises:
        SmileError: if the package ``onnx`` is not installed.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError:
        raise SmileError("reading the weights needs onnx: pip install 'fusion-bench-smile-zoo[dinov2]'") from None
    graph = onnx.load(str(file)).graph
    values = {each.name: torch.from_numpy(numpy_helper.to_array(each).copy()) for each in graph.initializer}
    tensors = {name.removeprefix(PREFIX): value for name, value in values.items() if name.startswith(PREFIX)}
    products = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    for node in (node for node in graph.node if node.op_type == "Add"):
        bias = next((name for name in node.input if name.startswith(PREFIX) and name.endswith(".bias")), None)
        weight = next((products[name] for name in node.input if name in products), None)
        if bias is not None and weight in values:
            layer = bias.removeprefix(PREFIX).removesuffix(".bias")
            tensors[f"{layer}.weight"] = values[weight].T.contiguous()  # (out, in)
    return tensors | {"embeddings.position_embeddings": _position_embeddings(values)}


def _position_embeddings(values: dict[str, Tensor]) -> Tensor:
    """The position embeddings of the class token and 37×37 patches: (1, 1370, 384)."""
    unnamed = [value for name, value in values.items() if name.startswith("onnx::")]
    parts = [next(value for value in unnamed if value.shape == (1, count, 384)) for count in (1, 1369)]
    return torch.cat(parts, dim=1)


def convert(file: Path, folder: Path) -> None:
    """Write the backbone of an ONNX file as a checkpoint of `Dinov2Model`: ViT-S/14, 384 wide, 12 blocks, float32.

    Raises:
        SmileError: if the package ``onnx`` is not installed.
    """
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    config = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14)
    tensors = read_backbone(file)
    tensors.setdefault("embeddings.mask_token", torch.zeros(1, 384))  # for pretraining alone
    with torch.device("meta"):
        model = Dinov2Model(config)
    model.load_state_dict(tensors, assign=True)
    model.save_pretrained(folder)
    # 56×56 pixels: 16 patches
    BitImageProcessor(
        do_resize=True, size={"height": 56, "width": 56}, do_center_crop=False, image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(folder)  # fmt: skip
