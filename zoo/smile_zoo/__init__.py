"""Small models, experts and data for fusion-bench-smile that need no network: an image, a text and a T5 benchmark.

`smile_zoo.images`, `smile_zoo.text` and `smile_zoo.tiny_t5` load them. ``python -m smile_zoo.comparison`` compares
merging methods on them.
"""

__version__ = "0.1.0"
