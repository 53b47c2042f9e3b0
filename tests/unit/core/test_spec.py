import copy
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import Fault, InvalidSpec
from core.hyperparameters import PpoHyperparameters
from core.spec import (
    JobSpec,
    Resolved,
    notices,
    parse_spec,
    resolve,
)
from tests.factories import spec_dict

PPO = "/method/ppo/hyperparameters"
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


def faults_of(body: object) -> list[Fault]:
    with pytest.raises(InvalidSpec) as caught:
        parse_spec(body)
    return list(caught.value.faults)


def only_fault(body: object) -> Fault:
    (fault,) = faults_of(body)
    return fault


def changed(change: Callable[[dict[str, Any]], object], **hyperparameters: Any) -> dict[str, Any]:
    body = spec_dict(**hyperparameters)
    change(body)
    return body


def with_reward(**reward: Any) -> dict[str, Any]:
    return changed(lambda body: body["method"]["ppo"].update(reward=reward))


# Defaults and bounds, written down from the design.

DEFAULTS: dict[str, Any] = {
    "clip_range": 0.2,
    "clip_range_high": 0.2,
    "dual_clip": None,
    "value_clip_range": 0.2,
    "kl_coef": 0.05,
    "kl_estimator": "k1",
    "kl_placement": "reward",
    "kl_controller": "fixed",
    "target_kl_per_sequence": 6,
    "kl_horizon": 10000,
    "target_kl": 0.02,
    "advantage_estimator": "gae",
    "group_size": 1,
    "gamma": 1,
    "lambda": 0.95,
    "lambda_value": None,
    "standardize_advantages": True,
    "reward_scaling": "running_std",
    "missing_stop_penalty": 0,
    "overlong_buffer": None,
    "mask_truncated": False,
    "bootstrap_truncated": False,
    "importance_weight_cap": None,
    "critic": "shared_head",
    "value_coef": 0.1,
    "entropy_coef": 0,
    "critic_warmup_steps": 1,
    "batch_size": 32,
    "epochs": 2,
    "minibatches": 4,
    "n_epochs": 1,
    "max_steps": 3,
    "micro_batch_size": "auto",
    "loss_aggregation": "token_mean",
    "learning_rate": 3e-5,
    "value_learning_rate": 3e-4,
    "lr_schedule": "constant",
    "warmup_fraction": 0.05,
    "weight_decay": 0,
    "max_grad_norm": 1,
    "max_prompt_tokens": 512,
    "max_response_tokens": 128,
    "temperature": 1,
    "lora": {"rank": 16, "alpha": 32, "target_modules": "auto", "layers": "all"},
    "precision": "auto",
    "seed": 5,
    "checkpoint_interval": 10,
    "eval_interval": 10,
    "eval_samples": 32,
    "stored_samples": 8,
    "guards": {"preset": "standard", "rules": []},
}

# name: (just inside low, just outside low, just inside high, just outside high)
TINY = 1e-9
BOUNDS: dict[str, tuple[Any, Any, Any, Any]] = {
    "clip_range": (TINY, 0, 1 - TINY, 1),
    "clip_range_high": (TINY, 0, 10, 10 + TINY),
    "dual_clip": (1.2 + TINY, 1, 100, 100 + TINY),
    "value_clip_range": (TINY, 0, 100, 100 + TINY),
    "kl_coef": (0, -TINY, 10, 10 + TINY),
    "target_kl_per_sequence": (TINY, 0, 1000, 1000 + TINY),
    "kl_horizon": (1, 0, 10**9, None),
    "target_kl": (TINY, 0, 10, 10 + TINY),
    "gamma": (TINY, 0, 1, 1 + TINY),
    "group_size": (1, 0, 64, 65),
    "lambda": (0, -TINY, 1, 1 + TINY),
    "lambda_value": (0, -TINY, 1, 1 + TINY),
    "importance_weight_cap": (TINY, 0, 100, 100 + TINY),
    "missing_stop_penalty": (0, -TINY, 100, 100 + TINY),
    "value_coef": (0, -TINY, 10, 10 + TINY),
    "entropy_coef": (0, -TINY, 1, 1 + TINY),
    "critic_warmup_steps": (0, -1, 1000, 1001),
    "batch_size": (4, 0, 4096, 4097),
    "epochs": (1, 0, 20, 21),
    "minibatches": (1, 0, 32, 65),
    "n_epochs": (1, 0, 100, 101),
    "max_steps": (1, 0, 10**6, 10**6 + 1),
    "micro_batch_size": (1, 0, 10**6, None),
    "learning_rate": (TINY, 0, 0.1, 0.1 + TINY),
    "value_learning_rate": (TINY, 0, 0.1, 0.1 + TINY),
    "warmup_fraction": (0, -TINY, 1, 1 + TINY),
    "weight_decay": (0, -TINY, 1, 1 + TINY),
    "max_grad_norm": (TINY, 0, 1000, 1000 + TINY),
    "max_prompt_tokens": (1, 0, 32768, 32769),
    "max_response_tokens": (1, 0, 16384, 16385),
    "temperature": (TINY, 0, 2, 2 + TINY),
    "seed": (0, -1, 2**31 - 1, 2**31),
    "checkpoint_interval": (1, 0, 10**6, None),
    "eval_interval": (1, 0, 10**6, None),
    "eval_samples": (1, 0, 10**6, None),
    "stored_samples": (0, -1, 256, 257),
}
CHOICES = {
    "kl_estimator": ["k1", "k2", "k3", "exact"],
    "kl_placement": ["reward", "loss"],
    "advantage_estimator": ["gae", "rloo", "grpo"],
    "critic": ["shared_head", "detached_head", "adapter"],
    "kl_controller": ["fixed", "adaptive"],
    "reward_scaling": ["none", "running_std"],
    "loss_aggregation": [
        "token_mean",
        "sequence_mean_token_mean",
        "sequence_mean_token_sum",
        "sequence_mean_token_sum_norm",
    ],
    "lr_schedule": ["constant", "linear", "cosine"],
    "precision": ["fp32", "bf16"],
}
NULLABLE = {
    *("clip_range_high", "dual_clip", "value_clip_range", "target_kl", "max_steps", "seed"),
    *("lambda_value", "overlong_buffer", "importance_weight_cap"),
}
FIELDS = {field.alias or name for name, field in PpoHyperparameters.model_fields.items()}


def test_every_hyperparameter_is_listed_here() -> None:
    assert set(DEFAULTS) == FIELDS
    others = {"standardize_advantages", "lora", "mask_truncated", "bootstrap_truncated"}
    assert set(BOUNDS) | set(CHOICES) | others | {"overlong_buffer", "guards"} == FIELDS


@pytest.mark.parametrize("body", [spec_dict(), spec_dict(**dict.fromkeys(DEFAULTS, "auto"))])
def test_nothing_and_auto_both_mean_the_defaults(body: dict[str, Any]) -> None:
    resolved = resolve(parse_spec(body), prompts=96, seed=5)

    assert resolved.hyperparameters == DEFAULTS
    assert (resolved.total_steps, resolved.seed) == (3, 5)
    assert resolved.reward == {
        "type": "sentiment",
        "target": "positive",
        "input": "{{sample.output_text}}",
    }


@pytest.mark.parametrize("name", BOUNDS)
def test_just_inside_the_bounds_is_taken(name: str) -> None:
    low, _, high, _ = BOUNDS[name]

    for value in (low, high):
        spec = parse_spec(spec_dict(**{name: value}))
        assert resolve(spec, prompts=10**9).hyperparameters[name] == (
            min(value, 8) if name == "micro_batch_size" else value
        )


@pytest.mark.parametrize("name", BOUNDS)
def test_just_outside_the_bounds_is_refused(name: str) -> None:
    _, low, _, high = BOUNDS[name]

    for value, word in ((low, "below_min"), (high, "above_max")):
        if value is None:
            continue
        fault = only_fault(spec_dict(**{name: value}))
        number = "integer" if isinstance(value, int) else "decimal"
        assert (fault.pointer, fault.code) == (f"{PPO}/{name}", f"{number}_{word}_value")
        assert name in fault.detail
        assert str(value) in fault.detail


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_takes_what_is_listed_and_lists_it_otherwise(name: str) -> None:
    for option in CHOICES[name]:
        parse_spec(spec_dict(**{name: option}))

    fault = only_fault(spec_dict(**{name: "else"}))

    assert fault.code == "invalid_value"
    assert all(option in fault.detail for option in CHOICES[name])


@pytest.mark.parametrize("name", sorted(FIELDS - {"lora", "guards", "overlong_buffer"}))
@pytest.mark.parametrize("value", [[], {}, "text", math.nan, math.inf])
def test_a_wrong_type_is_refused_at_its_place(name: str, value: object) -> None:
    fault = only_fault(spec_dict(**{name: value}))

    assert fault.pointer == f"{PPO}/{name}"
    assert fault.code in {"invalid_type", "invalid_value"}


@pytest.mark.parametrize("value", [True, "4", 4.5])
def test_numbers_are_taken_literally(value: object) -> None:
    assert only_fault(spec_dict(epochs=value)).code == "invalid_type"


@pytest.mark.parametrize("name", sorted(NULLABLE - {"seed", "clip_range_high", "max_steps"}))
def test_null_switches_off_where_it_may(name: str) -> None:
    resolved = resolve(parse_spec(spec_dict(**{name: None})), prompts=8)

    assert resolved.hyperparameters[name] is None


@pytest.mark.parametrize("name", sorted(FIELDS - NULLABLE))
def test_null_is_absent_elsewhere(name: str) -> None:
    resolved = resolve(parse_spec(spec_dict(**{name: None})), prompts=96, seed=5)

    assert resolved.hyperparameters[name] == DEFAULTS[name]


def test_lora_has_bounds_of_its_own() -> None:
    for good in (
        {"rank": 1},
        {"rank": 256},
        {"alpha": 1024},
        {"target_modules": ["q_proj"]},
        {"layers": "all"},
        {"layers": {"last": 1}},
    ):
        parse_spec(spec_dict(lora=good))
    for bad, code in (
        ({"rank": 0}, "integer_below_min_value"),
        ({"rank": 257}, "integer_above_max_value"),
        ({"alpha": 0}, "integer_below_min_value"),
        ({"alpha": 1024.5}, "decimal_above_max_value"),
        ({"depth": None}, "unknown_parameter"),
    ):
        fault = faults_of(spec_dict(lora=bad))[0]
        assert (fault.pointer, fault.code) == (f"{PPO}/lora/{next(iter(bad))}", code)
    for modules in ("all", [], [1], 3):
        assert faults_of(spec_dict(lora={"target_modules": modules}))
    for layers, place, code in (
        ("top", "", "invalid_value"),
        (4, "", "invalid_type"),
        ({"last": 0}, "/last", "integer_below_min_value"),
        ({"last": 1025}, "/last", "integer_above_max_value"),
        ({"last": "2"}, "/last", "invalid_type"),
        ({}, "/last", "missing_required_parameter"),
        ({"last": 2, "first": 2}, "/first", "unknown_parameter"),
    ):
        (fault,) = faults_of(spec_dict(lora={"layers": layers}))
        assert (fault.pointer, fault.code) == (f"{PPO}/lora/layers{place}", code)


# Length of the run.


@pytest.mark.parametrize(
    ("given", "prompts", "steps"),
    [
        ({}, 64, 2),
        ({}, 65, 3),
        ({}, 1, 1),
        ({"n_epochs": 2}, 48, 3),
        ({"max_steps": 50}, 64, 50),
        ({"max_steps": 1}, 64, 1),
        ({"max_steps": 50, "n_epochs": 3}, 64, 6),
        ({"max_steps": 5, "n_epochs": 3}, 64, 5),
        ({"max_steps": 50, "n_epochs": "auto"}, 64, 50),
        ({"max_steps": None, "n_epochs": 2}, 64, 4),
    ],
)
def test_the_number_of_steps(given: dict[str, Any], prompts: int, steps: int) -> None:
    resolved = resolve(parse_spec(spec_dict(**given)), prompts=prompts)

    assert resolved.total_steps == resolved.hyperparameters["max_steps"] == steps


@pytest.mark.parametrize(("batch", "minibatches", "rows"), [(32, 4, 8), (16, 4, 4), (64, 2, 8)])
def test_a_micro_batch_fits_the_pass(batch: int, minibatches: int, rows: int) -> None:
    spec = parse_spec(spec_dict(batch_size=batch, minibatches=minibatches, micro_batch_size=8))

    assert resolve(spec, prompts=8).hyperparameters["micro_batch_size"] == rows


def test_one_seed_counts_wherever_it_stands() -> None:
    top = changed(lambda body: body.update(seed=3))
    both = changed(lambda body: body.update(seed=3), seed=3)

    assert resolve(parse_spec(top), prompts=8, seed=9).seed == 3
    assert resolve(parse_spec(spec_dict(seed=4)), prompts=8, seed=9).seed == 4
    assert resolve(parse_spec(both), prompts=8).hyperparameters["seed"] == 3
    drawn = {resolve(parse_spec(spec_dict()), prompts=8).seed for _ in range(20)}
    assert len(drawn) > 10


def test_settings_survive_being_stored() -> None:
    resolved = resolve(parse_spec(spec_dict(lora={"target_modules": ["a"]})), prompts=8)

    assert Resolved.from_dict(json.loads(json.dumps(resolved.to_dict()))) == resolved


def test_what_was_said_is_stored_and_nothing_else() -> None:
    body = changed(
        lambda body: body.update(metadata={"a": "b"}, suffix=None, validation_file=None),
        clip_range=0.1,
        target_kl=None,
        gamma="auto",
        **{"lambda": 0.9},
    )

    stored = parse_spec(body).stored()

    assert stored["metadata"] == {"a": "b"}
    assert "suffix" not in stored or stored["suffix"] is None
    assert stored["method"]["ppo"]["hyperparameters"] == {
        "clip_range": 0.1,
        "target_kl": None,
        "lambda": 0.9,
    }
    assert parse_spec(json.loads(json.dumps(stored))).stored() == stored


# Combinations: one fault for each side.


def pairs(faults: list[Fault]) -> set[tuple[str, str]]:
    return {(fault.pointer.removeprefix(PPO), fault.code) for fault in faults}


def test_minibatches_must_divide_the_batch() -> None:
    faults = faults_of(spec_dict(batch_size=32, minibatches=5))

    assert pairs(faults) == {
        ("/minibatches", "invalid_combination"),
        ("/batch_size", "invalid_combination"),
    }
    assert "4 would" in faults[0].detail


@pytest.mark.parametrize(
    ("given", "side"),
    [
        ({"dual_clip": 1.2}, "/clip_range"),
        ({"dual_clip": 1.28, "clip_range_high": 0.28}, "/clip_range_high"),
        ({"dual_clip": 3, "clip_range_high": 2.5}, "/clip_range_high"),
    ],
)
def test_a_dual_clip_lies_beyond_the_range(given: dict[str, Any], side: str) -> None:
    assert pairs(faults_of(spec_dict(**given))) == {
        ("/dual_clip", "invalid_combination"),
        (side, "invalid_combination"),
    }
    parse_spec(spec_dict(dual_clip=3, clip_range_high=0.28))


def test_two_seeds_contradict_each_other() -> None:
    body = changed(lambda body: body.update(seed=1), seed=2)

    assert [(fault.pointer, fault.code) for fault in faults_of(body)] == [
        ("/seed", "conflicting_parameters"),
        (f"{PPO}/seed", "conflicting_parameters"),
    ]


@pytest.mark.parametrize(
    ("given", "sides"),
    [
        ({"kl_horizon": 31, "batch_size": 32}, ("/kl_horizon", "/batch_size")),
        ({"kl_coef": 0}, ("/kl_controller", "/kl_coef")),
    ],
)
def test_an_adaptive_coefficient_must_be_able_to_adapt(
    given: dict[str, Any], sides: tuple[str, str]
) -> None:
    faults = faults_of(spec_dict(kl_controller="adaptive", **given))

    assert pairs(faults) == {(side, "invalid_combination") for side in sides}
    assert parse_spec(spec_dict(kl_controller="fixed", **given))


def test_prompt_and_response_must_fit_the_context() -> None:
    spec = parse_spec(spec_dict(max_prompt_tokens=1000, max_response_tokens=25))

    assert resolve(spec, prompts=8, context_length=1025)
    with pytest.raises(InvalidSpec) as caught:
        resolve(spec, prompts=8, context_length=1024)

    assert pairs(list(caught.value.faults)) == {
        ("/max_prompt_tokens", "invalid_combination"),
        ("/max_response_tokens", "invalid_combination"),
    }


# Other parts of the request.


@pytest.mark.parametrize(
    ("change", "pointer", "code"),
    [
        (lambda body: body.pop("model"), "/model", "missing_required_parameter"),
        (lambda body: body.update(model=None), "/model", "missing_required_parameter"),
        (lambda body: body.update(model=3), "/model", "invalid_type"),
        (lambda body: body.update(model=""), "/model", "invalid_value"),
        (lambda body: body.update(model="x" * 257), "/model", "string_above_max_length"),
        (lambda body: body.pop("training_file"), "/training_file", "missing_required_parameter"),
        (lambda body: body.pop("method"), "/method", "missing_required_parameter"),
        (lambda body: body.update(method="ppo"), "/method", "invalid_type"),
        (lambda body: body["method"].pop("type"), "/method/type", "missing_required_parameter"),
        (lambda body: body["method"].pop("ppo"), "/method/ppo", "missing_required_parameter"),
        (lambda body: body["method"].update(type="sft"), "/method/type", "invalid_value"),
        (lambda body: body["method"].update(type="dpo"), "/method/type", "method_not_supported"),
        (
            lambda body: body["method"].update(type="supervised"),
            "/method/type",
            "method_not_supported",
        ),
        (
            lambda body: body["method"]["ppo"].pop("reward"),
            "/method/ppo/reward",
            "missing_required_parameter",
        ),
        (lambda body: body.update(suffix="a b"), "/suffix", "invalid_value"),
        (lambda body: body.update(suffix="a\n"), "/suffix", "invalid_value"),
        (lambda body: body.update(suffix="x" * 65), "/suffix", "string_above_max_length"),
        (lambda body: body.update(seed=-1), "/seed", "integer_below_min_value"),
        (lambda body: body.update(seed=2**31), "/seed", "integer_above_max_value"),
        (lambda body: body.update(seed="auto"), "/seed", "invalid_type"),
        (lambda body: body.update(priority=101), "/priority", "integer_above_max_value"),
        (lambda body: body.update(metadata=[]), "/metadata", "invalid_type"),
        (lambda body: body.update(metadata={"a": 1}), "/metadata/a", "invalid_type"),
        (
            lambda body: body.update(metadata={"a": "x" * 513}),
            "/metadata/a",
            "string_above_max_length",
        ),
        (
            lambda body: body.update(metadata={"k" * 65: "x"}),
            f"/metadata/{'k' * 65}",
            "string_above_max_length",
        ),
        (
            lambda body: body.update(metadata={str(n): "" for n in range(17)}),
            "/metadata",
            "array_above_max_length",
        ),
        (lambda body: body.update(metadata={"a/b~": 1}), "/metadata/a~1b~0", "invalid_type"),
        (
            lambda body: body.update(integrations=[{"type": "wandb"}]),
            "/integrations",
            "array_above_max_length",
        ),
        (
            lambda body: body.update(hyperparameters={"n_epochs": 3}),
            "/hyperparameters/n_epochs",
            "invalid_value",
        ),
        (lambda body: body.update(status="running"), "/status", "unknown_parameter"),
        (lambda body: body.update(attempt=1), "/attempt", "unknown_parameter"),
        (lambda body: body.update(tenant_id="x"), "/tenant_id", "unknown_parameter"),
        (lambda body: body.update(suffix="a\x00b"), "/suffix", "invalid_value"),
        (lambda body: body.update(suffix="\ud800"), "/suffix", "invalid_value"),
    ],
)
def test_a_fault_has_its_place_and_code(
    change: Callable[[dict[str, Any]], object], pointer: str, code: str
) -> None:
    fault = only_fault(changed(change))

    assert (fault.pointer, fault.code) == (pointer, code)
    assert fault.detail
    fault.detail.encode()


@pytest.mark.parametrize("body", [None, [], "x", 3, True])
def test_a_body_that_is_no_object_is_refused(body: object) -> None:
    fault = only_fault(body)

    assert (fault.pointer, fault.param, fault.code) == ("", None, "invalid_type")


def test_all_faults_come_at_once() -> None:
    body = changed(lambda body: body.update(stats=1, model=3), clip_range=1.5, epochs="x")

    assert {fault.code for fault in faults_of(body)} == {
        "unknown_parameter",
        "invalid_type",
        "decimal_above_max_value",
    }
    assert len(faults_of(body)) == 4


@pytest.mark.parametrize(
    ("written", "meant"),
    [("clip_rnge", "clip_range"), ("lam", "lambda"), ("batchsize", "batch_size")],
)
def test_the_nearest_name_is_offered(written: str, meant: str) -> None:
    fault = only_fault(spec_dict(**{written: 1}))

    assert fault.code == "unknown_parameter"
    assert f"did you mean {meant!r}" in fault.detail


def test_a_name_near_nothing_is_just_unknown() -> None:
    assert only_fault(spec_dict(zzz=1)).detail == "unknown parameter 'zzz'"


def test_a_name_that_stands_in_the_wrong_place_is_sent_home() -> None:
    beside = changed(lambda body: body["method"]["ppo"].update(lora={"rank": 4}))

    assert only_fault(beside).detail == (
        "unknown parameter 'lora'; it belongs in method.ppo.hyperparameters"
    )
    assert only_fault(spec_dict(model="m")).detail == (
        "unknown parameter 'model'; it belongs in the body itself"
    )


def test_the_usual_value_is_told() -> None:
    fault = only_fault(spec_dict(clip_range=1.5))

    assert fault.detail == "clip_range must be below 1, got 1.5; usual is 0.1 to 0.3"


@pytest.mark.parametrize("name", ["top_p", "top_k"])
def test_sampling_that_would_bend_the_distribution_is_refused(name: str) -> None:
    fault = only_fault(spec_dict(**{name: 0.9}))

    assert (fault.pointer, fault.code) == (f"{PPO}/{name}", "unsupported_parameter")


def test_openai_fields_that_mean_nothing_here_are_taken() -> None:
    parse_spec(
        changed(
            lambda body: body.update(
                integrations=[], hyperparameters={"n_epochs": "auto"}, validation_file=None
            )
        )
    )
    parse_spec(changed(lambda body: body.update(integrations=None, hyperparameters=None)))


# Rewards.


@pytest.mark.parametrize(
    "reward",
    [
        {"type": "sentiment"},
        {"type": "sentiment", "target": "negative", "name": "mood"},
        {"type": "length", "min": 3},
        {"type": "length", "max": 9, "unit": "chars"},
        {"type": "length", "min": 3, "max": 3},
        {"type": "length", "target": 20, "tolerance": 5, "unit": "sentences"},
        {"type": "regex", "pattern": "a+", "mode": "count", "max_count": 2},
        {"type": "regex", "pattern": "x", "input": "{{item.a}} {{sample.output_text}}"},
    ],
)
def test_a_reward_on_offer_is_taken(reward: dict[str, Any]) -> None:
    assert parse_spec(with_reward(**reward)).reward.items() >= reward.items()


@pytest.mark.parametrize(
    ("reward", "pointer", "code"),
    [
        ({}, "/type", "missing_required_parameter"),
        ({"type": "multi"}, "/type", "invalid_value"),
        ({"type": 3}, "/type", "invalid_value"),
        ({"type": "python", "source": "import os"}, "/type", "grader_not_supported"),
        ({"type": "sentiment", "target": "odd"}, "/target", "invalid_value"),
        ({"type": "sentiment", "name": ""}, "/name", "invalid_value"),
        ({"type": "sentiment", "patern": ""}, "/patern", "unknown_parameter"),
        ({"type": "length"}, "", "invalid_combination"),
        ({"type": "length", "min": 1, "target": 2}, "", "invalid_combination"),
        ({"type": "length", "min": 3, "max": 2}, "", "invalid_combination"),
        ({"type": "length", "min": 3, "tolerance": 2}, "", "invalid_combination"),
        ({"type": "length", "min": -1}, "/min", "integer_below_min_value"),
        ({"type": "length", "min": 1, "unit": "tokens"}, "/unit", "invalid_value"),
        ({"type": "regex"}, "/pattern", "missing_required_parameter"),
        ({"type": "regex", "pattern": "x" * 1001}, "/pattern", "string_above_max_length"),
        ({"type": "regex", "pattern": "x", "mode": "sub"}, "/mode", "invalid_value"),
    ],
)
def test_a_reward_fault_has_its_place_and_code(
    reward: dict[str, Any], pointer: str, code: str
) -> None:
    fault = only_fault(with_reward(**reward))

    assert (fault.pointer, fault.code) == (f"/method/ppo/reward{pointer}", code)


def test_an_unknown_reward_is_answered_with_those_on_offer() -> None:
    assert "sentiment, length, regex" in only_fault(with_reward(type="helpful")).detail


# What is accepted with a word.


@pytest.mark.parametrize(
    ("body", "codes"),
    [
        (spec_dict(), []),
        (spec_dict(lora={"rank": 17}), ["rank_above_serving_default"]),
        (spec_dict(epochs=1, minibatches=1), ["clip_inactive"]),
        (with_reward(type="sentiment", input="{{item.x}}"), ["reward_ignores_sample"]),
        (
            changed(lambda body: body["method"].update(dpo={"anything": [1]})),
            ["method_branch_ignored"],
        ),
    ],
)
def test_what_is_unusual_is_noticed(body: dict[str, Any], codes: list[str]) -> None:
    assert [notice.code for notice in notices(parse_spec(body))] == codes


# Any input at all.


def places(body: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(body, dict):
        for name, value in body.items():
            yield from places(value, (*path, name))


def put(body: dict[str, Any], path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    target = body
    for name in path[:-1]:
        target = target[name]
    target[path[-1]] = value
    return body


FULL = spec_dict(**{**DEFAULTS, "dual_clip": 3, "max_steps": 3})


@given(st.sampled_from(list(places(FULL))), JSON)
def test_any_value_anywhere_is_taken_or_refused_in_order(path: tuple[Any, ...], value: Any) -> None:
    body = put(copy.deepcopy(FULL), path, value)

    try:
        spec, faults = parse_spec(body), ()
    except InvalidSpec as error:
        spec, faults = None, error.faults

    assert all(fault.detail.encode() for fault in faults)
    assert all(not fault.pointer or fault.pointer.encode()[0] == ord("/") for fault in faults)
    if spec is None:
        assert faults
    else:
        json.dumps([resolve(spec, prompts=8).to_dict(), spec.stored()], allow_nan=False)


def test_endless_nesting_is_refused() -> None:
    deep: Any = []
    for _ in range(900):
        deep = [deep]

    assert only_fault(changed(lambda body: body["method"].update(dpo=deep))).code == "invalid_value"


def test_the_schema_says_auto_and_describes_every_field() -> None:
    schema = JobSpec.model_json_schema()
    ppo = schema["$defs"]["PpoHyperparameters"]["properties"]

    assert set(ppo) == FIELDS
    for field in ppo.values():
        assert {"const": "auto", "type": "string"} in field["anyOf"]
        assert field["description"]
    assert ppo["clip_range"]["anyOf"][0] == {
        "type": "number",
        "exclusiveMinimum": 0,
        "exclusiveMaximum": 1,
    }
    assert ppo["clip_range"]["default"] == 0.2


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        ("gae", (1, 0.05, True, "running_std")),
        ("rloo", (4, 0.05, False, "none")),
        ("grpo", (8, 0.0, False, "none")),
    ],
)
def test_defaults_follow_the_estimator(estimator: str, expected: tuple[Any, ...]) -> None:
    values = resolve(parse_spec(spec_dict(advantage_estimator=estimator)), prompts=8)

    names = ("group_size", "kl_coef", "standardize_advantages", "reward_scaling")
    assert tuple(values.hyperparameters[name] for name in names) == expected


def test_what_is_given_wins_over_the_estimators_defaults() -> None:
    given = {"group_size": 2, "kl_coef": 0.3, "standardize_advantages": True}

    values = resolve(parse_spec(spec_dict(advantage_estimator="grpo", **given)), prompts=8)

    assert {name: values.hyperparameters[name] for name in given} == given


def test_a_penalty_in_the_loss_is_k2_unless_said_otherwise() -> None:
    in_loss = resolve(parse_spec(spec_dict(kl_placement="loss")), prompts=8)
    said = resolve(parse_spec(spec_dict(kl_placement="loss", kl_estimator="k3")), prompts=8)

    assert in_loss.hyperparameters["kl_estimator"] == "k2"
    assert said.hyperparameters["kl_estimator"] == "k3"


@pytest.mark.parametrize(
    ("hyperparameters", "names"),
    [
        ({"advantage_estimator": "rloo", "group_size": 1}, ["group_size", "advantage_estimator"]),
        (
            {"advantage_estimator": "grpo", "bootstrap_truncated": True},
            ["bootstrap_truncated", "advantage_estimator"],
        ),
        ({"kl_placement": "loss", "kl_estimator": "k1"}, ["kl_estimator", "kl_placement"]),
        ({"kl_placement": "loss", "kl_estimator": "exact"}, ["kl_estimator", "kl_placement"]),
        ({"batch_size": 3, "group_size": 3, "minibatches": 2}, ["minibatches", "batch_size"]),
        (
            {"max_response_tokens": 8, "overlong_buffer": {"tokens": 9, "penalty": 1}},
            ["overlong_buffer/tokens", "max_response_tokens"],
        ),
        (
            {
                "guards": {
                    "rules": [
                        {"signal": "entropy", "warn": 1.0, "critical": 1.0, "action": "pause"}
                    ]
                }
            },
            ["guards/rules/0/warn", "guards/rules/0/critical"],
        ),
        (
            {"kl_controller": "adaptive", "advantage_estimator": "grpo"},
            ["kl_controller", "kl_coef"],
        ),
    ],
)
def test_settings_that_exclude_each_other_are_named(
    hyperparameters: dict[str, Any], names: list[str]
) -> None:
    faults = faults_of(spec_dict(**hyperparameters))

    assert [fault.pointer for fault in faults] == [f"{PPO}/{name}" for name in names]
    assert {fault.code for fault in faults} == {"invalid_combination"}


def test_passes_may_share_the_responses_of_groups() -> None:
    values = resolve(
        parse_spec(spec_dict(batch_size=3, group_size=4, minibatches=6, micro_batch_size=9)),
        prompts=8,
    )

    assert values.hyperparameters["micro_batch_size"] == 2


def test_lambda_takes_a_number_or_a_word() -> None:
    parse_spec(spec_dict(**{"lambda": "length_adaptive"}))

    fault = only_fault(spec_dict(**{"lambda": "adaptive"}))

    assert (fault.pointer, fault.code) == (f"{PPO}/lambda", "invalid_value")
    assert "length_adaptive" in fault.detail


@pytest.mark.parametrize(
    ("guards", "place"),
    [
        ({"preset": "hard"}, "preset"),
        ({"rules": [{}]}, "rules/0/signal"),
        (
            {"rules": [{"signal": "entropy", "warn": 0.0, "critical": 1.0, "action": "shout"}]},
            "rules/0/action",
        ),
        ({"rule": []}, "rule"),
    ],
)
def test_faults_of_guards_are_found_where_they_stand(guards: dict[str, Any], place: str) -> None:
    assert faults_of(spec_dict(guards=guards))[0].pointer == f"{PPO}/guards/{place}"


def test_settings_that_only_a_critic_reads_are_named_without_one() -> None:
    body = spec_dict(advantage_estimator="rloo", value_coef=0.5, **{"lambda": 0.9})

    (notice,) = [one for one in notices(parse_spec(body)) if one.code == "setting_ignored"]

    assert "lambda, value_coef" in notice.message
