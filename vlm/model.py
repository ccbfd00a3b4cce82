"""The composite: a vision tower and a language model linked by gated cross-attention adapters.

Knows how pictures reach the text and how one language model is read three ways: causal (generation), bidirectional (MLM) and
pooled (contrastive). Knows nothing of files, tokenizers, losses over ranks, or decoding strategies.

Shapes: B rows, L text tokens, n pictures of the whole batch, M picture slots a row, S image tokens a picture, A adapters,
K key/value heads, d features a head, E embedding size.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, GenerationMixin, PreTrainedConfig, PreTrainedModel

from vlm.adapters import AttentionPool, CrossAttention, PerceiverResampler, build_adapter
from vlm.configuration import VLMConfig
from vlm.documents import document_positions
from vlm.errors import UsageError
from vlm.fusion import Visual, attach, check_carries_keywords, decoder_layers, family_faults
from vlm.quantization import pack, quantize
from vlm.reading import first_position, max_tokens, reading_mask
from vlm.vision import VisionTower, build_tower, grid_positions


class VLMModel(PreTrainedModel, GenerationMixin):
    """Any ViT and any Hugging Face language model, linked by gated cross-attention adapters.

    vision, language_model: ready parts; without them they are built from `config` with random weights.
    """

    config_class = VLMConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    vision: VisionTower
    resampler: PerceiverResampler | None
    image_pool: AttentionPool

    def __init__(
        self, config: VLMConfig, vision: VisionTower | None = None, language_model: PreTrainedModel | None = None
    ) -> None:
        super().__init__(config)
        self.vision = vision or build_tower(config.vision_config)
        self.language_model = language_model or build_language_model(config)
        if self.language_model.device.type != "meta":
            check_carries_keywords(self.language_model)
        config.text_config = self.language_model.config
        adapter, text = config.adapter_config, self.language_model.config.get_text_config()

        layers = decoder_layers(self.language_model)
        self.adapters = nn.ModuleDict(
            {
                str(index): build_adapter(adapter, text.hidden_size, text.num_attention_heads, self.vision.width)
                for index in adapter.chosen_layers(len(layers))
            }
        )
        self.tokens_per_picture = adapter.latents or self.vision.grid[0] * self.vision.grid[1]
        heads = max(1, self.vision.width // 64)
        self.image_positions = (
            nn.Parameter(torch.randn(self.vision.grid[0] * self.vision.grid[1], self.vision.width) * 0.02)
            if adapter.positions == "learned"
            else None
        )
        self.resampler = (
            PerceiverResampler(
                self.vision.width, adapter.latents, adapter.resampler_depth, heads, 4 * self.vision.width
            )
            if adapter.latents
            else None
        )
        self.image_pool = AttentionPool(self.vision.width, config.embedding_dim, heads)
        self.text_projection = nn.Linear(text.hidden_size, config.embedding_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.full((1,), 1 / 0.07).log())
        self.logit_bias = nn.Parameter(torch.full((1,), -10.0))
        self.matching_head = nn.Linear(text.hidden_size, 2) if config.matching else None
        attach(layers, tuple(int(key) for key in self.adapters), self._fuse)
        self._set_fused_attention(config._attn_implementation != "eager")
        if config.image_token_id is not None and self.can_generate():
            # A generated <image> would stand for no picture, and the text after it would see another one.
            self.generation_config.suppress_tokens = [config.image_token_id]
        self.post_init()
        if config.quantization is not None:
            quantize(self, **config.quantization)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in Hugging Face models. Quantized weights are brought into their kernels' layout as they lie, so that no
        full-precision weight is ever made of them."""
        loaded = super().from_pretrained(*args, **kwargs)
        pack(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    def _init_weights(self, module: nn.Module) -> None:
        """Every part has initialised itself when it was built; the language model's own rule serves its own modules.

        `from_pretrained` empties buffers that are not saved; timm's modules (rotary and relative positions) refill theirs.
        """
        refill = getattr(module, "init_non_persistent_buffers", None)
        if callable(refill):
            refill()

    # Pictures

    def image_states(self, pixel_values: Tensor) -> Tensor:
        """Pixels (n, 3, H, W), normalised -> image tokens (n, S, D) with their positions, resampled where configured."""
        tokens = self.vision(pixel_values.to(self.dtype))
        positions: Tensor | None = self.image_positions
        if positions is None:
            positions = grid_positions(self.vision.grid, self.vision.width, device=tokens.device)
        tokens = tokens + positions.to(tokens.dtype)
        return tokens if self.resampler is None else self.resampler(tokens)

    def image_keys_values(self, image_states: Tensor, image_slots: Tensor) -> Tensor:
        """Keys and values of every adapter, made once for all text that will look at the pictures.

        image_states (n, S, D); image_slots (B, M), the flat index of each row's pictures, -1 for an empty slot.
        Returns (B, A, 2, K, M·S, d). An empty slot holds some other picture's values, and no token looks at it.
        """
        return in_slots(self.picture_keys_values(image_states), image_slots)

    def picture_keys_values(self, image_states: Tensor) -> Tensor:
        """Keys and values of every adapter, picture by picture: (n, S, D) -> (n, A, 2, K, S, d)."""
        adapters: Iterable[Any] = self.adapters.values()
        return torch.stack([adapter.attention.keys_values(image_states) for adapter in adapters], dim=1)

    def token_image(self, input_ids: Tensor) -> Tensor:
        """(B, L) -> (B, L): the slot of the picture that a token sees, the last one placed up to it; -1 where there is none."""
        return (input_ids == self.config.image_token_id).long().cumsum(dim=1) - 1

    def image_slots(self, input_ids: Tensor, pictures: int) -> Tensor:
        """Slots (B, M) when the `pictures` lie flat in the order of the `<image>` tokens of the rows."""
        counts = (input_ids == self.config.image_token_id).sum(dim=1)  # (B,)
        if int(counts.sum()) != pictures:
            raise UsageError(
                f"the text has {int(counts.sum())} <image> places and {pictures} pictures came with it; "
                "give one picture for each place"
            )
        slots = torch.arange(max(1, int(counts.max())), device=input_ids.device)
        first = counts.cumsum(0) - counts
        return torch.where(slots < counts[:, None], first[:, None] + slots, -1)

    def _fuse(self, key: str, hidden: Tensor, visual: Visual) -> Tensor:
        order = list(self.adapters).index(key)
        looked, router_logits = self.adapters[key](hidden, visual.keys_values[order], visual.sees, visual.mask)
        # Here, outside what activation checkpointing runs a second time.
        if visual.router_logits is not None and router_logits is not None:
            visual.router_logits.append(router_logits)
        return looked

    # Text

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_slots: Tensor | None = None,
        token_image: Tensor | None = None,
        image_keys_values: Tensor | None = None,
        document_ids: Tensor | None = None,
        bidirectional: bool = False,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """Run the language model over `input_ids` (B, L), looking at pictures where there are any.

        attention_mask: (B, L), 1 for real tokens. position_ids: (B, L), from 0; without it, counted in each document.
        pixel_values: (n, 3, H, W), the pictures of all rows, flat. image_slots: (B, M), which of them belong to each row
        (-1: none); without it they follow the `<image>` tokens in order.
        token_image: (B, L), the slot each token sees (-1: none); without it, the last `<image>` up to the token.
        image_keys_values: (B, A, 2, K, M·S, d) from `image_keys_values()`, instead of pixels.
        document_ids: (B, L), rows of several documents: a token attends within equal ids only; 0 is padding.
        bidirectional: every token attends to every token of its document (MLM on decoder families).
        labels: (B, L), -100 where nothing is to be predicted; shifted here for causal reading.
        logits_to_keep, past_key_values, use_cache, output_hidden_states, …: as in Hugging Face models.

        Returns the language model's own output: logits (B, L, V), past_key_values, …; `loss` where labels are given.
        """
        inputs = self._inputs(
            input_ids,
            attention_mask,
            position_ids,
            pixel_values,
            image_slots,
            token_image,
            image_keys_values,
            document_ids,
            bidirectional,
        )
        if isinstance(logits_to_keep, Tensor) or logits_to_keep:
            kwargs["logits_to_keep"] = logits_to_keep
        output = self.language_model(**inputs, **kwargs)
        if labels is not None:
            output.loss = self._loss(output.logits, labels, bidirectional)
        return output

    def states(self, input_ids: Tensor, *, output_router_logits: bool | None = None, **inputs: Any) -> Any:
        """What `forward` does without the head: the base model's output, with last_hidden_state (B, L, C).

        inputs: those of `forward`. output_router_logits: also router_logits, (B·L, experts) of each layer with experts.
        adapter_router_logits, one of `inputs`: a list to which each adapter with experts adds its own, (B·L, experts).
        """
        told = {} if output_router_logits is None else {"output_router_logits": output_router_logits}
        return self.language_model.base_model(**self._inputs(input_ids, **inputs), **told)

    def _inputs(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_slots: Tensor | None = None,
        token_image: Tensor | None = None,
        image_keys_values: Tensor | None = None,
        document_ids: Tensor | None = None,
        bidirectional: bool = False,
        adapter_router_logits: list[Tensor] | None = None,
    ) -> dict[str, Any]:
        """The language model's keywords for the arguments of `forward`."""
        inputs: dict[str, Any] = {"input_ids": input_ids}
        mask: Tensor | dict[str, Tensor] | None = attention_mask
        if image_keys_values is None and pixel_values is not None:
            if image_slots is None:
                image_slots = self.image_slots(input_ids, len(pixel_values))
            image_keys_values = self.image_keys_values(self.image_states(pixel_values), image_slots)
        if image_keys_values is not None:
            if token_image is None:
                token_image = self.token_image(input_ids)
            inputs["visual"] = self._visual(image_keys_values, token_image, adapter_router_logits)
        if document_ids is not None or bidirectional:
            if document_ids is None:
                document_ids = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
            mask = reading_mask(self.language_model, document_ids, self.config.reading, bidirectional)
            position_ids = document_positions(document_ids) if position_ids is None else position_ids
        if position_ids is not None:
            inputs["position_ids"] = position_ids + first_position(self.language_model)
        return inputs | {"attention_mask": mask}

    def _visual(self, image_keys_values: Tensor, token_image: Tensor, router_logits: list[Tensor] | None) -> Visual:
        sees = token_image >= 0
        tokens = image_keys_values.shape[-2]
        # Taken apart at once: a gradient of one adapter's share alone would be filled up with zeros for all the others.
        keys_values = image_keys_values.unbind(1)
        if tokens == self.tokens_per_picture:
            return Visual(keys_values, sees, None, router_logits)
        slot_of_key = torch.arange(tokens, device=token_image.device) // self.tokens_per_picture
        # A token without a picture may look anywhere, and what it finds is thrown away: softmax over nothing is NaN.
        mask = (token_image[:, :, None] == slot_of_key) | ~sees[:, :, None]
        return Visual(keys_values, sees, mask[:, None], router_logits)

    @property
    def max_tokens(self) -> int | None:
        """How many tokens the language model has positions for; None where it names no limit."""
        return max_tokens(self.language_model)

    def _loss(self, logits: Tensor, labels: Tensor, bidirectional: bool) -> Tensor:
        """Mean cross-entropy over labelled tokens. A decoder predicts a token from the position before it, also under full
        attention (LLM2Vec, BehnamGhader et al. 2024); an encoder predicts it in its place."""
        if self.config.reading == "causal":
            logits, labels = logits[:, :-1], labels[:, 1:]
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)

    # One space for pictures and text

    def encode_image(self, pixel_values: Tensor, normalize: bool = True) -> Tensor:
        """Pixels (n, 3, H, W) -> embeddings (n, E), unit length if `normalize`."""
        embedding = self.image_pool(self.image_states(pixel_values))
        return F.normalize(embedding, dim=-1) if normalize else embedding

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor, normalize: bool = True) -> Tensor:
        """Tokens (n, L) -> embeddings (n, E): the mean of the last hidden states over real tokens, projected."""
        output = self.language_model.base_model(input_ids=input_ids, attention_mask=attention_mask)
        embedding = self.text_projection(_mean(output.last_hidden_state, attention_mask))
        return F.normalize(embedding, dim=-1) if normalize else embedding

    def match(
        self, input_ids: Tensor, attention_mask: Tensor, picture_keys_values: Tensor, image_slots: Tensor
    ) -> Tensor:
        """Whether each text goes with its picture: logits (n, 2), of no and yes (ALBEF, Li et al. 2021, equation 3).

        input_ids, attention_mask (n, L); picture_keys_values: of all pictures; image_slots (n, 1): which is each text's.
        Every token sees the picture; the mean of the last hidden states over real tokens is judged. Raises UsageError for a
        model without the head.
        """
        if self.matching_head is None:
            raise UsageError("the model has no matching head; train it with matching_weight in a joint stage")
        output = self.states(
            input_ids,
            attention_mask=attention_mask,
            token_image=torch.zeros_like(input_ids),
            image_keys_values=in_slots(picture_keys_values, image_slots),
        )
        return self.matching_head(_mean(output.last_hidden_state, attention_mask))

    def add_matching_head(self) -> None:
        """Put in a head for `match`, with random weights, where there is none."""
        if self.matching_head is None:
            width = self.language_model.config.get_text_config().hidden_size
            self.matching_head = nn.Linear(width, 2, device=self.device, dtype=self.dtype)
            self.config.matching = True

    # Generation, by Hugging Face's `generate`; pictures are encoded once

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        image_slots: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """`transformers.GenerationMixin.generate`, with the pictures of the prompt (see `forward`) encoded once."""
        if self.config.reading == "masked":
            raise UsageError(
                f"language model family {self.config.text_config.model_type!r} reads both ways and cannot generate; "
                "use fill_mask or embeddings, or train with a decoder family"
            )
        if pixel_values is not None:
            if image_slots is None:
                image_slots = self.image_slots(input_ids, len(pixel_values))
            kwargs["image_keys_values"] = self.image_keys_values(self.image_states(pixel_values), image_slots)
        return super().generate(input_ids, **kwargs)

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """One step's inputs: a new token sees the last picture placed anywhere before it."""
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        if inputs.get("image_keys_values") is not None:
            inputs["token_image"] = self.token_image(input_ids)[:, -inputs["input_ids"].shape[1] :]
        return inputs

    # The Hugging Face surface

    def get_input_embeddings(self) -> nn.Module:
        """The language model's token embeddings."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's token embeddings."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        """The language model's head."""
        return self.language_model.get_output_embeddings()

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Resize the language model's vocabulary."""
        return self.language_model.resize_token_embeddings(*args, **kwargs)

    def set_attn_implementation(self, attn_implementation: str, **kwargs: Any) -> None:
        """As in Hugging Face models, for every part: "sdpa", "eager" (see `vlm.adapters.CrossAttention.fused`), …"""
        self.language_model.set_attn_implementation(attn_implementation, **kwargs)
        # The public setter would also write it into a family that has just declined (XGLM), which would then be given masks
        # of the wrong kind and read the future.
        self.config._attn_implementation_internal = attn_implementation
        self._set_fused_attention(attn_implementation != "eager")

    def _set_fused_attention(self, fused: bool) -> None:
        for module in self.modules():
            if isinstance(module, CrossAttention):
                module.fused = fused
            elif hasattr(module, "fused_attn"):  # timm's name for the same choice
                module.fused_attn = fused

    def gates(self) -> dict[str, tuple[float, float]]:
        """tanh(α) of the attention and the feed-forward branch (0.0 where there is none) of each adapter."""
        adapters: Iterable[tuple[str, Any]] = self.adapters.items()
        return {
            key: (
                adapter.attention_gate.tanh().item(),
                adapter.feed_forward_gate.tanh().item() if adapter.feed_forward is not None else 0.0,
            )
            for key, adapter in adapters
        }


def in_slots(picture_keys_values: Tensor, image_slots: Tensor) -> Tensor:
    """Each row's pictures side by side: (n, A, 2, K, S, d), by slots (B, M), -> (B, A, 2, K, M·S, d)."""
    in_order = torch.arange(len(picture_keys_values), device=image_slots.device)
    # The usual case, for which nothing is copied; a compiled graph cannot ask.
    if not torch.compiler.is_compiling() and torch.equal(image_slots.flatten(), in_order):
        rows = picture_keys_values.unflatten(0, image_slots.shape)
    else:
        rows = picture_keys_values[image_slots.clamp(min=0)]  # (B, M, A, 2, K, S, d)
    return rows.permute(0, 2, 3, 4, 1, 5, 6).flatten(4, 5)


def _mean(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """Over real tokens: (n, L, C) and (n, L) -> (n, C)."""
    weights = attention_mask[..., None].to(hidden.dtype)
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def build_language_model(config: VLMConfig) -> PreTrainedModel:
    """The language model of `text_config` with random weights; raises UsageError for one that transformers cannot make."""
    text = config.text_config
    if not isinstance(text, PreTrainedConfig):
        raise UsageError("a VLMConfig without text_config names no language model; give one, e.g. LlamaConfig()")
    auto = AutoModelForMaskedLM if config.reading == "masked" else AutoModelForCausalLM
    with family_faults(text.model_type):
        return auto.from_config(text)
