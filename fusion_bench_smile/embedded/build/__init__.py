"""The recipe of the embedded benchmark: packages -> images -> pretraining -> experts -> shipped files.

Run it with ``python -m fusion_bench_smile.embedded.build``. Nothing here is needed to *use* the benchmark.
"""
