"""Our decoder against transformers' own forward and backward pass, on random models."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from ppo_engine import linear_groups, native
from ppo_engine.decoder import Decoder
from ppo_engine.flat_weights import FlatWeights
from ppo_engine.generation import position_ids
from ppo_engine.linear_groups import AdapterSet
from ppo_engine.packing import common_prefix, pack

RELATIVE = 1e-5
"""Of the largest element: fp32 sums in another order."""
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-6}
"""Of the largest element: inner values are rounded, too."""
SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def llama(**settings):
    return LlamaForCausalLM(LlamaConfig(**SIZES | settings))


MODELS = {
    "llama": llama,
    "llama with biases": lambda: llama(attention_bias=True, mlp_bias=True),
    "llama with wide heads": lambda: llama(head_dim=32),
    "llama with one key head": lambda: llama(num_key_value_heads=1),
    "llama 3 positions": lambda: llama(rope_parameters=LLAMA3_ROPE),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)),
}


def adapted(build, *, targets="all-linear", rank=4):
    """A random model with biases, norms and an adapter that all matter."""
    torch.manual_seed(0)
    model = build().eval().requires_grad_(requires_grad=False)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter.data += 0.3 * torch.randn_like(parameter)
        elif "embed" not in name:
            parameter.data.normal_(std=0.1)
    settings = LoraConfig(r=rank, lora_alpha=12, target_modules=targets, task_type="CAUSAL_LM")
    peft = get_peft_model(model, settings)
    for parameter in peft.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.1)
    return peft


class Batch:
    """Rows of unlike lengths, padded on both sides, that begin alike."""

    def __init__(self, *, shared: int = 18) -> None:
        generator = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(97, (6, 70), generator=generator)
        self.attention_mask = torch.zeros(6, 70, dtype=torch.bool)
        self.read = torch.zeros(6, 70, dtype=torch.bool)
        for row, (start, end) in enumerate([(0, 70), (3, 64), (9, 60), (9, 61), (2, 45), (0, 70)]):
            self.attention_mask[row, start:end] = True
            self.tokens[row, start : start + shared] = self.tokens[0, :shared]
            self.read[row, max(30, start + shared) : end - 1] = True
        self.read[5] = False  # nothing of the last row is asked for

    def theirs(self, peft):
        hidden = peft.get_base_model().base_model(
            input_ids=self.tokens,
            attention_mask=self.attention_mask.long(),
            position_ids=position_ids(self.attention_mask),
            use_cache=False,
        )
        return hidden.last_hidden_state[self.read]

    def ours(self, peft, *, adapter="default", pad_to=0, prefix=None, trained=None):
        if prefix is None:
            prefix = common_prefix(self.tokens, self.attention_mask, self.read)
        packed = pack(self.attention_mask, self.read, prefix=prefix, pad_to=pad_to)
        decoder = Decoder(peft.get_base_model())
        return decoder.states(self.tokens, packed, adapter=adapter, trained=trained)


def trained_weights(peft):
    return FlatWeights({name: p for name, p in peft.named_parameters() if p.requires_grad})


def gradients(weights, states):
    above = torch.randn(states.shape, generator=torch.Generator().manual_seed(2))
    return list(weights.gradients_of((states * above).sum()).values())


def assert_near(found, expected):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= RELATIVE * expected.abs().max()


@pytest.fixture
def without_kernels(monkeypatch):
    monkeypatch.setattr(native, "_kernels", dict)


@pytest.mark.usefixtures("without_kernels")
@pytest.mark.parametrize("name", MODELS)
def test_without_compiled_kernels_they_are_those_of_transformers_too(name):
    test_states_and_gradients_are_those_of_transformers(name)


@pytest.mark.parametrize("name", MODELS)
def test_states_and_gradients_are_those_of_transformers(name):
    peft, batch = adapted(MODELS[name]), Batch()
    weights = trained_weights(peft)
    expected = batch.theirs(peft)
    of_expected = gradients(weights, expected)

    found = batch.ours(peft, trained=weights)

    assert_near(found.detach(), expected.detach())
    for ours, theirs in zip(gradients(weights, found), of_expected, strict=True):
        assert theirs.abs().max() > 0
        assert_near(ours, theirs)


@pytest.mark.parametrize(
    "targets", [["q_proj", "v_proj"], ["o_proj"], ["up_proj", "down_proj"], ["k_proj", "gate_proj"]]
)
def test_an_adapter_on_some_layers_only(targets):
    peft, batch = adapted(MODELS["llama"], targets=targets), Batch()
    weights = trained_weights(peft)
    expected = batch.theirs(peft)
    of_expected = gradients(weights, expected)

    found = batch.ours(peft, trained=weights)

    assert_near(found.detach(), expected.detach())
    for ours, theirs in zip(gradients(weights, found), of_expected, strict=True):
        assert_near(ours, theirs)


WAYS = {
    "as it comes": {},
    "without large products": {"large_product_kernels_for": lambda _: None},
    "without kernels": {
        "large_product_kernels_for": lambda _: None,
        "product_kernels_for": lambda _: None,
    },
}


# With the second one the kernels take some groups and not the others.
@pytest.mark.parametrize("most_ranks", [1536, 3])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", ROUNDING)
@torch.no_grad()
def test_groups_outputs_and_gradients_are_those_of_their_formula(
    monkeypatch, way, dtype, most_ranks
):
    for name, value in WAYS[way].items():
        monkeypatch.setattr(linear_groups, name, value)
    monkeypatch.setattr(native, "MOST_RANKS", most_ranks)
    targets = ["q_proj", "v_proj", "o_proj", "down_proj"]
    peft = adapted(lambda: MODELS["qwen2"]().to(dtype), targets=targets, rank=3)
    decoder = Decoder(peft.get_base_model())
    prepared = zip(decoder.layers, decoder.group_adapters("default"), strict=True)
    groups = [each for layer, of in prepared for each in zip(layer.groups, of, strict=True)]

    weights = trained_weights(peft)
    adapter_set = AdapterSet([group for group, _ in groups], "default")
    together = adapter_set.gradients(weights)
    wanted: list[torch.Tensor] = []
    for (group, adapters), into in zip(groups, together.groups, strict=True):
        inputs = torch.randn(40, group.weight.shape[1]).to(dtype)
        onto = torch.randn(40, len(group.weight)).to(dtype)
        of_outputs = torch.randn(40, len(group.weight)).to(dtype)
        exact = inputs.double().requires_grad_()
        found = group.adapters("default")
        factors = [each.detach().double().requires_grad_() for _, x in found for each in (x.a, x.b)]
        with torch.enable_grad():
            expected = exact @ group.weight.double().t() + onto
            if group.bias is not None:
                expected = expected + group.bias.double()
            for (columns, x), a, b in zip(found, factors[::2], factors[1::2], strict=True):
                low = x.scale * exact @ a.t() @ b.t()
                room = (columns.start, expected.shape[1] - columns.stop)
                expected = expected + torch.nn.functional.pad(low, room)
        of_exact, *of_factors = torch.autograd.grad(
            expected, [exact, *factors], of_outputs.double()
        )

        outputs, inner = group.forward(inputs, adapters, onto=onto)
        of_inputs = group.backward(of_outputs, inputs, inner, adapters, into)

        assert outputs.dtype == of_inputs.dtype == dtype
        assert_rounded(outputs, expected, dtype)
        assert_rounded(of_inputs, of_exact, dtype)
        wanted += of_factors

    together.gather()
    assert together.together.dtype == torch.float32
    for ours, theirs in zip(weights.split(together.together).values(), wanted, strict=True):
        assert_rounded(ours, theirs, dtype)


def assert_rounded(found, expected, dtype):
    assert found.shape == expected.shape
    apart = (found.double() - expected).abs().max()
    assert apart <= ROUNDING[dtype] * expected.abs().max()


@pytest.mark.parametrize("dtype", ROUNDING)
def test_weights_may_stand_in_any_order_and_beside_others(dtype):
    peft, batch = adapted(lambda: llama().to(dtype)), Batch()
    plain = trained_weights(peft)
    expected = dict(
        zip(plain.parameters, gradients(plain, batch.ours(peft, trained=plain)), strict=True)
    )
    others = {"other": torch.nn.Parameter(torch.randn(3))}
    weights = FlatWeights(others | dict(reversed(plain.parameters.items())))

    found = gradients(weights, batch.ours(peft, trained=weights))

    for name, each in zip(weights.parameters, found, strict=True):
        if name == "other":
            assert each.tolist() == [0, 0, 0]
        else:
            assert torch.equal(each, expected[name])


def test_frozen_weights_get_no_gradient():
    peft, batch = adapted(MODELS["llama"]), Batch()
    weights = trained_weights(peft)
    assert batch.ours(peft, trained=weights).requires_grad
    for parameter in weights.parameters.values():
        parameter.requires_grad = False

    assert not batch.ours(peft, trained=weights).requires_grad


def test_layers_below_the_lowest_adapter_need_no_backward_pass():
    targets = [f"layers.2.{name}" for name in ("self_attn.q_proj", "mlp.down_proj")]
    peft, batch = adapted(MODELS["llama"], targets=targets), Batch()
    weights = trained_weights(peft)
    expected = batch.theirs(peft)

    found = batch.ours(peft, trained=weights)

    for ours, theirs in zip(gradients(weights, found), gradients(weights, expected), strict=True):
        assert_near(ours, theirs)


def test_without_an_adapter_it_is_the_base():
    peft, batch = adapted(MODELS["llama"]), Batch()
    with peft.disable_adapter():
        expected = batch.theirs(peft)

    found = batch.ours(peft, adapter=None)

    assert_near(found, expected)
    assert not found.requires_grad


def test_a_shared_beginning_and_filler_change_no_bit_and_no_gradient():
    peft, batch = adapted(MODELS["llama"]), Batch()
    weights = trained_weights(peft)
    plain = batch.ours(peft, prefix=0, trained=weights)

    for settings in ({}, {"pad_to": 500}, {"prefix": 0, "pad_to": 333}):
        found = batch.ours(peft, trained=weights, **settings)

        assert torch.equal(found, plain), settings
        for ours, theirs in zip(gradients(weights, found), gradients(weights, plain), strict=True):
            assert_near(ours, theirs)
    assert common_prefix(batch.tokens, batch.attention_mask, batch.read) == 16


def test_a_rows_bits_do_not_depend_on_its_neighbours():
    peft, batch = adapted(MODELS["llama"]), Batch()
    together = batch.ours(peft).detach()
    firsts = [0, *batch.read.sum(dim=1).cumsum(dim=0).tolist()]

    for row in range(5):
        alone = Batch()
        alone.read[torch.arange(6) != row] = False
        assert torch.equal(alone.ours(peft).detach(), together[firsts[row] : firsts[row + 1]])


def test_garbage_in_the_padding_changes_nothing():
    peft, batch = adapted(MODELS["llama"]), Batch()
    expected = batch.ours(peft).detach()

    batch.tokens[~batch.attention_mask] = 5

    assert torch.equal(batch.ours(peft).detach(), expected)


def test_the_weights_are_held_once():
    peft = adapted(MODELS["llama"])
    before = {name: p.clone() for name, p in peft.named_parameters()}
    base = peft.get_base_model()

    first, second = Decoder(base), Decoder(base)

    for name, parameter in peft.named_parameters():
        assert torch.equal(parameter, before[name]), name
    layer = base.base_model.layers[0]
    joined = first.layers[0].qkv.weight
    for projection in ("q_proj", "k_proj", "v_proj"):
        weight = getattr(layer.self_attn, projection).base_layer.weight
        assert weight.untyped_storage().data_ptr() == joined.untyped_storage().data_ptr()
    assert second.layers[0].qkv.weight.data_ptr() == joined.data_ptr()
    assert second.layers[0].qkv.weight.shape == (128, 64)


@pytest.mark.parametrize(
    ("settings", "build"),
    [
        ({"hidden_act": "gelu"}, llama),
        ({"sliding_window": 16}, lambda **s: MistralForCausalLM(MistralConfig(**SIZES | s))),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, llama),
    ],
)
def test_models_that_compute_something_else_are_not_taken(settings, build):
    assert not Decoder.supports(build(**settings))
    assert Decoder.supports(llama())


def test_an_adapter_that_it_would_leave_out_is_not_taken():
    targets = ["q_proj", "embed_tokens"]
    assert not Decoder.supports(adapted(MODELS["llama"], targets=targets).get_base_model())
