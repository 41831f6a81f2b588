"""How far routing and ranks go beyond the paper's: every scope and score, at every budget, on experts of several seeds.

python -m fusion_bench_smile.embedded.build.seeds FOLDER --benchmark images   # and text: makes the experts
python -m fusion_bench_smile.embedded.beyond FOLDER gentle strong full lora   # measures; what is there is kept
python -m fusion_bench_smile.embedded.beyond FOLDER --report docs             # tables and the figure

gate_k and allocation of each budget are chosen on validation inputs of the first seed, for the paper's routing and for
ours; all else is of test inputs.
"""
