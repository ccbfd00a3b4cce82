"""Peers of `vlm bench train`: other people's models in the sizes of one of ours, stepped under bf16 autocast.

Knows open_clip and Idefics. Knows nothing of how long they take.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from vlm.losses import IGNORED
from vlm.model import VLMModel

from .batches import Batch


class Peer(ABC):
    """A model and an AdamW like ours."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.train()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model.to(self.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    @abstractmethod
    def loss(self) -> Tensor:
        """Of the batch that it was given."""

    def step(self) -> None:
        """One step of the optimizer."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class OpenClipPeer(Peer):
    """open_clip's `CLIP` with its own tokenizer, which pads to 77 tokens, and its own loss.

    model: whose sizes it takes. pixel_values (n, 3, H, W) and n texts: what it learns from.
    """

    length = 77

    def __init__(self, model: VLMModel, pixel_values: Tensor, texts: list[str]) -> None:
        import open_clip

        trunk, text = model.vision.trunk, model.language_model.config
        vision_cfg = {
            "width": model.vision.width,
            "layers": len(trunk.blocks),
            "head_width": model.vision.width // trunk.blocks[0].attn.num_heads,
            "patch_size": trunk.patch_embed.patch_size[0],
            "image_size": model.vision.image_size,
        }
        text_cfg = {
            "width": text.hidden_size,
            "heads": text.num_attention_heads,
            "layers": text.num_hidden_layers,
            "context_length": self.length,
            "vocab_size": 49408,  # its tokenizer's
        }
        super().__init__(open_clip.model.CLIP(model.config.embedding_dim, vision_cfg, text_cfg))
        self.criterion = open_clip.ClipLoss()
        self.pixel_values = pixel_values.to(self.device)
        self.texts = open_clip.SimpleTokenizer()(texts, context_length=self.length).to(self.device)

    def loss(self) -> Tensor:
        """Symmetric InfoNCE over the batch."""
        return self.criterion(*self.model(self.pixel_values, self.texts))


class IdeficsPeer(Peer):
    """transformers' `IdeficsForVisionText2Text`, all of it trained.

    model: a composite around a Llama, whose sizes it takes. batch: a joint micro-batch of rows with one picture each.
    """

    def __init__(self, model: VLMModel, batch: Batch) -> None:
        from transformers import IdeficsConfig, IdeficsForVisionText2Text

        trunk, text = model.vision.trunk, model.language_model.config
        vision: dict[str, Any] = {
            "embed_dim": model.vision.width,
            "image_size": model.vision.image_size[0],
            "patch_size": trunk.patch_embed.patch_size[0],
            "num_hidden_layers": len(trunk.blocks),
            "num_attention_heads": trunk.blocks[0].attn.num_heads,
            "intermediate_size": trunk.blocks[0].mlp.fc1.out_features,
        }
        config = IdeficsConfig(
            vocab_size=text.vocab_size,
            hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size,
            num_hidden_layers=text.num_hidden_layers,
            num_attention_heads=text.num_attention_heads,
            max_position_embeddings=text.max_position_embeddings,
            pad_token_id=text.pad_token_id,
            bos_token_id=None,
            eos_token_id=text.eos_token_id,
            cross_layer_interval=model.config.adapter_config.every,
            freeze_text_layers=False,
            freeze_vision_layers=False,
            freeze_lm_head=False,
            use_cache=False,
            vision_config=vision,
        )
        super().__init__(IdeficsForVisionText2Text(config))
        sees = batch["token_image"] >= 0
        self.inputs = {
            "input_ids": batch["input_ids"],
            "attention_mask": (batch["document_ids"] > 0).long(),
            "pixel_values": batch["pixel_values"][:, None],
            "image_attention_mask": sees[..., None].long(),
            "labels": batch["labels"].masked_fill(batch["document_ids"] == 0, IGNORED),
        }
        self.inputs = {name: value.to(self.device) for name, value in self.inputs.items()}

    def loss(self) -> Tensor:
        """Mean cross-entropy of the labelled tokens."""
        return self.model(**self.inputs).loss
