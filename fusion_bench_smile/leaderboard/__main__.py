"""``python -m fusion_bench_smile.leaderboard``: the command ``smile-leaderboard``."""

from .command import main

main()
