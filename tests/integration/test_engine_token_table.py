"""Which pass a stored token tells of, where a step has several epochs or ends early."""

import dataclasses

import pytest
import torch

from ppo_engine.config import TrainConfig
from ppo_engine.reports import StepReport
from tests.clipping_run import CONFIG, ROWS, counts_of, counts_of_passes, step_of


def test_responses_left_out_of_the_loss_have_no_tokens(tiny_model) -> None:
    report = step_of(tiny_model, dataclasses.replace(CONFIG, mask_truncated=True))

    cut = {sample["row"] for sample in report.samples if sample["finish_reason"] == "length"}
    assert cut
    assert {token["row"] for token in report.tokens} == set(range(ROWS)) - cut
    assert counts_of(report.tokens) == counts_of_passes(report.passes)
    for sample in report.samples:
        assert sample["tokens"] > 0
        assert (sample["ratio_max"] is None) == (sample["row"] in cut)


def passes_of_rows(report: StepReport, config: TrainConfig) -> dict[int, tuple[int, int]]:
    """The last pass that met each row: every epoch walks over a new order of all rows."""
    generator = torch.Generator().manual_seed(1)  # the run's seed is 0; one more shuffles
    met: dict[int, tuple[int, int]] = {}
    taken = [(each.epoch, each.minibatch) for each in report.passes]
    for epoch in range(config.epochs):
        order = torch.randperm(ROWS, generator=generator)
        for minibatch, rows in enumerate(order.split(config.minibatch_size)):
            if (epoch, minibatch) in taken:
                met |= dict.fromkeys(rows.tolist(), (epoch, minibatch))
    return met


def passes_told(report: StepReport) -> dict[int, tuple[int, int]]:
    told: dict[int, set[tuple[int, int]]] = {}
    for token in report.tokens:
        told.setdefault(token["row"], set()).add((token["epoch"], token["minibatch"]))
    assert all(len(each) == 1 for each in told.values())
    return {row: each.pop() for row, each in told.items()}


TWO_EPOCHS = dataclasses.replace(CONFIG, epochs=2, minibatches=3)


@pytest.fixture(scope="module")
def long_report(tiny_model) -> StepReport:
    """Two epochs, everything stored."""
    return step_of(tiny_model, TWO_EPOCHS)


def test_of_several_epochs_the_last_is_stored(long_report) -> None:
    assert passes_told(long_report) == passes_of_rows(long_report, TWO_EPOCHS)
    assert {epoch for epoch, _ in passes_told(long_report).values()} == {1}
    assert counts_of(long_report.tokens) == counts_of_passes(long_report.passes[3:])


@pytest.mark.parametrize("last", [1, 4])
def test_after_an_early_end_each_row_has_the_last_pass_that_met_it(
    tiny_model, long_report, last: int
) -> None:
    drifts = [each.values["update_kl_k3"] for each in long_report.passes]
    assert drifts[last] > max(drifts[:last])
    between = (drifts[last] + max(drifts[:last])) / 2
    config = dataclasses.replace(TWO_EPOCHS, target_kl=between / 1.5)

    report = step_of(tiny_model, config)

    assert len(report.passes) == last + 1
    assert passes_told(report) == passes_of_rows(report, config)
    # Ended in the first epoch: some rows were never met.  In the second: some only in the first.
    unmet = set(range(ROWS)) - {token["row"] for token in report.tokens}
    assert bool(unmet) == (last == 1)
    assert len({epoch for epoch, _ in passes_told(report).values()}) == (1 if last == 1 else 2)
    final = [t for t in report.tokens if (t["epoch"], t["minibatch"]) == (last // 3, last % 3)]
    assert counts_of(final) == report.passes[-1].counts
