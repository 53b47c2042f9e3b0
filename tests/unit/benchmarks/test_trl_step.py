"""How the comparison with TRL is laid out; the comparison itself is a benchmark."""

import dataclasses
from pathlib import Path

from benchmarks.trl_step import Pair, fixed_batch, learning_table, ratio_text, table
from benchmarks.trl_task import Order, StepAnswer, Steps, answer_in, reward, tell


def answer(*, seconds: float) -> StepAnswer:
    phases = {"sample": seconds, "score": seconds, "learn": 2 * seconds, "step": 4 * seconds}
    return StepAnswer(
        seconds=[phases],
        tokens=[64],
        rewards=[0.5, 1.0],
        kl_to_reference=[0.0, 2.0],
        reward_seconds=0.001,
        peak_memory_bytes=int(seconds * 1024 * 1024),
        trained_parameters=1000,
        critic_parameters=10,
        note="",
    )


def order() -> Order:
    steps = Steps(
        model="model",
        prompts=[[1, 2], [3]],
        rows=2,
        response_tokens=4,
        epochs=1,
        minibatches=1,
        dtype="fp32",
        trl_critic="full",
        warmup_steps=1,
        timed_steps=1,
        learning_rate=1e-4,
        value_learning_rate=1e-3,
        trl_critic_learning_rate=1e-5,
        unused_token=9,
        seed=0,
    )
    return Order(steps=steps, fixed_batch=fixed_batch("model", [[1] * 12] * 8, 9))


def test_an_order_survives_its_file(tmp_path: Path):
    order().write(tmp_path / "order.json")

    assert Order.read(tmp_path / "order.json") == order()


def test_the_answer_is_found_below_what_libraries_print(capsys):
    tell(answer(seconds=1.0))
    printed = "loading weights\n" + capsys.readouterr().out

    assert StepAnswer(**answer_in(printed)) == answer(seconds=1.0)


def test_the_ratio_is_the_median_of_the_pairs_not_the_ratio_of_medians():
    ours = (1.0, 2.0, 4.0)
    trl = (8.0, 6.0, 20.0)

    rows = table(
        [
            Pair(answer(seconds=own), answer(seconds=theirs))
            for own, theirs in zip(ours, trl, strict=True)
        ]
    )

    assert "| rollout, s | 2.00 | 8.00 | 5.00x (3.00-8.00) |" in rows


def test_every_row_of_the_table_has_as_many_cells_as_its_header():
    rows = table([Pair(answer(seconds=1.0), answer(seconds=2.0))])

    assert {row.count("|") for row in rows} == {5}


def test_one_pair_has_no_range():
    assert ratio_text([2.0]) == "2.00x"


def test_learning_is_told_by_step_and_by_seed():
    slower = dataclasses.replace(answer(seconds=1.0), rewards=[0.5, 0.8], kl_to_reference=[0.0, 1])

    rows = learning_table([Pair(answer(seconds=1.0), slower)], [7])

    assert "| 2 | 1.000 | 2.00 | 0.800 | 1.00 |" in rows
    assert "| 7 | 1.000 | 2.00 | 0.800 | 1.00 |" in rows


def test_the_reward_counts_the_letter_in_either_case():
    assert reward("Eel") == 10 * 2 / 3


def test_no_text_earns_nothing():
    assert reward("") == 0
