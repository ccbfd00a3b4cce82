"""llama.cpp as a peer of `vlm bench decode`: it runs the same weights, and is named where it is missing."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from vlm.cli import run
from vlm.errors import RunError
from vlm.generation import bench, bench_llama

TINY = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
PROMPT = [5, 200, 17, 300, 42, 9]


@pytest.fixture
def needed():
    """What takes minutes to compile, so that tests of it are heavy."""
    for name in bench_llama.NEEDED:
        pytest.importorskip(name, reason="vlm bench decode --against llama.cpp needs it: pip install 'vlm[llama]'")


@pytest.mark.heavy
@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_llama_cpp_runs_the_same_model(needed, tmp_path, tied, kind):
    """In float32 logits and greedy tokens are Hugging Face's; in Q8_0 they are as near as 8 bits are."""
    torch.manual_seed(0)
    config = Qwen3Config(
        **TINY,
        tie_word_embeddings=tied,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_theta": 5e3, "rope_type": "default"},
        initializer_range=0.2,
    )
    model = Qwen3ForCausalLM(config).eval()
    for norm in (weight for weight in model.parameters() if weight.dim() == 1):
        norm.uniform_(0.5, 1.5)
    bench_llama.write_gguf(model, tmp_path / "tiny.gguf", kind)
    with bench_llama.opened(tmp_path / "tiny.gguf", 1, 64) as peer:
        said = peer.generate(PROMPT, 24)
        whole = model(torch.tensor([PROMPT + said[:-1]])).logits[0, len(PROMPT) - 1 :]
        peer.generate(PROMPT, 1)
        logits = torch.stack([torch.tensor(peer.logits([token])) for token in said[:-1]])
    error = (logits - whole[1:]).std() / whole.std()
    if kind == "F32":
        assert said == whole.argmax(dim=-1).tolist() and len(set(said)) > 5
    assert error < {"F32": 2e-3, "Q8_0": 5e-2}[kind]


@pytest.mark.heavy
def test_a_file_that_is_none_is_told_of(needed, tmp_path, capfd):
    (tmp_path / "torn.gguf").write_bytes(b"GGUF")
    with (
        pytest.raises(RunError, match="llama.cpp does not take torn.gguf: .*gguf"),
        bench_llama.opened(tmp_path / "torn.gguf", 1, 64),
    ):
        pass
    assert capfd.readouterr() == ("", "")


@pytest.mark.heavy
def test_rows_say_which_build_was_measured(needed, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "BESIDE_LLAMA", (TINY,))
    monkeypatch.setattr(bench, "WORDS", TINY["vocab_size"])
    monkeypatch.setattr(bench, "NEW", 3)
    # Two tokens of a tiny model take too little time to be told apart.
    monkeypatch.setattr(bench, "tokens_per_second", lambda seconds, rows: rows / seconds(rows, bench.NEW))
    with torch.compiler.set_stance("force_eager"):  # compiling takes longer than all the rest
        assert (
            run(["bench", "decode", "--against", "llama.cpp", "--rounds", "1", "--out", str(tmp_path / "rows.json")])
            == 0
        )
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert row["ours"] > 0 and row["peer"] > 0 and row["target"] == "≥ 1.2"
    assert "peer: llama-cpp-python" in row["conditions"] and "AVX" in row["conditions"]


@pytest.mark.parametrize("name", bench_llama.NEEDED)
def test_what_is_missing_is_named_with_the_mend(name, monkeypatch, capsys):
    for each in bench_llama.NEEDED:
        monkeypatch.setitem(sys.modules, each, None if each == name else sys)
    assert run(["bench", "decode", "--against", "llama.cpp"]) == 2
    told = capsys.readouterr().err
    assert f"needs {name}" in told and "pip install 'vlm[llama]'" in told
