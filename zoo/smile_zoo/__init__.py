"""Small models, experts and data for fusion-bench-smile that need no network: images, text, language, T5.

`smile_zoo.dinov2`, `smile_zoo.images`, `smile_zoo.text`, `smile_zoo.smollm2` and `smile_zoo.tiny_t5` load them.
``python -m smile_zoo.comparison`` compares merging methods on them.
"""

__version__ = "0.1.0"
