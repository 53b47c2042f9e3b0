"""Small faults in the engine's source, each with the tests that must notice it.

A mutant replaces one passage of one file.  The passage must stand there exactly once, so that a
mutant cannot silently become a change of nothing, or of something else.
"""

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = "ppo_engine"


class StaleMutant(Exception):
    """The passage of a mutant does not stand exactly once in its file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """One fault."""

    name: str
    file: str
    """Within the package."""
    old: str
    new: str
    killers: tuple[str, ...]
    """Tests of which at least one must fail, the likeliest first."""

    def source(self) -> str:
        """The file's text with the fault in it."""
        text = (ROOT / PACKAGE / self.file).read_text(encoding="utf-8")
        count = text.count(self.old)
        if count != 1:
            raise StaleMutant(f"{self.name}: {self.old!r} stands {count} times in {self.file}")
        return text.replace(self.old, self.new)


_UNIT = "tests/unit/ppo_engine"
# Never the mutants of `test_formulas.py`: they look for texts that a mutant here has changed.
FORMULAS = f"{_UNIT}/test_formulas.py::test_the_engine_passes"
EXTREMES = f"{_UNIT}/test_loss_gradients.py"
GROUPS = f"{_UNIT}/test_group_formulas.py"
WORLD = f"{_UNIT}/test_bandit_enumeration.py"
PASS = f"{_UNIT}/test_pass_losses.py"
KL = f"{_UNIT}/test_kl.py"
POSITIONS = f"{_UNIT}/test_positions.py"
CLASSES = f"{_UNIT}/test_clip_stats.py::test_classes_are_those_of_the_table"
BOUNDS = f"{_UNIT}/test_clip_stats.py::test_the_bounds_themselves_are_inside"
FOUR_TOKENS = f"{_UNIT}/test_clip_stats.py::test_four_tokens_by_hand"
LIKE_TRANSFORMERS = (
    f"{_UNIT}/test_decoder.py::test_states_and_gradients_are_those_of_transformers[llama]"
)
BOTH_WAYS = f"{_UNIT}/test_adapters.py::test_kept_activations_change_neither_numbers_nor_gradients"
_TRAINER = f"{_UNIT}/test_trainer.py"
FIRST_RATIO = f"{_TRAINER}::test_the_first_ratio_of_every_update_is_exactly_one[1]"
MICRO_BATCHES = f"{_TRAINER}::test_the_split_into_micro_batches_changes_nothing_but_rounding"
FILLED_UP = f"{_TRAINER}::test_rows_that_fill_a_micro_batch_up_change_nothing"
# By its own settings, and with an entropy bonus and a temperature.
_WRITTEN_OUT = f"{_UNIT}/test_reference_trainer.py::test_the_engine_agrees_with_ppo_written_out"
WRITTEN_OUT = f"{_WRITTEN_OUT}[changes0]"
WRITTEN_OUT_WARM = f"{_WRITTEN_OUT}[changes2]"

MUTANTS = (
    # The surrogate
    Mutant(
        name="the surrogate takes the larger branch",
        file="losses.py",
        old="torch.minimum(unclipped, clipped)",
        new="torch.maximum(unclipped, clipped)",
        killers=(FORMULAS,),
    ),
    Mutant(
        name="the clip range is swapped",
        file="losses.py",
        old="ratio.clamp(1 - clip_low, 1 + clip_high)",
        new="ratio.clamp(1 - clip_high, 1 + clip_low)",
        killers=(FORMULAS,),
    ),
    Mutant(
        name="only the upper bound clips",
        file="losses.py",
        old="ratio.clamp(1 - clip_low, 1 + clip_high)",
        new="ratio.clamp(max=1 + clip_high)",
        killers=(FORMULAS,),
    ),
    Mutant(
        name="the ratio is inverted",
        file="losses.py",
        old="(logprobs - old_logprobs).clamp",
        new="(old_logprobs - logprobs).clamp",
        killers=(FORMULAS,),
    ),
    Mutant(
        name="the clipped branch forgets the advantage's sign",
        file="losses.py",
        old="1 + clip_high) * advantages",
        new="1 + clip_high) * advantages.abs()",
        killers=(FORMULAS,),
    ),
    Mutant(
        name="the bound of the log-ratio is gone",
        file="losses.py",
        old="(logprobs - old_logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)",
        new="(logprobs - old_logprobs)",
        killers=(FORMULAS,),
    ),
    Mutant(
        name="the bound comes after exp",
        file="losses.py",
        old="(logprobs - old_logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)",
        new="(logprobs - old_logprobs).exp().clamp(2.06e-9, 4.85e8).log()",
        killers=(EXTREMES,),
    ),
    Mutant(
        name="the dual clip halves the gradient at a tie",
        file="losses.py",
        old="torch.where((advantages < 0) & (objective < floor), floor, objective)",
        new="torch.where(advantages < 0, torch.maximum(objective, floor), objective)",
        killers=(FORMULAS,),
    ),
    Mutant(
        name="the dual clip holds for good tokens too",
        file="losses.py",
        old="(advantages < 0) & (objective < floor)",
        new="objective < floor",
        killers=(FORMULAS,),
    ),
    Mutant(
        name="garbage outside the mask reaches the ratio",
        file="losses.py",
        old="log_ratio(zero_outside(logprobs, response_mask), ",
        new="log_ratio(logprobs, ",
        killers=(FORMULAS,),
    ),
    # The critic's loss
    Mutant(
        name="value clipping takes the smaller error",
        file="losses.py",
        old="torch.maximum(error, clipped_error) / 2",
        new="torch.minimum(error, clipped_error) / 2",
        killers=(FORMULAS,),
    ),
    Mutant(
        name="the value error is not halved",
        file="losses.py",
        old="torch.maximum(error, clipped_error) / 2",
        new="torch.maximum(error, clipped_error)",
        killers=(FORMULAS,),
    ),
    Mutant(
        name="the value window stands around the return",
        file="losses.py",
        old="old_values - clip_range, old_values + clip_range",
        new="returns - clip_range, returns + clip_range",
        killers=(FORMULAS,),
    ),
    # A sampler with numbers of its own
    Mutant(
        name="importance weights carry a gradient",
        file="losses.py",
        old="clamp(max=cap), response_mask).detach()",
        new="clamp(max=cap), response_mask)",
        killers=(GROUPS,),
    ),
    Mutant(
        name="importance weights are not capped",
        file="losses.py",
        old="torch.exp(drift).clamp(max=cap)",
        new="torch.exp(drift)",
        killers=(GROUPS,),
    ),
    Mutant(
        name="importance weights are inverted",
        file="losses.py",
        old="torch.exp(drift).clamp(max=cap)",
        new="torch.exp(-drift).clamp(max=cap)",
        killers=(GROUPS,),
    ),
    # The one reduction
    Mutant(
        name="the reduction forgets the mask",
        file="masking.py",
        old="(weight * zero_outside(per_token, response_mask)).sum()",
        new="(weight * per_token).sum()",
        killers=(FORMULAS,),
    ),
    Mutant(
        name="the mask is multiplied instead of selected",
        file="masking.py",
        old="(weight * zero_outside(per_token, response_mask)).sum()",
        new="(weight * per_token * response_mask).sum()",
        killers=(FORMULAS,),
    ),
    Mutant(
        name="zero_outside multiplies",
        file="masking.py",
        old="torch.where(mask, values, torch.zeros_like(values))",
        new="values * mask",
        killers=(FORMULAS,),
    ),
    Mutant(
        name="the token mean is a mean of means",
        file="masking.py",
        old="LossAggregation.TOKEN_MEAN: lengths.sum().expand_as(lengths)",
        new="LossAggregation.TOKEN_MEAN: rows * lengths",
        killers=(FORMULAS,),
    ),
    Mutant(
        name="empty rows count",
        file="masking.py",
        old="rows = has_tokens.sum()",
        new="rows = torch.ones_like(has_tokens).sum()",
        killers=(FORMULAS,),
    ),
    Mutant(
        name="Dr. GRPO's denominator is the padding",
        file="masking.py",
        old="(rows * max_response_tokens)",
        new="(rows * response_mask.shape[1])",
        killers=(FORMULAS,),
    ),
    Mutant(
        name="standardizing looks outside the mask",
        file="masking.py",
        old="selected = values[mask]",
        new="selected = values.flatten()",
        killers=(FORMULAS,),
    ),
    Mutant(
        name="standardizing keeps the mean",
        file="masking.py",
        old="(values - mean) * torch.rsqrt",
        new="values * torch.rsqrt",
        killers=(FORMULAS,),
    ),
    # Advantages
    Mutant(
        name="GAE without lambda",
        file="advantages.py",
        old="delta + gamma * lam * next_advantage",
        new="delta + gamma * next_advantage",
        killers=(FORMULAS,),
    ),
    Mutant(
        name="GAE without gamma in the recursion",
        file="advantages.py",
        old="delta + gamma * lam * next_advantage",
        new="delta + lam * next_advantage",
        killers=(FORMULAS,),
    ),
    Mutant(
        name="GAE without gamma in the TD error",
        file="advantages.py",
        old="rewards[:, t] + gamma * next_value",
        new="rewards[:, t] + next_value",
        killers=(FORMULAS,),
    ),
    Mutant(
        name="GAE takes the value of a skipped column",
        file="advantages.py",
        old="torch.where(response_mask[:, t], values[:, t], next_value)",
        new="values[:, t]",
        killers=(FORMULAS,),
    ),
    Mutant(
        name="GAE stops at a skipped column",
        file="advantages.py",
        old="torch.where(response_mask[:, t], advantages[:, t], next_advantage)",
        new="torch.where(response_mask[:, t], advantages[:, t], 0.0)",
        killers=(FORMULAS,),
    ),
    Mutant(
        name="rloo compares with a mean that holds the own score",
        file="advantages.py",
        old="(groups.centred * groups.sizes / (groups.sizes - 1).clamp(min=1))",
        new="groups.centred",
        killers=(GROUPS,),
    ),
    Mutant(
        name="grpo divides by the biased deviation",
        file="advantages.py",
        old="groups.sums(groups.centred.square()) / (groups.sizes - 1).clamp(min=1)",
        new="groups.sums(groups.centred.square()) / groups.sizes",
        killers=(GROUPS,),
    ),
    Mutant(
        name="equal scores leave their rounding error",
        file="advantages.py",
        old="torch.where(has_equal_scores(scores, group_ids), 0.0, wide - means)",
        new="scores - means.to(scores.dtype)",
        killers=(GROUPS,),
    ),
    Mutant(
        name="groups are runs of rows",
        file="advantages.py",
        old="index = torch.unique(group_ids, return_inverse=True)[1]\n        wide",
        new="index = torch.unique_consecutive(group_ids, return_inverse=True)[1]\n        wide",
        killers=(GROUPS,),
    ),
    Mutant(
        name="the length-adaptive lambda turns negative",
        file="advantages.py",
        old="(1 - 1 / (alpha * lengths)).clamp(min=0)",
        new="(1 - 1 / (alpha * lengths))",
        killers=(GROUPS,),
    ),
    # Rewards and the divergence
    Mutant(
        name="the KL penalty pays",
        file="rewards.py",
        old="penalty = -kl_coef * kl_per_token",
        new="penalty = kl_coef * kl_per_token",
        killers=(FORMULAS,),
    ),
    Mutant(
        name="the score stands on the first token",
        file="rewards.py",
        old="response_mask & (position == position[:, -1:])",
        new="response_mask & (position == 1)",
        killers=(FORMULAS,),
    ),
    Mutant(
        name="the overlong penalty starts at the limit",
        file="rewards.py",
        old="over = lengths - (max_response_tokens - buffer_tokens)",
        new="over = lengths - max_response_tokens",
        killers=(GROUPS,),
    ),
    Mutant(
        name="k1 has the wrong sign",
        file="kl.py",
        old="return log_ratio_to_ref\n",
        new="return -log_ratio_to_ref\n",
        killers=(KL,),
    ),
    Mutant(
        name="k3 has the wrong sign inside",
        file="kl.py",
        old="torch.expm1(-log_ratio_to_ref) + log_ratio_to_ref",
        new="torch.expm1(log_ratio_to_ref) - log_ratio_to_ref",
        killers=(KL,),
    ),
    Mutant(
        name="the k2 loss sends a gradient through the ratio",
        file="kl.py",
        old="ratio.detach() * k2(log_ratio_to_ref)",
        new="ratio * k2(log_ratio_to_ref)",
        killers=(WORLD,),
    ),
    Mutant(
        name="the k3 loss sends none",
        file="kl.py",
        old="ratio * k3(log_ratio_to_ref)",
        new="ratio.detach() * k3(log_ratio_to_ref)",
        killers=(WORLD,),
    ),
    Mutant(
        name="the KL loss forgets who sampled",
        file="kl.py",
        old="ratio = torch.exp(log_ratio)",
        new="ratio = torch.ones_like(log_ratio)",
        killers=(WORLD,),
    ),
    Mutant(
        name="the adaptive coefficient runs away from its target",
        file="kl.py",
        old="self.coef *= 1 + error * episodes / self._horizon",
        new="self.coef *= 1 - error * episodes / self._horizon",
        killers=(KL,),
    ),
    # Clip statistics
    Mutant(
        name="classes of good tokens are swapped",
        file="clip_stats.py",
        old="        _NUMBERS[TokenClass.CLIPPED_HIGH],\n",
        new="        _NUMBERS[TokenClass.UNCLIPPED_OUT_HIGH],\n",
        killers=(CLASSES,),
    ),
    Mutant(
        name="classes of bad tokens are swapped",
        file="clip_stats.py",
        old="_NUMBERS[TokenClass.CLIPPED_LOW], _NUMBERS[TokenClass.IN_RANGE_NEGATIVE]",
        new="_NUMBERS[TokenClass.IN_RANGE_NEGATIVE], _NUMBERS[TokenClass.CLIPPED_LOW]",
        killers=(CLASSES,),
    ),
    Mutant(
        name="a token at its bound counts as clipped",
        file="clip_stats.py",
        old="above, below = ratio > 1 + clip_high, ratio < 1 - clip_low",
        new="above, below = ratio >= 1 + clip_high, ratio <= 1 - clip_low",
        killers=(BOUNDS,),
    ),
    Mutant(
        name="a token at the dual clip counts as clipped",
        file="clip_stats.py",
        old="torch.where(ratio > dual_clip, ",
        new="torch.where(ratio >= dual_clip, ",
        killers=(BOUNDS,),
    ),
    Mutant(
        name="the kept gradient is that of the clipped tokens",
        file="clip_stats.py",
        old="ratio_abs_advantage_kept=_total(weight[~removed])",
        new="ratio_abs_advantage_kept=_total(weight[removed])",
        killers=(FOUR_TOKENS,),
    ),
    Mutant(
        name="the update KL has the wrong sign",
        file="clip_stats.py",
        old="torch.expm1(d) - d",
        new="torch.expm1(d) + d",
        killers=(FOUR_TOKENS,),
    ),
    Mutant(
        name="a bounded log-ratio does not skip its pass",
        file="clip_stats.py",
        old="skipped or sums.log_ratio_clamped > 0",
        new="skipped",
        killers=(EXTREMES,),
    ),
    # The pass
    Mutant(
        name="the policy goes down",
        file="update.py",
        old="policy=-weighted_sum(weighted",
        new="policy=weighted_sum(weighted",
        killers=(PASS,),
    ),
    Mutant(
        name="entropy goes down",
        file="update.py",
        old="- config.entropy_coef * self.entropy",
        new="+ config.entropy_coef * self.entropy",
        killers=(PASS,),
    ),
    Mutant(
        name="the divergence goes up",
        file="update.py",
        old="            + self.kl\n",
        new="            - self.kl\n",
        killers=(PASS,),
    ),
    Mutant(
        name="the KL loss measures the update",
        file="update.py",
        old="to_reference = current.logprobs - targets.kl_reference_logprobs",
        new="to_reference = current.logprobs - targets.old_logprobs",
        killers=(PASS,),
    ),
    Mutant(
        name="the ratio is that to the reference",
        file="update.py",
        old="drift = log_ratio(current.logprobs, targets.old_logprobs)",
        new="drift = log_ratio(current.logprobs, targets.kl_reference_logprobs)",
        killers=(PASS,),
    ),
    Mutant(
        name="importance weights are not used",
        file="update.py",
        old="weighted = targets.importance_weights * surrogate.objective",
        new="weighted = surrogate.objective",
        killers=(PASS,),
    ),
    Mutant(
        name="each micro-batch has a denominator of its own",
        file="update.py",
        old="current, targets, mask, weights[batch.rows], self._config, kl_coef=plan.kl_coef",
        new="""current, targets, mask, row_weights(
                mask,
                self._config.loss_aggregation,
                max_response_tokens=self._config.max_response_tokens,
            ), self._config, kl_coef=plan.kl_coef""",
        killers=(MICRO_BATCHES,),
    ),
    Mutant(
        name="rows that fill a micro-batch up are learned from",
        file="update.py",
        old="rollout.loss_mask[batch.rows] & batch.is_real[:, None]",
        new="rollout.loss_mask[batch.rows]",
        killers=(FILLED_UP,),
    ),
    # The rollout
    Mutant(
        name="returns come from standardized advantages",
        file="trainer.py",
        old="returns=raw.returns,",
        new="returns=advantages + old.values,",
        killers=(WRITTEN_OUT,),
    ),
    Mutant(
        name="the loss takes raw advantages",
        file="trainer.py",
        old="advantages = standardize(advantages, loss_mask)",
        new="standardize(advantages, loss_mask)",
        killers=(WRITTEN_OUT,),
    ),
    Mutant(
        name="states are taken one place late",
        file="policy.py",
        old="read[:, -response_mask.shape[1] - 1 : -1] = response_mask",
        new="read[:, -response_mask.shape[1] :] = response_mask",
        killers=(WRITTEN_OUT,),
    ),
    Mutant(
        name="tokens are taken one place early",
        file="policy.py",
        old="return tokens[:, -response_mask.shape[1] :][response_mask]",
        new="return tokens[:, -response_mask.shape[1] - 1 : -1][response_mask]",
        killers=(WRITTEN_OUT,),
    ),
    Mutant(
        name="values are those of the state before",
        file="policy.py",
        old="self.value_head(states.float())",
        new="self.value_head(states.roll(1, dims=0).float())",
        killers=(WRITTEN_OUT,),
    ),
    Mutant(
        name="padding moves positions",
        file="generation.py",
        old="(attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)",
        new="(torch.ones_like(attention_mask).long().cumsum(dim=1) - 1).clamp(min=0)",
        killers=(POSITIONS,),
    ),
    Mutant(
        name="padding is attended to",
        file="policy.py",
        old="attention_mask=self._attention(rows.attention_mask, rows",
        new="attention_mask=self._attention(torch.ones_like(rows.attention_mask), rows",
        killers=(BOTH_WAYS,),
    ),
    Mutant(
        name="the head's gradient forgets the temperature",
        file="logprobs.py",
        old="of_logprobs.div_(head.temperature), of_entropy",
        new="of_logprobs, of_entropy",
        killers=(WRITTEN_OUT_WARM,),
    ),
    Mutant(
        name="the head's gradient lowers entropy",
        file="logprobs.py",
        old="of_entropy /= head.temperature",
        new="of_entropy /= -head.temperature",
        killers=(WRITTEN_OUT_WARM,),
    ),
    Mutant(
        name="the head's gradient counts the chosen token twice",
        file="logprobs.py",
        old="chosen * (1 - p) - others",
        new="chosen - others",
        killers=(WRITTEN_OUT_WARM,),
    ),
    # Our own decoder
    Mutant(
        name="a token sees the one ahead",
        file="attention.py",
        old=".triu(diagonal=1)",
        new=".triu(diagonal=2)",
        killers=(LIKE_TRANSFORMERS,),
    ),
    Mutant(
        name="gradients are turned on instead of back",
        file="decoder.py",
        old="self._turn(of_qkv, shape, direction=-1)",
        new="self._turn(of_qkv, shape, direction=1)",
        killers=(LIKE_TRANSFORMERS,),
    ),
    Mutant(
        name="an adapter's gradient forgets its scale",
        file="linear_groups.py",
        old="torch._foreach_mul_(views[1::2], scales)",
        new="torch._foreach_mul_(views[1::2], 1.0)",
        killers=(LIKE_TRANSFORMERS,),
    ),
    Mutant(
        name="only the first row teaches the shared beginning",
        file="attention.py",
        old="by_row[:, :prefix].sum(dim=0)",
        new="by_row[:1, :prefix].sum(dim=0)",
        killers=(LIKE_TRANSFORMERS,),
    ),
    Mutant(
        name="the shared beginning may hold states that are read",
        file="packing.py",
        old="read.long().argmax(dim=1) - first).min())\n    places",
        new="read.long().argmax(dim=1) - first).max())\n    places",
        killers=(f"{_UNIT}/test_packing.py",),
    ),
)
