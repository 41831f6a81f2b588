"""Cost of decoding with a cache by routing, relative to the plain model: SmolLM2-135M, experts of four tasks.

    python benchmarks/decoding.py
    python benchmarks/decoding.py --device cuda --dtype bfloat16

All models continue one prompt greedily, in turn; the times are medians. They include the first pass that chooses the
experts of the prompt, and the merging of their weights, which cost the same for any number of tokens.
"""

from __future__ import annotations

import argparse
from copy import deepcopy
from functools import partial

from forward import add_device, interleaved, set_up

from fusion_bench_smile import upscale
from smile_zoo.smollm2 import CLASSIFICATION, load_examples, load_expert, load_pretrained, load_tokenizer

SETTINGS = {
    "token, 8/8": {"gate_k": None, "k": 8},
    "input, 8/8": {"gate_k": None, "k": 8, "routing_scope": "input", "top_k": 2},
    "input, 16/16, int4": {"gate_k": None, "k": 16, "storage": "int4", "routing_scope": "input", "top_k": 2},
}  # fmt: skip


def main() -> None:
    """Print the table of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_device(parser)
    parser.add_argument("--tokens", type=int, nargs="+", default=[32, 128], help="numbers of new tokens")
    parser.add_argument("--seconds", type=float, default=60, help="for each number of tokens")
    options = parser.parse_args()
    device, dtype = set_up(options)
    pretrained, experts = load_pretrained(), {task: load_expert(task, "full") for task in CLASSIFICATION}
    models = {"plain": pretrained}
    # a copy for each: weights that two models share would stay in the cache
    models |= {name: upscale(deepcopy(pretrained), experts, **kwargs) for name, kwargs in SETTINGS.items()}
    models = {name: model.eval().to(device, dtype) for name, model in models.items()}
    prompt = load_examples(CLASSIFICATION[0])[0]["prompt"]
    tokens = load_tokenizer()(prompt, return_tensors="pt").to(device)
    rows: dict[str, list[str]] = {name: [] for name in models}
    for count in options.tokens:
        settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        runs = {name: partial(model.generate, **tokens, **settings) for name, model in models.items()}
        seconds = interleaved(runs, device, budget=options.seconds)  # `generate` computes no gradients
        for name, value in seconds.items():
            rows[name].append(f"{value / count * 1e3:.1f} | {value / seconds['plain']:.2f}×")
    headings = [f"{count} tokens: ms a token | relative" for count in options.tokens]
    print(f"prompt of {tokens['input_ids'].shape[1]} tokens\n\n| gate_k/k | {' | '.join(headings)} |")
    print(f"|---|{'---:|' * 2 * len(headings)}")
    for name, columns in rows.items():
        print(f"| {name} | {' | '.join(columns)} |")


if __name__ == "__main__":
    main()
