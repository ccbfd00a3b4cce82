"""Tiny models, tokenizers and pictures for every test; random weights, milliseconds to build."""

from __future__ import annotations

import gc
import json
import os
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["VLM_CACHE"] = str(Path(tempfile.gettempdir(), "vlm-tests-cache"))

import numpy as np
import pytest
import timm
import torch
import transformers as hf
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import vlm
from vlm.processing import VLMImageProcessor, complete_tokenizer

VOCAB = 288  # 256 bytes and the control tokens
WORDS = {"vocab_size": VOCAB, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
LLAMA_LIKE = {
    **WORDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
BERT_LIKE = {**LLAMA_LIKE, "bos_token_id": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

FAMILIES = {
    "gpt2": lambda: hf.GPT2Config(**WORDS, n_embd=32, n_layer=3, n_head=4, n_positions=256),
    "opt": lambda: hf.OPTConfig(
        **WORDS, hidden_size=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4, word_embed_proj_dim=32
    ),
    "xglm": lambda: hf.XGLMConfig(**WORDS, d_model=32, ffn_dim=48, num_layers=3, attention_heads=4),
    "llama": lambda: hf.LlamaConfig(**LLAMA_LIKE),
    "mistral": lambda: hf.MistralConfig(**LLAMA_LIKE),
    "mixtral": lambda: hf.MixtralConfig(**LLAMA_LIKE, num_local_experts=4),
    "qwen2": lambda: hf.Qwen2Config(**LLAMA_LIKE, tie_word_embeddings=True),
    "qwen3": lambda: hf.Qwen3Config(**LLAMA_LIKE, head_dim=8),
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(**LLAMA_LIKE, **EXPERTS, head_dim=8),
    "gemma3_text": lambda: hf.Gemma3TextConfig(**LLAMA_LIKE, head_dim=8, sliding_window=64),
    "phi3": lambda: hf.Phi3Config(**LLAMA_LIKE),
    "olmo2": lambda: hf.Olmo2Config(**LLAMA_LIKE),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**LLAMA_LIKE),
    "smollm3": lambda: hf.SmolLM3Config(**LLAMA_LIKE),
    "granite": lambda: hf.GraniteConfig(**LLAMA_LIKE),
    "stablelm": lambda: hf.StableLmConfig(**LLAMA_LIKE),
    "olmoe": lambda: hf.OlmoeConfig(**LLAMA_LIKE, num_experts=4, num_experts_per_tok=2),
    "bert": lambda: hf.BertConfig(**BERT_LIKE),
    "roberta": lambda: hf.RobertaConfig(**BERT_LIKE),
    "modernbert": lambda: hf.ModernBertConfig(
        **BERT_LIKE, cls_token_id=2, sep_token_id=1, local_attention=32, reference_compile=False
    ),
}
MASKED = ("bert", "roberta", "modernbert")


# Files with the longest tests, which begin first: at the end they would leave cores idle.
LONG = ("test_ranks.py", "test_demo.py", "test_readme.py", "test_house.py", "test_machines.py", "test_bench_zero.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, each in its own order."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


def pytest_collection_finish() -> None:
    """Nothing that was imported is garbage, and looking through it would take a tenth of the time."""
    gc.freeze()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `family` runs for every family; `causal_family` for those that generate."""
    if "family" in metafunc.fixturenames:
        metafunc.parametrize("family", FAMILIES)
    if "causal_family" in metafunc.fixturenames:
        metafunc.parametrize("causal_family", [name for name in FAMILIES if name not in MASKED])


def text_config(family: str = "qwen3") -> hf.PreTrainedConfig:
    """A tiny configuration of a language model family."""
    return FAMILIES[family]()


def model_of(family: str = "qwen3", *, seed: int = 0, vision: dict | None = None, **adapter: object) -> vlm.VLMModel:
    """A tiny composite in evaluation mode: pictures of 32 pixels, 16 tokens of 32 features."""
    torch.manual_seed(seed)
    kwargs = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    config = vlm.VLMConfig(
        vision=vision or {"name": "timm:vit_tiny_patch16_224", "image_size": (32, 32), "kwargs": kwargs},
        text_config=text_config(family),
        adapter=adapter,
        embedding_dim=16,
        image_token_id=3,
        mask_token_id=2,
    )
    return vlm.VLMModel(config).eval()


def byte_tokenizer(chat_template: str | None = None) -> hf.PreTrainedTokenizerBase:
    """A tokenizer whose words are bytes, with the control tokens in front."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    control = ["<pad>", "<eos>", "<mask>", "<image>", "<|user|>", "<|assistant|>"]
    tokens = {token: index for index, token in enumerate([*control, *alphabet])}
    backend = Tokenizer(models.BPE(tokens, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", mask_token="<mask>"
    )
    tokenizer.chat_template = chat_template
    return complete_tokenizer(tokenizer)


def processor_of(tokenizer: hf.PreTrainedTokenizerBase | None = None, **kwargs: object) -> vlm.VLMProcessor:
    """A processor for `model_of`'s models."""
    return vlm.VLMProcessor(VLMImageProcessor(input_size=(3, 32, 32)), tokenizer or byte_tokenizer(), **kwargs)


def picture_of(seed: int = 0, size: tuple[int, int] = (40, 36)) -> Image.Image:
    """Random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def towers_in(folder: Path) -> dict[str, str]:
    """Saves tiny random towers as timm and transformers do, in folders `vision` and `text`; gives their paths."""
    torch.manual_seed(0)
    tiny = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    trunk = timm.create_model("vit_tiny_patch16_224", num_classes=0, **tiny)
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 0, "model_args": tiny, "pretrained_cfg": {}}
    (folder / "vision").mkdir()
    (folder / "vision" / "config.json").write_text(json.dumps(config))
    save_file(trunk.state_dict(), folder / "vision" / "model.safetensors")
    hf.AutoModelForCausalLM.from_config(text_config("llama")).save_pretrained(folder / "text")
    byte_tokenizer().save_pretrained(folder / "text")
    return {name: str(folder / name) for name in ("vision", "text")}


@pytest.fixture(scope="session")
def make_towers():
    """`towers_in`."""
    return towers_in


@pytest.fixture(scope="session")
def make_text_config():
    """`text_config`."""
    return text_config


@pytest.fixture(scope="session")
def make_model():
    """`model_of`."""
    return model_of


@pytest.fixture(scope="session")
def make_tokenizer():
    """`byte_tokenizer`."""
    return byte_tokenizer


@pytest.fixture(scope="session")
def make_processor():
    """`processor_of`."""
    return processor_of


@pytest.fixture(scope="session")
def make_picture():
    """`picture_of`."""
    return picture_of
