"""What is chosen for a machine, from what it is said to be."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from ppo_engine import machine
from ppo_engine.__main__ import Memory, _measured_event
from ppo_engine.decoder import Decoder, _Stack
from ppo_engine.packing import pack
from ppo_engine.policy import BaseModel, Policy
from tests.tiny_run import tiny_config


def tiny_llama():
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


@pytest.mark.parametrize(
    ("fp32", "bf16", "chosen"), [(100, 1, "fp32"), (100, 149, "fp32"), (100, 151, "bf16")]
)
def test_bf16_is_taken_where_it_is_clearly_faster(fp32, bf16, chosen):
    assert machine.faster_precision({"fp32": fp32, "bf16": bf16}) == chosen


def test_both_formats_are_measured():
    found = machine.gemm_gflops("cpu")

    assert set(found) == {"fp32", "bf16"}
    assert all(value > 0 for value in found.values())


def test_the_memory_of_a_token_is_what_the_backward_pass_keeps(tiny_model):
    base = BaseModel.load(tiny_model, precision="fp32", device="cpu")
    estimated = machine.bytes_per_token(base.model)
    config = tiny_config()
    policy = Policy(base, config.lora, temperature=1.0, seed=0)
    decoder = Decoder(policy.model.get_base_model())
    attention_mask = torch.ones(4, 80, dtype=torch.bool)
    packed = pack(attention_mask, attention_mask, prefix=0)
    held = []
    apply = _Stack.apply
    try:
        _Stack.apply = lambda work, kept, *rest: (held.append(kept), apply(work, kept, *rest))[1]
        decoder.states(
            torch.zeros(4, 80).long(), packed, adapter="default", trained=policy.adapter_weights
        )
    finally:
        _Stack.apply = apply

    tensors = [
        tensor
        for layer in held[0]
        for tensor in (layer.inputs, layer.qkv, layer.attended.result, layer.middle, layer.gate_up)
    ]
    assert len(tensors) == 2 * 5
    assert sum(tensor.nbytes for tensor in tensors) == estimated * 320


@pytest.mark.parametrize(
    ("free", "longest", "minibatch", "rows"),
    [
        (10**12, 64, 8, 8),  # no more than a minibatch has
        (10**12, 64, 100, 16),  # 1024 tokens are enough
        (10**12, 5000, 8, 1),  # never less than one row
        (2 * 64 * 5 * 1152 + 10, 64, 8, 5),  # five rows fit half of the free memory
    ],
)
def test_a_micro_batch_is_bounded_by_speed_memory_and_the_minibatch(
    monkeypatch, free, longest, minibatch, rows
):
    model = tiny_llama()
    monkeypatch.setattr(machine, "free_bytes", lambda _device: free)
    # By hand: 3 layers × (2·8 + 2·(4 + 2)·2 + 2·16) values of 4 bytes, 864 bytes.
    assert machine.bytes_per_token(model) == 864
    monkeypatch.setattr(machine, "bytes_per_token", lambda _model: 1152)

    found = machine.micro_batch_rows(model, "cpu", longest_row=longest, minibatch_size=minibatch)

    assert found == rows


def test_models_of_other_families_have_an_estimate_too():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=8, n_layer=3, n_head=4))

    # 3 layers × (2·8 + 2·(4 + 4)·2 + 2·32) values of 4 bytes.
    assert machine.bytes_per_token(model) == 1344


def test_free_memory_respects_the_containers_limit(monkeypatch):
    monkeypatch.setattr(machine, "_available_bytes", lambda: 1000)
    monkeypatch.setattr(machine, "_group_limit_bytes", lambda: 300)

    assert machine.free_bytes("cpu") == 300


@pytest.mark.parametrize(
    ("responses", "expected"),
    [
        # By hand: 4 rows of 30 tokens with 864 bytes, and 20 tokens' 50 scores of 4 bytes, thrice;
        # the head's copy, 50 entries of 8 numbers.
        (4, 4 * (30 * 864 + 20 * 50 * 12) + 50 * 8 * 4),
        # Keys and values: 30 tokens × 3 layers × 2 × 2 heads × 2 numbers of 4 bytes; 50 scores;
        # a copy of 3 layers: q and o 8·8, k and v 4·8, three of the MLP 16·8, each of 4 bytes.
        (900, 900 * (30 * 96 + 50 * 12) + 50 * 8 * 4 + 3 * (2 * 64 + 2 * 32 + 3 * 128) * 4),
    ],
)
def test_a_step_takes_what_its_larger_part_takes(monkeypatch, responses, expected):
    monkeypatch.setattr(machine, "is_packable", lambda _device, _dtype: True)
    found = machine.step_bytes(
        tiny_llama(),
        "cpu",
        responses=responses,
        micro_batch_rows=4,
        longest_row=30,
        response_tokens=20,
    )

    assert found == expected


@pytest.mark.parametrize(
    ("total", "group", "packable", "expected"),
    [
        (4000, 10**9, True, 400),
        (3999, 10**9, True, 0),  # a tenth is not enough
        (10**9, 3999, True, 0),
        (10**9, 10**9, False, 0),
    ],
)
def test_weights_are_copied_where_a_tenth_of_all_memory_holds_them(
    monkeypatch, total, group, packable, expected
):
    monkeypatch.setattr(machine, "_total_bytes", lambda: total)
    monkeypatch.setattr(machine, "_group_limit_bytes", lambda: group)
    monkeypatch.setattr(machine, "is_packable", lambda _device, _dtype: packable)

    assert machine.packed_copy_bytes([torch.zeros(7, 10), torch.zeros(3, 10)]) == expected


@pytest.mark.parametrize(("free", "level"), [(3 * 2**30, "info"), (2**30, "warn")])
def test_a_step_that_may_not_fit_is_told_beforehand(free, level):
    config = tiny_config(micro_batch_size=4)

    event = _measured_event(config, ["micro_batch_size"], {}, Memory(2 * 2**30, free))

    assert event.level == level
    assert "needs about 2.0 GiB" in event.message
    assert ("lower batch_size" in event.message) == (level == "warn")
    assert event.data["micro_batch_size"] == 4
    assert event.data["memory.needed_bytes"] == 2 * 2**30
