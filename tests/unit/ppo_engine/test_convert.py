import hashlib
import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppo_engine.convert import convert_gguf, main
from ppo_engine.errors import InvalidConfig

TOKENS = ["<unk>", "<s>", "</s>", "a", "b", "ab", "Ġ"]
CONTROL, NORMAL = 3, 1
WIDTH, INNER, CONTEXT = 16, 32, 64
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """A one-layer llama with random weights, as GGUF; returns its tensors."""
    random = np.random.default_rng(0)
    shapes = {
        "token_embd.weight": (len(TOKENS), WIDTH),
        "output_norm.weight": (WIDTH,),
        "blk.0.attn_norm.weight": (WIDTH,),
        "blk.0.ffn_norm.weight": (WIDTH,),
        "blk.0.attn_q.weight": (WIDTH, WIDTH),
        "blk.0.attn_k.weight": (WIDTH, WIDTH),
        "blk.0.attn_v.weight": (WIDTH, WIDTH),
        "blk.0.attn_output.weight": (WIDTH, WIDTH),
        "blk.0.ffn_gate.weight": (INNER, WIDTH),
        "blk.0.ffn_up.weight": (INNER, WIDTH),
        "blk.0.ffn_down.weight": (WIDTH, INNER),
    }
    tensors = {name: random.normal(size=s).astype(np.float32) for name, s in shapes.items()}
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([CONTROL] * 3 + [NORMAL] * 4)
    writer.add_token_merges(["a b"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    path = tmp_path / "small.gguf"
    write_gguf(path)
    return path


def test_a_converted_model_has_the_weights_of_the_file(tmp_path: Path) -> None:
    tensors = write_gguf(tmp_path / "small.gguf")

    out = convert_gguf(tmp_path / "small.gguf", tmp_path / "out", model_id="o/small")

    model = AutoModelForCausalLM.from_pretrained(out, use_safetensors=True)
    embedding = model.get_input_embeddings().weight.detach()
    value = model.model.layers[0].self_attn.v_proj.weight.detach()
    assert embedding.dtype == torch.float32
    assert torch.equal(embedding, torch.from_numpy(tensors["token_embd.weight"]))
    assert torch.equal(value, torch.from_numpy(tensors["blk.0.attn_v.weight"]))


def test_a_converted_model_keeps_tokenizer_and_chat_template(gguf: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(
        convert_gguf(gguf, tmp_path / "out", model_id="o/small")
    )

    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer("ab").input_ids == [TOKENS.index("ab")]
    assert tokenizer.eos_token == "</s>"


def test_a_converted_model_says_what_it_is(gguf: Path, tmp_path: Path) -> None:
    out = convert_gguf(gguf, tmp_path / "out", model_id="o/small", aliases=["small"], licence="MIT")

    weights = (out / "model.safetensors").read_bytes()
    entry = json.loads((out / "model.json").read_text())
    assert entry == {
        "id": "o/small",
        "aliases": ["small"],
        "sha256": hashlib.sha256(weights).hexdigest(),
        "parameters": len(TOKENS) * WIDTH + 3 * WIDTH + 4 * WIDTH**2 + 3 * WIDTH * INNER,
        "context_length": CONTEXT,
        "licence": "MIT",
    }


def test_other_users_may_read_a_converted_model(gguf: Path, tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        out = convert_gguf(gguf, tmp_path / "out", model_id="o/small")
    finally:
        os.umask(before)

    assert {stat.S_IMODE(file.stat().st_mode) for file in out.iterdir()} == {0o644}


def test_what_is_no_gguf_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF, but not really")

    with pytest.raises(InvalidConfig, match=r"broken\.gguf cannot be read as GGUF"):
        convert_gguf(tmp_path / "broken.gguf", tmp_path / "out", model_id="o/small")

    assert [file.name for file in tmp_path.iterdir()] == ["broken.gguf"]


def test_the_command_tells_a_fault_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main([str(tmp_path / "none.gguf"), str(tmp_path / "out"), "--id", "o/small"])

    assert code == InvalidConfig.exit_code
    assert "none.gguf cannot be read as GGUF" in capsys.readouterr().err
