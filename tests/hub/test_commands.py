"""The commands of the README and the docs for the benchmarks on the hub, as written, on a local hub."""

from __future__ import annotations

import pytest
from command_line import fusion_bench

pytestmark = [pytest.mark.cli, pytest.mark.slow]


def test_try(hub, tmp_path):
    import time

    for args in (
        "method=smile_upscaling method.gate_k=16 method.k=32 modelpool=CLIPVisionModelPool/clip-vit-base-patch32_TA8 taskpool=SmileCLIP/TA8 merged_model_save_path=outputs/smile-vit-b32",
        "method=smile_upscaling modelpool=Seq2SeqLMPool/flan-t5-base_glue_lora16 taskpool=SmileGLUE/flan-t5",
        "-m +experiment=smile_clip/b32 +smile_row=smile_framework,smile ++method.gate_k=16 ++method.k=32",
    ):
        t = time.time()
        c = fusion_bench(*args.split(), cwd=tmp_path)
        print(time.time() - t, c.returncode, c.stdout[-3000:], c.stderr[-3000:])
    assert 0
