"""The recipe of the text benchmark: packages -> texts -> heads and experts -> shipped files.

Run it with ``python -m fusion_bench_smile.embedded.text.build``. Nothing here is needed to *use* the benchmark.
"""
