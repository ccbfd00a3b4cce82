"""How much of a device's arithmetic training uses: model FLOPs of a step, and the peak they are held against.

Knows parameter counts, lengths and devices. Knows nothing of clocks, steps or what else a device does meanwhile.

Model FLOPs are those that the model asks for, whatever padding, recomputation or a second pass add (PaLM, Chowdhery et al. 2022,
appendix B). A token that passes N weights of matrices costs 2 N forward, 2 N backward for the activations' gradient where
anything at or before them trains, and 2 N for the weights' own gradient where they train: 6 N where all do. Attention of a
token to T others over a width of W costs 4 T W forward and twice that backward: PaLM's 12 L H Q T. T is the length of the
token's own document, or the image tokens of its one picture. The head counts for those tokens that a loss is taken of, an
expert for the share of tokens that is sent to it. Norms, biases and softmax are left out.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from vlm.adapters import CrossAttention
from vlm.model import VLMModel
from vlm.quantization import layers

from .batches import Batch
from .objectives import Objective
from .optimization import TABLES
from .ranks import copies
from .tensor_parallel import is_cut

# Dense bf16 or fp16 of the makers' data sheets, FLOP/s, by what a device's name holds; the first match counts.
PEAKS = {
    "B200": 2250e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "V100": 125e12,
    "T4": 65e12,
    "MI300X": 1307e12,
    "MI250X": 383e12,
}
SIDE = {"cpu": 1024, "cuda": 8192}  # of the square matrices whose product is timed


@dataclass
class Cost:
    """FLOPs of a part, forward and backward. carries: the share of it that the activations' gradient passes, 0 to 1."""

    carries: float
    weights: float = 0.0
    trainable: float = 0.0

    def add(self, parameter: nn.Parameter, share: float = 1.0) -> None:
        # Under ZeRO-3 a parameter is an empty shard that remembers its size as `ds_numel`.
        size = share * getattr(parameter, "ds_numel", parameter.numel()) * (copies() if is_cut(parameter) else 1)
        self.weights += size
        self.trainable += size if parameter.requires_grad else 0.0

    @property
    def matrices(self) -> float:
        """Of one token that passes the weights."""
        return 2 * self.weights * (1 + self.carries) + 2 * self.trainable

    def attention(self, pairs: float, width: int) -> float:
        """Of so many pairs of a query and a key that are compared, over a width of all heads together."""
        return 4 * pairs * width * (1 + 2 * self.carries)


class ModelFlops:
    """Model FLOPs of a stage's micro-batches, forward and backward. objective: with `requires_grad` as it will train."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.kind = objective.stage.objective
        model = objective.model
        text = model.language_model.config.get_text_config()
        self.text_layers, self.text_width = text.num_hidden_layers, _attention_width(text)
        self.vision_layers, self.vision_width = depth(model.vision), int(model.vision.width)
        self.image_tokens = model.vision.grid[0] * model.vision.grid[1]
        self.latents = model.config.adapter_config.latents

        self.vision = Cost(_trains(model.vision.parameters()))
        for name, parameter in _matrices(model.vision):
            if "attn_pool" not in name:
                self.vision.add(parameter)
        learned = model.image_positions is not None and model.image_positions.requires_grad
        resampler = model.resampler.parameters() if model.resampler is not None else []
        sees = bool(self.vision.carries) or learned or _trains(resampler)
        self.resampler = _split(model.resampler, sees)
        self.pool = _split(model.image_pool, sees or _trains(model.image_pool.parameters()))
        adapter = model.config.adapter_config
        self.adapters = _split(model.adapters, 1.0, adapter.experts_per_token / max(1, adapter.experts))
        attentions = [part for part in model.adapters.modules() if isinstance(part, CrossAttention)]
        self.adapter_width = sum(part.heads * part.head_dim for part in attentions)
        self.body, self.head = _language_model(model, self._through(sees))

    def _through(self, sees: bool) -> float:
        """The share of the language model that gradients pass: all if it trains, else what comes after the first adapter."""
        model = self.objective.model
        if _trains(model.language_model.parameters()):
            return 1.0
        if self.kind != "joint" or not (sees or _trains(model.adapters.parameters())):
            return 0.0
        return 1 - min(map(int, model.adapters)) / self.text_layers

    def __call__(self, batch: Batch) -> float:
        """FLOPs of this micro-batch of this rank."""
        if self.kind == "contrastive":
            lengths = _lengths(batch["attention_mask"])
            return len(batch["pixel_values"]) * (self._picture() + self._pooled()) + self._text(lengths)
        lengths = _lengths(batch["document_ids"] if "document_ids" in batch else batch["attention_mask"])
        flops = self._text(lengths) + self.objective.targets(batch) * self.head.matrices
        if self.kind == "joint":
            slots = batch["image_slots"]
            pictures = len(slots[slots >= 0].unique())
            flops += pictures * self._picture() + self._looks(int((batch["token_image"] >= 0).sum()), pictures)
            if "pair_images" in batch:
                pairs = len(batch["pair_images"])
                lengths = _lengths(batch["pair_attention_mask"][:pairs])
                flops += pairs * self._pooled() + self._text(lengths)
                # Three readings of each: a wrong text counts as if it were as long as the one whose place it takes.
                readings = 3 if self.objective.stage.matching_weight else 0
                flops += readings * (self._text(lengths) + self._looks(int(lengths.sum()), pictures=0))
        return flops

    def _text(self, lengths: Tensor) -> float:
        pairs = self.text_layers * float((lengths.double() ** 2).sum())
        return float(lengths.sum()) * self.body.matrices + self.body.attention(pairs, self.text_width)

    def _picture(self) -> float:
        pairs = self.vision_layers * self.image_tokens**2
        flops = self.image_tokens * self.vision.matrices + self.vision.attention(pairs, self.vision_width)
        if self.latents:
            queries, sources = self.resampler
            seen = self.image_tokens + self.latents
            flops += self.latents * queries.matrices + seen * sources.matrices
            depth = self.objective.model.config.adapter_config.resampler_depth
            flops += queries.attention(depth * self.latents * seen, self.vision_width)
        return flops

    def _pooled(self) -> float:
        queries, sources = self.pool
        seen = self.latents or self.image_tokens
        return queries.matrices + seen * sources.matrices + queries.attention(seen, self.vision_width)

    def _looks(self, tokens: int, pictures: int) -> float:
        queries, sources = self.adapters
        seen = self.latents or self.image_tokens
        flops = tokens * queries.matrices + pictures * seen * sources.matrices
        return flops + queries.attention(tokens * seen, self.adapter_width)


def _language_model(model: VLMModel, through: float) -> tuple[Cost, Cost]:
    """The layers, and the head, which is a matrix of its own or the table of embeddings used once more."""
    body, head = Cost(through), Cost(float(through > 0))
    text = model.language_model.config.get_text_config()
    experts = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None) or 1
    chosen = getattr(text, "num_experts_per_tok", None) or 1
    head_weight = getattr(model.get_output_embeddings(), "weight", None)
    for name, parameter in _matrices(model.language_model):
        if parameter is not head_weight:
            body.add(parameter, chosen / experts if ".experts." in name else 1.0)
    for _, layer in layers(model.language_model):
        body.weights += layer.in_features * layer.out_features
    if head_weight is not None:
        head.add(head_weight)
    return body, head


def _split(module: nn.Module | None, carries: float, share: float = 1.0) -> tuple[Cost, Cost]:
    """What each query costs, and what each token costs that is looked at. share: of the queries, what an expert is given."""
    queries, sources = Cost(carries), Cost(carries)
    if module is not None:
        looked_at = {
            id(parameter)
            for part in module.modules()
            if isinstance(part, CrossAttention)
            for parameter in (*part.k_proj.parameters(), *part.v_proj.parameters())
        }
        for name, parameter in _matrices(module):
            (sources if id(parameter) in looked_at else queries).add(parameter, share if ".experts." in name else 1.0)
    return queries, sources


def _matrices(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """What is multiplied with: neither vectors nor tables that are looked up or added."""
    tables = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    return [
        (name, parameter)
        for name, parameter in module.named_parameters()
        if len(getattr(parameter, "ds_shape", parameter.shape)) >= 2
        and id(parameter) not in tables
        and name.rpartition(".")[2] not in TABLES
    ]


def _trains(parameters: Iterable[nn.Parameter]) -> bool:
    return any(parameter.requires_grad for parameter in parameters)


def depth(vision: nn.Module) -> int:
    """Layers of a tower: how often it attends, by the names that timm and PyTorch give to what does."""
    kinds = [(name, type(part).__name__) for name, part in vision.named_modules()]
    return sum("Attention" in kind and "Block" not in kind and "attn_pool" not in name for name, kind in kinds)


def _attention_width(text: Any) -> int:
    return text.num_attention_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def _lengths(ids: Tensor) -> Tensor:
    """How long each document is of rows (B, L) of document numbers; 0 is padding."""
    rows, most = len(ids), int(ids.max()) + 1 if ids.numel() else 1
    places = ids + most * torch.arange(rows)[:, None]
    return torch.bincount(places.flatten(), minlength=rows * most).view(rows, most)[:, 1:].flatten()


@cache
def peak_flops(device: torch.device, precision: str) -> float:
    """FLOP/s of one device: its data sheet's for a GPU that is known and a precision of 16 bits, else of a large matrix product.

    precision: bf16, fp16 or fp32.
    """
    if device.type == "cuda" and precision != "fp32":
        told = known_peak(torch.cuda.get_device_name(device))
        if told is not None:
            return told
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    side = SIDE.get(device.type, SIDE["cpu"])
    ones = torch.ones(side, side, dtype=dtype, device=device)
    fastest = min(_seconds_of_product(ones) for _ in range(4))
    return 2 * side**3 / fastest


def known_peak(name: str) -> float | None:
    """The data sheet's FLOP/s of a GPU by its name; None for one that is not in the table."""
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def _seconds_of_product(matrix: Tensor) -> float:
    if matrix.is_cuda:
        torch.cuda.synchronize(matrix.device)
    started = time.perf_counter()
    matrix @ matrix
    if matrix.is_cuda:
        torch.cuda.synchronize(matrix.device)
    return time.perf_counter() - started
