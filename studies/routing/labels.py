"""Labels of the report for the names in the stored tables."""

from __future__ import annotations

TITLES = {
    "gentle": "images, gentle fine-tuning", "strong": "images, strong fine-tuning",
    "full": "text, full fine-tuning", "lora": "text, LoRA experts of rank 8",
}  # fmt: skip
LABELS = {
    # columns
    "right": "router accuracy",
    "if_right": "accuracy, right expert",
    "if_wrong": "accuracy, wrong expert",
    "own_if_wrong": "oracle accuracy, wrong expert",
    "ratio": "parameters",
    "closed": "closed gap",
    "as it is": "unchanged",
    "against random inputs": "random inputs",
    "against all test inputs": "test inputs",
    "always an expert": "without refusal",
    "refused": "refused",
    "refused of known tasks": "refused, known tasks",
    # scores
    "dual, seen by the average": "dual, merged experts in the first pass",
    "by layers' energies": "prototypes of the layers' energies",
    "by hidden states": "prototypes of hidden states",
    "by all experts' hidden states": "prototypes of all experts' hidden states",
}
VARIANT_PARTS = {", the paper's": " (paper)", "own norms": "expert norms"}


def label_of(name: str) -> str:
    """The label of a variant, a score or a column."""
    label = LABELS.get(name, name)
    for part, replacement in VARIANT_PARTS.items():
        label = label.replace(part, replacement)
    return label
