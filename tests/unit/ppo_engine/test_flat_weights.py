"""Many tensors trained as one, against each trained for itself."""

import pytest
import torch
from torch import nn

from ppo_engine.flat_weights import FlatWeights
from ppo_engine.snapshot import ADAM_MOMENTS, optimizer_tensors, restore_optimizer
from tests.tiny_run import tiny_config, tiny_trainer

SHAPES = {"a": (3, 5), "b": (1,), "c": (7, 2)}


def drawn(seed: int) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(s, generator=generator)) for name, s in SHAPES.items()}


def test_parameters_keep_their_numbers_and_share_the_one_tensors_memory() -> None:
    parameters, before = drawn(0), drawn(0)

    weights = FlatWeights(parameters)

    for name, parameter in parameters.items():
        assert torch.equal(parameter, before[name])
    with torch.no_grad():
        weights.together.zero_()
        parameters["b"].fill_(4)
    assert weights.together.tolist() == [0] * 15 + [4] + [0] * 14
    assert not parameters["c"].any()


def test_split_and_joined_are_each_others_inverse() -> None:
    weights = FlatWeights(drawn(0))
    numbers = torch.arange(30.0)

    views = weights.split(numbers)

    assert {name: tuple(view.shape) for name, view in views.items()} == SHAPES
    assert views["c"].tolist()[0] == [16, 17]
    assert torch.equal(weights.joined(dict(reversed(views.items()))), numbers)


def test_gradients_move_to_the_one_tensor_and_are_dropped_with_it() -> None:
    parameters = drawn(0)
    weights = FlatWeights(parameters)
    weights.gather_gradients()
    assert weights.together.grad is None
    for scale in (1.0, 2.0):
        for part in ("a", "b", "c"):
            (scale * parameters[part].sum()).backward()

        weights.gather_gradients()

        assert weights.together.grad.tolist() == [scale] * 30
        assert all(each.grad is None for each in parameters.values())
        weights.drop_gradients()
        assert weights.together.grad is None


def test_gradients_are_added_to_those_that_the_one_tensor_has() -> None:
    parameters = drawn(0)
    weights = FlatWeights(parameters)
    weights.together.sum().backward()
    weights.gather_gradients()
    assert weights.together.grad.tolist() == [1] * 30
    (2 * parameters["b"].sum() + 3 * parameters["c"].sum()).backward()

    weights.gather_gradients()

    assert weights.together.grad.tolist() == [1] * 15 + [3] + [4] * 14
    assert parameters["b"].grad is None
    assert [weights.start_of(each) for each in parameters.values()] == [0, 15, 16]


def test_where_no_gradient_arrives_it_is_zero() -> None:
    parameters = drawn(0)
    weights = FlatWeights(parameters)
    for part, reached in (("abc", 30), ("ac", 29)):
        for name in part:
            parameters[name].sum().backward()
        weights.gather_gradients()
        assert weights.together.grad.sum() == reached
        weights.drop_gradients()


def test_the_norm_of_millions_of_numbers_is_exact_enough() -> None:
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(5_000_000, generator=generator)
    weights = FlatWeights({"a": nn.Parameter(torch.zeros(5_000_000))})
    (weights.parameters["a"] * numbers).sum().backward()
    weights.gather_gradients()

    norm = nn.utils.get_total_norm(weights.gradient_parts())

    assert norm.item() == pytest.approx(numbers.double().norm().item(), rel=2e-6)


def test_adam_on_the_one_tensor_is_adam_on_each() -> None:
    together, apart = drawn(1), drawn(1)
    weights = FlatWeights(together)
    settings = {"lr": 0.1, "eps": 1e-5, "weight_decay": 0.1}
    ours = torch.optim.AdamW([weights.together], fused=True, **settings)
    theirs = torch.optim.AdamW(apart.values(), foreach=False, **settings)
    for seed in range(5):
        for trained in (together, apart):
            for parameter, gradient in zip(
                trained.values(), drawn(10 + seed).values(), strict=True
            ):
                parameter.grad = gradient.detach()
        weights.gather_gradients()
        ours.step()
        theirs.step()
        weights.drop_gradients()

    for name, parameter in together.items():
        assert torch.allclose(parameter, apart[name], rtol=1e-5, atol=1e-7)


def test_adams_state_is_told_by_parameter(tiny_model) -> None:
    trainer = tiny_trainer(tiny_model, tiny_config())
    assert optimizer_tensors(trainer) == {}
    next(trainer.steps())
    state = optimizer_tensors(trainer)
    trained = trainer.policy.adapter_parameters() | trainer.policy.value_parameters()
    wanted = {f"{name}.{key}" for name in trained for key in (*ADAM_MOMENTS, "step")}
    assert set(state) == wanted
    for name, parameter in trained.items():
        for moment in ADAM_MOMENTS:
            assert state[f"{name}.{moment}"].shape == parameter.shape
        assert state[f"{name}.exp_avg"].any()

    other = tiny_trainer(tiny_model, tiny_config())
    restore_optimizer(other, {name: each.clone() for name, each in state.items()})

    again = optimizer_tensors(other)
    assert set(again) == wanted
    assert all(torch.equal(again[name], each) for name, each in state.items())
