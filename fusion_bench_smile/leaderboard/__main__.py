"""``python -m fusion_bench_smile.leaderboard``, the same as ``smile-leaderboard``."""

from .command import main

main()
