"""Routing scopes, scores and parameter budgets on both benchmarks, with experts of three seeds each.

python -m recipes.images.seeds FOLDER --benchmark images   # and text, in the folder zoo: fine-tunes the experts
python -m studies.routing FOLDER gentle strong full lora   # measures; existing tables in FOLDER/routing are kept
python -m studies.routing FOLDER --report docs             # writes tables and figures

The validation split of the first seed selects gate_k and allocation of each budget, once for the paper's routing and
once for two passes. All other numbers are of the test split.
"""
