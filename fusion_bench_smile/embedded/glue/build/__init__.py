"""The recipe of the tiny T5: packages -> sentences -> vocabulary -> pretraining -> experts -> shipped files.

Run it with ``python -m fusion_bench_smile.embedded.glue.build``. Nothing here is needed to *use* it.
"""
