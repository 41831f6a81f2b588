"""The router of an upscaled model alone, which names the expert of a text or an image.

Servers of several LoRA adapters let the client choose one. This router makes the choice that the upscaled model would
make, and holds the part of it that the choice needs: the pretrained model up to the last layer that scores inputs, and
the router rows.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from ..exceptions import ConfigError
from ..io.checkpoint import load
from ..nn.attachment import deciding_module, router_of
from ..nn.input_router import InputRouter
from ..nn.routed import EXPERT_TENSORS, routed_layers

Processor = Any  # a tokenizer or an image processor of transformers
Message = Mapping[str, Any]  # of a conversation: role and content
INPUT_NAMES = ("input_ids", "pixel_values")


@dataclass(frozen=True)
class Route:
    """The expert of one request.

    Attributes:
        expert: Its name; None for the pretrained model, because a calibrated router with ``refuse_unknown=true`` does
            not know the task, or the confidence is below the threshold.
        confidence: The share of the best expert, from 1 / T to 1.
        shares: Expert → its share, with a sum of 1: the softmax of the scores.
    """

    expert: str | None
    confidence: float
    shares: Mapping[str, float]


class RequestRouter:
    """Names the expert of requests, as the upscaled model that it is made of would.

    Args:
        model: An upscaled model with ``routing_scope="input"``. Its experts and its last layers are dropped.
        processor: The tokenizer or the image processor that prepares requests for the model.
        threshold: Below this confidence, a request is served by the pretrained model.
        max_tokens: Of a text, the last ones; None takes all.

    Raises:
        ConfigError: The model routes each token, it reads neither texts nor images, or the threshold is not from 0 to
            1.
    """

    def __init__(
        self, model: nn.Module, processor: Processor, *, threshold: float = 0.0, max_tokens: int | None = None
    ) -> None:
        router, self.input_name = router_of(model), getattr(model, "main_input_name", "input_ids")
        if router is None:
            raise ConfigError("a request router needs a model with routing_scope=input: upscale it so")
        if self.input_name not in INPUT_NAMES:
            raise ConfigError(f"requests are texts or images, and {type(model).__name__} reads {self.input_name}")
        if not 0 <= threshold <= 1:
            raise ConfigError(f"threshold={threshold} is no confidence: give a number from 0 to 1")
        self.experts, self.threshold, self.max_tokens = router.experts, threshold, max_tokens
        self._router, self._module = router, keep_first_pass(model.eval(), router)
        self._processor, self._lock = deepcopy(processor), Lock()
        if self.input_name == "input_ids":
            self._processor.truncation_side = "left"  # a conversation ends with what is asked
            self._processor.pad_token = self._processor.pad_token or self._processor.eos_token

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike[str], *, processor: Processor | None = None,
        device: str | torch.device = "cpu", threshold: float = 0.0, max_tokens: int | None = None,
    ) -> RequestRouter:  # fmt: skip
        """The router of a checkpoint.

        Args:
            folder: Of an upscaled model.
            processor: The tokenizer or the image processor; None loads it from the folder.
            device: Of the router.
            threshold: See the class.
            max_tokens: See the class.

        Raises:
            CheckpointError: There is no upscaled model in the folder.
            ConfigError: There is no tokenizer or image processor in it, and as the class.
        """
        model = load(folder)
        processor = processor or _stored_processor(Path(folder), model)
        return cls(model.to(device), processor, threshold=threshold, max_tokens=max_tokens)

    @property
    def num_bytes(self) -> int:
        """The bytes of the parameters that are held."""
        parameters = {*self._module.parameters(), *self._router.parameters()}
        return sum(parameter.nbytes for parameter in parameters if not parameter.is_meta)

    @torch.inference_mode()
    def route(self, requests: Sequence[Any]) -> list[Route]:
        """The expert of each request of a batch: of texts, or of images as the image processor takes them.

        The result does not depend on the other requests of the batch. Threads may call it at the same time.
        """
        if not len(requests):
            return []
        device = self._router.layers[0].weight.device
        with self._lock:  # the settings of a fast tokenizer are those of one call
            prepared = self._prepared(requests)
        inputs = {name: value.to(device) for name, value in prepared.items()}
        state = self._router.observe(self._module, inputs, collects_features=self._router.prototypes is not None)
        shares = cast(torch.Tensor, state.scores).softmax(dim=-1)
        known = cast(torch.Tensor, state.choice).sum(dim=-1) > 0
        return [self._route(row, is_known) for row, is_known in zip(shares.tolist(), known.tolist(), strict=True)]

    def text_of(self, messages: Sequence[Message]) -> str:
        """The text of a conversation: by the tokenizer's chat template, or else its contents, line by line.

        Of a content in parts, the texts count.
        """
        plain = [{"role": str(message.get("role", "user")), "content": _text(message)} for message in messages]
        if getattr(self._processor, "chat_template", None):
            return str(self._processor.apply_chat_template(plain, tokenize=False, add_generation_prompt=True))
        return "\n".join(message["content"] for message in plain)

    def _prepared(self, requests: Sequence[Any]) -> dict[str, torch.Tensor]:
        if self.input_name == "pixel_values":
            return {"pixel_values": self._processor(images=list(requests), return_tensors="pt")["pixel_values"]}
        limits = {} if self.max_tokens is None else {"truncation": True, "max_length": self.max_tokens}
        tokens = self._processor(list(requests), padding=True, return_tensors="pt", **limits)
        return {name: tokens[name] for name in ("input_ids", "attention_mask")}

    def _route(self, shares: list[float], is_known: bool) -> Route:
        confidence = max(shares)
        best = self.experts[shares.index(confidence)] if is_known and confidence >= self.threshold else None
        return Route(best, confidence, dict(zip(self.experts, shares, strict=True)))


def keep_first_pass(model: nn.Module, router: InputRouter) -> nn.Module:
    """The part of an upscaled model that chooses experts: without experts, head, and the blocks after its first pass.

    The model can't be used afterwards.
    """
    module, scored = deciding_module(model), router.scored_layers()
    used = {"gate", "gate_scale"} | ({"up", "up_scale"} if router.prototypes is not None else set())
    for layer in routed_layers(module).values():
        for name in set(EXPERT_TENSORS) - used:
            layer.register_parameter(name, None)
    for blocks in [part for part in module.modules() if isinstance(part, nn.ModuleList)]:
        ends = [index for index, block in enumerate(blocks) if scored[-1] in set(block.modules())]
        for block in blocks[ends[0] + 1 :] if ends else ():
            block.to("meta")
    if isinstance(module, PreTrainedModel):
        head, embeddings = module.get_output_embeddings(), module.get_input_embeddings()
        if head is not None and head.weight is not embeddings.weight:
            head.to("meta")
    return module


def _stored_processor(folder: Path, model: nn.Module) -> Processor:
    """The tokenizer or image processor in a folder; raises ConfigError if there is none."""
    from transformers import AutoImageProcessor, AutoTokenizer

    reads_images = getattr(model, "main_input_name", "input_ids") == "pixel_values"
    kind, auto = ("image processor", AutoImageProcessor) if reads_images else ("tokenizer", AutoTokenizer)
    try:
        return auto.from_pretrained(folder)
    except Exception as error:  # transformers has no common type for them
        raise ConfigError(
            f"{folder} has no {kind} that can be loaded: save that of the pretrained model there, or pass processor="
        ) from error


def _text(message: Message) -> str:
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "\n".join(str(part["text"]) for part in content if isinstance(part, Mapping) and part.get("text"))
