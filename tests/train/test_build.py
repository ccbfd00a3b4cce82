"""Building: sizes arrive where each library wants them, pretrained parts keep their weights, faults are named."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest
import timm
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from vlm.errors import UsageError
from vlm.quantization import quantize
from vlm.saving import read, save
from vlm.shards import ShardWriter
from vlm.train.build import build, build_vision, family_config, pretrained_text, scale_rope
from vlm.train.config import Config
from vlm.train.config_model import RopeScaling, TextSizes, VisionSizes
from vlm.train.config_stage import Stage
from vlm.train.summary import training_table

SIZES = {"width": 32, "depth": 3, "heads": 4, "positions": 96}
VISION = {"name": "timm:vit_tiny_patch16_224", "image_size": 32, "patch_size": 8, "width": 32, "depth": 2, "heads": 2}
TINY_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
STAGES = [{"objective": "joint", "steps": 1}]


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    """A few captions without pictures: enough for a tokenizer."""
    folder = tmp_path_factory.mktemp("shards") / "set"
    with ShardWriter(folder) as writer:
        for index in range(20):
            writer.write(f"{index}", {"json": json.dumps({"text": f"a red circle and {index} squares"}).encode()})
    return str(folder)


@pytest.fixture(scope="module")
def timm_folder(tmp_path_factory) -> tuple[str, torch.nn.Module]:
    """A tiny ViT saved as timm saves one, and the ViT."""
    folder = tmp_path_factory.mktemp("vit")
    trunk = timm.create_model("vit_tiny_patch16_224", num_classes=0, **TINY_VIT)
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 0, "model_args": TINY_VIT}
    (folder / "config.json").write_text(json.dumps(config | {"pretrained_cfg": {"mean": [0.1, 0.2, 0.3]}}))
    save_file(trunk.state_dict(), folder / "model.safetensors")
    return str(folder), trunk


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory, make_text_config, make_tokenizer) -> str:
    """A tiny language model with its tokenizer."""
    folder = tmp_path_factory.mktemp("lm")
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(make_text_config("llama")).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def config_of(shards: str, **model: object) -> Config:
    scratch = {"vision": VISION, "text": {"family": "qwen3", **SIZES}, "tokenizer": {"vocab_size": 300}}
    return Config.model_validate({"model": scratch | model, "data": {"train": shards}, "stages": STAGES})


def test_from_scratch_depends_on_the_seed_alone(shards):
    config = config_of(shards)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, processor = build(config)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(6)
    second, _ = build(config)
    other, _ = build(config.model_copy(update={"seed": 1}))
    same, differ = first.state_dict(), other.state_dict()
    assert all(torch.equal(weight, same[name]) for name, weight in second.state_dict().items())
    assert not torch.equal(same["language_model.lm_head.weight"], differ["language_model.lm_head.weight"])
    assert not torch.equal(same["adapters.0.attention.q_proj.weight"], differ["adapters.0.attention.q_proj.weight"])
    assert first.language_model.config._attn_implementation == "sdpa"
    assert first.config.text_config.vocab_size >= len(processor.tokenizer)
    assert first.config.image_token_id == processor.image_token_id


def test_sizes_arrive(shards):
    model, processor = build(config_of(shards, adapter={"every": 2, "gate_init": 0.5}, embedding_dim=24))
    text = model.config.text_config
    assert (text.hidden_size, text.num_hidden_layers, text.num_attention_heads, text.head_dim) == (32, 3, 4, 8)
    assert (text.intermediate_size, text.max_position_embeddings) == (128, 96)
    assert list(model.adapters) == ["1"]
    assert (model.vision.width, model.vision.grid, len(model.vision.trunk.blocks)) == (32, (4, 4), 2)
    assert processor.image_processor.input_size == [3, 32, 32]
    assert model.text_projection.out_features == 24


def test_every_family_takes_its_sizes(family, make_tokenizer):
    sizes = TextSizes(family=family, feed_forward=2.0, **SIZES)
    config = family_config(sizes, make_tokenizer())
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (32, 3, 4)
    assert config.max_position_embeddings == 96
    inner = [getattr(config, name, None) for name in ("intermediate_size", "ffn_dim", "n_inner")]
    assert 64 in inner
    assert config.vocab_size % 64 == 0 and config.vocab_size >= len(make_tokenizer())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"family": "qwen33"}, "did you mean qwen3"),
        ({"width": 33}, "width 33 is no multiple of heads 4"),
        ({"options": {"rope_thetta": 1}}, "options.rope_thetta is no setting of family qwen3"),
        ({"kv_heads": 3}, "heads 4 is no multiple of kv_heads 3"),
        (
            {"width": 30, "heads": 2},
            "family 'qwen3' cannot be used: ValueError: RoPE requires an even rotary dimension",
        ),
        (
            {"options": {"attention_dropout": "x"}},
            "family 'qwen3' cannot be used: TypeError: Field 'attention_dropout'",
        ),
        ({"family": "xlnet"}, "family 'xlnet' cannot be used: NotImplementedError"),
        ({"family": "gemma4_assistant"}, "family 'gemma4_assistant' cannot be used: ValueError: hidden_size_per_layer"),
    ],
)
def test_text_faults(make_tokenizer, changes, words):
    with pytest.raises(UsageError, match=words) as refusal:
        family_config(TextSizes(**{"family": "qwen3", **SIZES, **changes}), make_tokenizer())
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("language", "would", "mend"),
    [
        ("gemma3", "hidden size 2304 and 26 layers", "family gemma3_text"),
        ("gemma3n", "hidden size 2048 and 35 layers", "family gemma3n_text"),
        ("llama4", "hidden size 5120 and 48 layers", "family llama4_text"),
        ("mistral3", "hidden size 5120 and 40 layers", "family mistral"),
        ("qwen3_vl", "hidden size 4096 and 32 layers", "another family"),
        ("nemotron_h", "hidden size 32 and 4 layers", "under their own names in model.text.options, or choose another"),
    ],
)
def test_families_that_would_not_take_their_sizes(make_tokenizer, language, would, mend):
    """Refused before they are made: some would take tens of gigabytes."""
    words = f"family {language} would have {would} where width 32 and depth 3 are asked for; .*{mend}"
    with pytest.raises(UsageError, match=words) as refusal:
        family_config(TextSizes(family=language, **SIZES), make_tokenizer())
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("language", ["t5", "whisper", "falcon", "gptj", "deepseek_v3", "qwen3_next"])
def test_families_that_cannot_be_linked_are_refused_by_name(shards, language):
    with pytest.raises(UsageError, match=f"language model (family )?'{language}'") as refusal:
        build(config_of(shards, text={"family": language, **SIZES}))
    assert "\n" not in str(refusal.value)


def test_an_option_that_the_family_cannot_use(shards):
    with pytest.raises(UsageError, match="family 'qwen3' cannot be used: KeyError: 'nope'; choose another, or"):
        build(config_of(shards, text={"family": "qwen3", "options": {"hidden_act": "nope"}, **SIZES}))


def test_options_reach_the_family(make_tokenizer):
    sizes = TextSizes(family="qwen3", kv_heads=2, options={"tie_word_embeddings": True}, **SIZES)
    config = family_config(sizes, make_tokenizer())
    assert config.tie_word_embeddings and config.num_key_value_heads == 2


def test_timm_folder_keeps_its_weights(timm_folder):
    folder, trunk = timm_folder
    fields, tower = build_vision(folder)
    assert fields["name"] == "timm:vit_tiny_patch16_224"
    pixels = torch.rand(2, 3, 32, 32)
    tower.eval(), trunk.eval()
    assert torch.equal(tower(pixels), trunk.forward_features(pixels)[:, 1:])


def test_open_clip_tower_from_scratch():
    fields, tower = build_vision(VisionSizes(name="open_clip:ViT-S-32-alt", image_size=[64, 64]))
    assert fields["name"] == "open_clip:ViT-S-32-alt"
    assert tower(torch.rand(1, 3, 64, 64)).shape == (1, 4, tower.width)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("timm:vit_nothing", "timm has no model 'vit_nothing'"),
        ("open_clip:ViT-Z-1", "open_clip has no model 'ViT-Z-1'"),
        ("no/such/folder", "neither timm:NAME, open_clip:NAME nor a folder"),
        (VisionSizes(name="clip:x"), "names no library"),
        (VisionSizes(name="open_clip:ViT-B-32", width=64), "takes its sizes from its name; remove embed_dim"),
        (VisionSizes(name="timm:vit_tiny_patch16_224", options={"widht": 1}), "cannot be built"),
        (VisionSizes(**VISION | {"heads": 3}), "cannot be built: dim should be divisible by num_heads"),
        (VisionSizes(**VISION | {"options": {"act_layer": "nope"}}), "cannot be built"),
        (VisionSizes(**VISION | {"image_size": 36}), r"image_size 36 × 36 .* patch 8 × 8; .* such as 32 × 32"),
    ],
)
def test_vision_faults(spec, words):
    with pytest.raises(UsageError, match=words):
        build_vision(spec)


def test_vision_folder_of_another_kind(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="has no config.json that names an architecture"):
        build_vision(str(tmp_path))


def test_pretrained_parts_are_put_in(shards, timm_folder, text_folder):
    model, processor = build(config_of(shards, vision=timm_folder[0], text=text_folder, tokenizer={}))
    own = AutoModelForCausalLM.from_pretrained(text_folder)
    ids = processor.tokenizer("a red circle", return_tensors="pt")["input_ids"]
    assert torch.equal(model.eval()(ids).logits, own(ids).logits), "zero gates: the language model as it was"
    assert processor.image_processor.mean == [0.1, 0.2, 0.3]


def test_missing_special_tokens_are_added_and_embeddings_grow(text_folder, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"</s>": 0, "red": 1, "unk": 2}, unk_token="unk"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="unk").save_pretrained(tmp_path)
    config = LlamaConfig(
        vocab_size=3, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, eos_token_id=0
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model, tokenizer = pretrained_text(str(tmp_path))
    assert model.get_input_embeddings().num_embeddings >= len(tokenizer) > 3
    old = AutoModelForCausalLM.from_pretrained(tmp_path).get_input_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight[:3], old)
    assert tokenizer.eos_token == "</s>", "what a tokenizer has is kept"
    assert "<image>" in tokenizer.get_vocab() and tokenizer.mask_token == "<mask>"


def test_a_tokenizer_that_exists(shards, text_folder):
    model, processor = build(config_of(shards, tokenizer={"path": text_folder}))
    assert processor.tokenizer.get_vocab() == AutoTokenizer.from_pretrained(text_folder).get_vocab()


def test_saved_model_goes_on(shards, make_model, make_processor, tmp_path):
    model = make_model(gate_init=0.3)
    save(model, make_processor(), tmp_path / "model")
    config = Config.model_validate(
        {"model": {"path": str(tmp_path / "model")}, "data": {"train": shards}, "stages": STAGES}
    )
    loaded, _ = build(config)
    assert all(torch.equal(weight, loaded.state_dict()[name]) for name, weight in model.state_dict().items())


def test_a_quantized_model_does_not_go_on(shards, make_model, make_processor, tmp_path):
    model = make_model()
    quantize(model, "int8")
    save(model, make_processor(), tmp_path / "model")
    config = Config.model_validate(
        {"model": {"path": str(tmp_path / "model")}, "data": {"train": shards}, "stages": STAGES}
    )
    with pytest.raises(UsageError, match="is quantized and its weights cannot learn; train the full-precision model"):
        build(config)


@pytest.mark.parametrize(("source", "words"), [("no/such", "cannot be read"), ("", "cannot be read")])
def test_text_that_is_not_there(shards, source, words, tmp_path):
    with pytest.raises(UsageError, match=words):
        pretrained_text(source or str(tmp_path))


# Longer texts

YARN = {"type": "yarn", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3"])
def test_stretched_positions_are_those_of_transformers(shards, text_folder, kind):
    """The judge is the language model that transformers makes of the same settings, as its documentation writes them."""
    scaling = {"type": kind, "factor": 4.0}
    text = build(config_of(shards, text=text_folder, tokenizer={}, rope_scaling=scaling))[0].language_model
    rope = {"rope_theta": 10000.0, "rope_type": kind, "factor": 4.0}
    rope |= {"original_max_position_embeddings": 256} if kind != "linear" else {}
    rope |= LLAMA3 if kind == "llama3" else {}
    untouched = AutoConfig.from_pretrained(text_folder, rope_parameters=rope, max_position_embeddings=1024)
    expected = AutoModelForCausalLM.from_pretrained(text_folder, config=untouched).eval()
    ids = torch.arange(6, 106)[None]
    with torch.no_grad():
        found, plain = (model.eval()(ids).logits for model in (text, pretrained_text(text_folder)[0]))
        assert torch.equal(found, expected(ids).logits) and not torch.allclose(found, plain, rtol=1e-2)


def test_stretched_positions_from_scratch_and_from_a_saved_model(shards, make_model, make_processor, tmp_path):
    scratch = build(config_of(shards, rope_scaling=YARN))[0]
    assert scratch.max_tokens == 4 * SIZES["positions"]
    before = make_model("llama", gate_init=0.5)
    save(before, make_processor(), tmp_path / "model")
    data = {"data": {"train": shards}, "stages": STAGES}
    after, processor = build(
        Config.model_validate({"model": {"path": str(tmp_path / "model"), "rope_scaling": YARN}} | data)
    )
    assert after.max_tokens == 4 * before.max_tokens
    weights = before.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in after.state_dict().items())
    save(after, processor, tmp_path / "longer")
    again, _ = read(tmp_path / "longer")
    ids = torch.arange(6, 106)[None]
    with torch.no_grad():
        logits = [model.eval()(ids).logits for model in (before, after, again)]
    assert torch.equal(logits[1], logits[2]) and not torch.allclose(logits[0], logits[1], rtol=1e-2)


@pytest.mark.parametrize(
    ("language", "words"),
    [
        ("gpt2", "model.rope_scaling: family gpt2 has no rotary positions to stretch"),
        ("bert", "model.rope_scaling: family bert has no rotary positions to stretch"),
    ],
)
def test_positions_that_cannot_be_stretched(make_text_config, language, words):
    with pytest.raises(UsageError, match=words):
        scale_rope(make_text_config(language), RopeScaling.model_validate(YARN))


def test_layers_that_never_see_far_keep_their_positions(make_text_config):
    config = make_text_config("gemma3_text")
    scale_rope(config, RopeScaling.model_validate(YARN))
    rope = config.rope_parameters
    assert rope["full_attention"]["rope_type"] == "yarn" and rope["sliding_attention"]["rope_type"] == "default"


def test_positions_are_stretched_once(make_text_config):
    config, scaling = make_text_config("phi3"), RopeScaling.model_validate(YARN)
    scale_rope(config, scaling)
    assert config.rope_parameters["original_max_position_embeddings"] == config.original_max_position_embeddings == 256
    with pytest.raises(UsageError, match="of this phi3 are stretched already .yarn × 4.0.; remove it"):
        scale_rope(config, scaling)


def test_a_head_that_cannot_be_called_alone_is_refused_where_it_is_needed(
    shards, make_model, make_processor, monkeypatch, tmp_path
):
    def refuse(language_model):
        raise UsageError(f"no head of {language_model.config.model_type}")

    save(make_model(), make_processor(), tmp_path)
    monkeypatch.setattr("vlm.train.build.check_head", refuse)
    for objective in ("joint", "contrastive"):
        stages = [{"objective": objective, "steps": 1}]
        config = Config.model_validate({"model": {"path": str(tmp_path)}, "data": {"train": shards}, "stages": stages})
        with pytest.raises(UsageError, match="no head of qwen3") if objective == "joint" else nullcontext():
            build(config)


def test_families_that_only_read_do_not_write(shards):
    with pytest.raises(UsageError, match="stages.0: objective joint writes text, and family bert only reads it"):
        build(config_of(shards, text={"family": "bert", **SIZES}))


def test_table_of_what_trains(make_model):
    model = make_model()
    model.vision.requires_grad_(False)
    model.language_model.model.embed_tokens.requires_grad_(False)
    table = training_table(model, Stage(objective="joint", steps=1, lr=2e-4))
    rows = {line.split()[0]: line for line in table.splitlines() if line[0] != "─"}
    vision = sum(parameter.numel() for parameter in model.vision.parameters())
    assert f"{vision:,}" in rows["vision"] and "frozen" in rows["vision"] and "–" in rows["vision"]
    assert "all" in rows["adapters"] and "0.0002" in rows["adapters"]
    assert "%" in rows["language_model"]
    assert f"{sum(parameter.numel() for parameter in model.parameters()):,}" in rows["total"]
    assert len({len(line) for line in table.splitlines()}) == 1, "columns are aligned"
