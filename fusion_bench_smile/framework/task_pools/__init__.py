"""Task pools for CLIP and GLUE, exact on any number of processes, and the functions that such task pools share."""

from .clip import ExactCLIPVisionModelTaskPool
from .common import evaluate_in_batches, instantiate_config, load_tokenizer, model_info
from .glue import Example, GluePrompts, GlueTextTaskPool, glue_examples, load_glue_prompts, tokenize_glue_prompts

__all__ = [
    "ExactCLIPVisionModelTaskPool", "Example", "GluePrompts", "GlueTextTaskPool", "evaluate_in_batches",
    "glue_examples", "instantiate_config", "load_glue_prompts", "load_tokenizer", "model_info", "tokenize_glue_prompts",
]  # fmt: skip
