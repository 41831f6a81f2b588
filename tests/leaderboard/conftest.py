from __future__ import annotations

from pathlib import Path

import pytest
from sample_reports import write_run


@pytest.fixture
def runs(tmp_path) -> Path:
    """Individual models, two merged ones, and a grid of SMILE."""
    write_run(tmp_path, "individual", 90, 70, 800, kind="individual", method={})
    write_run(tmp_path, "pretrained", 40, 20, method={})
    write_run(tmp_path, "TIES (λ=0.3)", 60, 40, method={"scaling_factor": 0.3})
    for gate_k in (4, 16):
        for k in (8, 32):
            name, options = f"SMILE (gate_k={gate_k}, k={k})", {"gate_k": gate_k, "k": k, "top_k": 1}
            write_run(tmp_path, name, 70 + gate_k, 50 + k / 4, 100 + gate_k + k, method=options)
    return tmp_path
