"""llama.cpp as a peer: a language model's weights written as GGUF, and run by llama.cpp's own decoding step.

Knows the Qwen3 layout of GGUF and the C interface of `llama_cpp`. Knows nothing of what is measured beside it. Both packages
are asked for when they are needed, and are no part of an installation.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from transformers import Qwen3ForCausalLM

from vlm.errors import RunError, UsageError

ERROR_LEVEL = 4  # GGML_LOG_LEVEL_ERROR of ggml.h
NEEDED = ("gguf", "llama_cpp")  # modules
MISSING = (
    "--against llama.cpp needs {}; pip install 'vlm[llama]', which compiles llama.cpp for this machine: "
    "minutes, with a C++ compiler and CMake"
)


def check_installed() -> None:
    """Raises UsageError where `gguf` or `llama_cpp` can not be imported."""
    for name in NEEDED:
        try:
            __import__(name)
        except ImportError:
            raise UsageError(MISSING.format(name)) from None


def write_gguf(model: Qwen3ForCausalLM, path: Path, kind: str) -> None:
    """Write a Qwen3 model's weights in `kind`, "F32" or "Q8_0" (8 bits, a float16 scale for each 32 weights of a row), norms
    in float32. No vocabulary goes along: tokens stay numbers.
    """
    import gguf
    from gguf.quants import quantize

    config, wanted = model.config, gguf.GGMLQuantizationType[kind]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.QWEN3])
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.vocab_size)
    for name, weight in model.named_parameters():  # a head that is the embedding is named once, as GGUF has it
        stored = gguf.GGMLQuantizationType.F32 if weight.dim() == 1 else wanted
        told = names.get_name(name, try_suffixes=(".weight",))
        assert told, f"{name} is of no Qwen3"
        writer.add_tensor(told, quantize(weight.detach().float().numpy(), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@contextmanager
def opened(path: Path, threads: int, length: int) -> Iterator[LlamaCpp]:
    """A GGUF file in llama.cpp for the time of a block. Raises RunError where llama.cpp does not take it."""
    import llama_cpp

    with _heard() as faults:
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not model:
            raise RunError(f"llama.cpp does not take {path.name}: {' '.join(faults)}")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_threads, settings.n_threads_batch = length, threads, threads
        context = llama_cpp.llama_init_from_model(model, settings)
        try:
            if not context:
                raise RunError(f"llama.cpp makes no room for {length} tokens of {path.name}: {' '.join(faults)}")
            yield LlamaCpp(context, llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model)))
        finally:
            if context:
                llama_cpp.llama_free(context)
            llama_cpp.llama_model_free(model)


@contextmanager
def _heard() -> Iterator[list[str]]:
    """What llama.cpp reports as errors during a block; the pages that it prints besides are not shown."""
    import llama_cpp

    faults: list[str] = []

    @llama_cpp.llama_log_callback
    def hear(level: int, text: bytes, _: object) -> None:
        if level == ERROR_LEVEL:
            faults.append(text.decode(errors="replace").strip())

    llama_cpp.llama_log_set(hear, None)
    try:
        yield faults
    finally:
        llama_cpp.llama_log_set(llama_cpp.llama_log_callback(), None)  # its own


class LlamaCpp:
    """One sequence in llama.cpp, greedy. words: V."""

    def __init__(self, context: object, words: int) -> None:
        self._context, self._words = context, words

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Read tokens after those read before -> (V,), what follows the last of them; valid until the next call."""
        import llama_cpp

        read = (ctypes.c_int32 * len(tokens))(*tokens)
        if code := llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(read, len(tokens))):
            raise RunError(f"llama.cpp's llama_decode of {len(tokens)} tokens ended with {code}")
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self._context, -1), (self._words,))

    def generate(self, prompt: Sequence[int], new_tokens: int) -> list[int]:
        """So many of the likeliest tokens after a prompt, whatever was read before."""
        import llama_cpp

        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        said = [int(self.logits(prompt).argmax())]
        while len(said) < new_tokens:
            said.append(int(self.logits(said[-1:]).argmax()))
        return said

    def seconds(self, prompt: Sequence[int], new_tokens: int) -> float:
        """What `generate` takes."""
        begun = time.perf_counter()
        self.generate(prompt, new_tokens)
        return time.perf_counter() - begun


def build() -> str:
    """Version of the package, and the instructions that its llama.cpp was compiled for."""
    import llama_cpp

    told = llama_cpp.llama_print_system_info().decode()
    found = [part.split("=")[0].strip() for part in told.replace(":", "|").split("|") if part.strip().endswith("= 1")]
    return f"llama-cpp-python {llama_cpp.__version__} ({', '.join(found)})"
