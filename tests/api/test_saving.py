"""A model folder: what it holds, how it comes back, what transformers makes of it, and what is refused."""

from __future__ import annotations

import json
import os
import socket

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import vlm
from vlm import saving
from vlm.api import user_turn
from vlm.lora import add_lora, base_hash, merge_lora, save_lora
from vlm.saving import save

HELD = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "processor_config.json",
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
    "README.md",
}


@pytest.fixture
def folder(make_model, make_processor, tmp_path):
    """A saved tiny model."""
    save(make_model(gate_init=1.0), make_processor(caption_prompt="Say it."), tmp_path / "model")
    return tmp_path / "model"


def test_a_folder_holds_everything_and_comes_back_exactly(folder, make_model, make_picture, capfd, recwarn):
    assert {file.name for file in folder.iterdir()} == HELD
    again = vlm.load(folder)
    assert capfd.readouterr() == ("", "") and not recwarn.list
    model = make_model(gate_init=1.0)
    messages = [user_turn([make_picture()], "What?"), user_turn([], "a")]
    inputs = again.processor.apply_chat_template(messages, tokenize=True, return_dict=True)
    with torch.no_grad():
        assert torch.equal(again.model(**inputs).logits, model(**inputs).logits)
    assert again.processor.caption_prompt == "Say it."
    assert not again.model.training and again.model.device.type == "cpu"
    first = vlm.VLM(model, again.processor)
    assert again.caption(make_picture(), max_new_tokens=8) == first.caption(make_picture(), max_new_tokens=8)


def test_saving_what_was_loaded_changes_nothing(folder, tmp_path):
    for source, copy in ((folder, tmp_path / "once"), (tmp_path / "once", tmp_path / "twice")):
        again = vlm.load(source)
        save(again.model, again.processor, copy)
    for name in sorted(HELD - {"README.md"}):
        twice = (tmp_path / "twice" / name).read_bytes()
        assert twice == (tmp_path / "once" / name).read_bytes(), name
        if name != "config.json":  # the first one does not name the dtype of the language model yet
            assert twice == (folder / name).read_bytes(), name


def test_decoding_defaults_are_saved(folder):
    defaults = json.loads((folder / "generation_config.json").read_text())
    assert defaults["eos_token_id"] == [1] and defaults["pad_token_id"] == 0 and defaults["suppress_tokens"] == [3]


def test_an_adapter_is_put_onto_its_base_and_merged(folder, tmp_path):
    trained = vlm.load(folder).model
    base = base_hash(trained.state_dict())
    add_lora(trained, r=2)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    save_lora(trained, tmp_path / "adapter", base, {})
    merge_lora(trained)
    again = vlm.load(folder, adapter=tmp_path / "adapter").model.state_dict()
    assert set(again) == set(trained.state_dict()), "nothing of the update is left beside the weights"
    for name, value in trained.state_dict().items():
        torch.testing.assert_close(again[name], value)


def test_transformers_finds_it(folder, make_picture):
    assert isinstance(hf.AutoConfig.from_pretrained(folder), vlm.VLMConfig)
    assert isinstance(hf.AutoModelForImageTextToText.from_pretrained(folder), vlm.VLMModel)
    assert isinstance(hf.AutoProcessor.from_pretrained(folder), vlm.VLMProcessor)
    assert isinstance(hf.AutoImageProcessor.from_pretrained(folder), vlm.VLMImageProcessor)
    talk = hf.pipeline("image-text-to-text", model=str(folder), device="cpu")
    messages = user_turn([make_picture()], "What?")
    (said,) = talk(text=messages, max_new_tokens=8, do_sample=False, return_full_text=False)
    assert said["generated_text"].strip() == vlm.load(folder).generate(messages, max_new_tokens=8)


def test_encoder_models_are_saved_too(make_model, make_processor, tmp_path):
    save(make_model("bert"), make_processor(), tmp_path / "model")
    assert {file.name for file in (tmp_path / "model").iterdir()} >= HELD - {"generation_config.json"}
    assert "fill_mask" in (tmp_path / "model" / "README.md").read_text()
    assert len(vlm.load(tmp_path / "model").fill_mask("a <mask>")) == 5


def test_the_model_card_runs(folder, make_picture, monkeypatch, tmp_path):
    card = (folder / "README.md").read_text()
    assert card.startswith("---\n") and "pipeline_tag: image-text-to-text" in card
    monkeypatch.chdir(tmp_path)
    make_picture().save("picture.jpg")
    exec(card.split("```python\n")[1].split("```")[0], {})  # its load("model") finds the folder beside


@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16", torch.bfloat16), ("float32", torch.float32), (torch.float16, torch.float16)]
)
def test_a_dtype_may_be_asked_for(name, dtype, folder, make_picture):
    model = vlm.load(folder, dtype=name)
    assert model.model.dtype == dtype
    embedding = model.embed_image(make_picture())
    assert embedding.dtype == torch.float32 and embedding.norm().item() == pytest.approx(1, abs=1e-6)
    assert model.answer(make_picture(), "What?", max_new_tokens=3) is not None


def test_a_failed_save_leaves_the_old_folder_and_no_debris(folder, make_model, make_processor, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    processor = make_processor()
    monkeypatch.setattr(type(processor), "save_pretrained", full)
    with pytest.raises(vlm.RunError, match="No space left on device") as failure:
        save(make_model(), processor, folder)
    assert "\n" not in str(failure.value)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [file.name for file in folder.parent.iterdir()] == ["model"]


def missing(folder):
    weights = load_file(folder / "model.safetensors")
    weights.pop("adapters.1.attention_gate")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def unknown(folder):
    weights = {**load_file(folder / "model.safetensors"), "adapters.9.attention_gate": torch.zeros(1)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def reshaped(folder):
    weights = {**load_file(folder / "model.safetensors"), "adapters.1.attention_gate": torch.zeros(2)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def truncated(folder):
    os.truncate(folder / "model.safetensors", 1000)


def other_kind(folder):
    hf.GPT2Config().save_pretrained(folder)


def not_json(folder):
    (folder / "config.json").write_text("{")


def unknown_adapter(folder):
    config = json.loads((folder / "config.json").read_text())
    config["adapter"]["gates"] = 1
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (missing, "lacks weights, 1 of them, the first adapters.1.attention_gate"),
        (unknown, "holds unknown weights, 1 of them, the first adapters.9.attention_gate"),
        (reshaped, "cannot be read"),
        (truncated, "cannot be read"),
        (other_kind, "another kind \\(gpt2\\)"),
        (not_json, "no model can be read"),
        (unknown_adapter, "'gates'"),
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot be read"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: [file.unlink() for file in folder.glob("*token*")], "cannot be read"),
    ],
)
def test_broken_folders_are_refused_in_one_line(damage, message, folder, capfd):
    damage(folder)
    capfd.readouterr()
    with pytest.raises(vlm.UsageError, match=message) as refusal:
        vlm.load(folder)
    assert "\n" not in str(refusal.value) and str(folder) in str(refusal.value) or "gates" in message
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("place", ["{tmp}/none", "none", "./none", "{tmp}", "../none"])
def test_folders_that_are_not_there_are_refused(place, tmp_path):
    with pytest.raises(vlm.UsageError, match="no model folder|no config.json") as refusal:
        vlm.load(place.format(tmp=tmp_path))
    assert "\n" not in str(refusal.value)


def test_an_unreachable_hub_id_is_refused_without_a_network(monkeypatch):
    def unplugged(*args, **kwargs):
        raise AssertionError("the network was asked although HF_HUB_OFFLINE=1")

    monkeypatch.setattr(socket, "create_connection", unplugged)
    with pytest.raises(vlm.UsageError, match="some-org/some-model") as refusal:
        vlm.load("some-org/some-model")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"device": "abacus"}, "'abacus'"), ({"dtype": "int3"}, "'int3'"), ({"device": "cuda"}, "no CUDA GPU")],
)
def test_devices_and_dtypes_that_are_not_there_are_refused(options, message, folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(vlm.UsageError, match=message):
        vlm.load(folder, **options)


def test_loading_leaves_transformers_as_talkative_as_it_was(folder):
    before = hf.logging.get_verbosity(), hf.utils.logging.is_progress_bar_enabled()
    vlm.load(folder)
    with pytest.raises(vlm.UsageError):
        missing(folder)
        saving.read(folder)
    assert (hf.logging.get_verbosity(), hf.utils.logging.is_progress_bar_enabled()) == before
