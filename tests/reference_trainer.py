"""PPO written out, slowly: one response at a time, no padding, no micro-batches, plain sums.

It shares no formula with the engine.  Whatever makes the engine faster must keep agreeing with it.
"""

import math
from dataclasses import dataclass

import torch

from ppo_engine.config import TrainConfig
from ppo_engine.policy import Policy


@dataclass(frozen=True, slots=True)
class Response:
    """Token ids of a prompt and its answer, with the answer's reward."""

    prompt: list[int]
    answer: list[int]
    score: float


@dataclass(slots=True)
class _Row:
    old: list[float]
    values: list[float]
    advantages: list[float]
    returns: list[float]


class ReferenceTrainer:
    """Covers the settings it asserts; the policy object only holds the weights."""

    def __init__(self, policy: Policy, config: TrainConfig) -> None:
        assert config.loss_aggregation == "token_mean"
        assert config.kl_controller == "fixed"
        assert config.lr_schedule == "constant"
        assert config.target_kl is None
        assert config.missing_stop_penalty == 0
        assert config.weight_decay == 0
        assert config.value_clip_range is not None
        self.policy = policy
        self.config = config
        self.step = 0
        self.seen_scores: list[float] = []
        self.adapter = list(policy.adapter_parameters().values())
        self.head = list(policy.value_parameters().values())
        self.moments = {id(p): (0, 0.0, 0.0) for p in [*self.adapter, *self.head]}

    def update(self, responses: list[Response], orders: list[list[list[int]]]) -> list[float]:
        """One update over minibatches `orders[epoch][minibatch]`; the policy loss of each pass."""
        self.step += 1
        self.policy.set_adapter_trainable(trainable=True)
        scaled = self._scaled([response.score for response in responses])
        if self.step == 1:
            self.policy.start_value_head_at(sum(scaled) / len(scaled))
        rows = [self._row(r, score) for r, score in zip(responses, scaled, strict=True)]
        self._standardize(rows)
        warming_up = self.step <= self.config.critic_warmup_steps
        self.policy.set_adapter_trainable(trainable=not warming_up)
        return [
            self._pass([(responses[i], rows[i]) for i in minibatch])
            for epoch in orders
            for minibatch in epoch
        ]

    def _forward(self, response: Response):
        """Log-probabilities, entropies and values of the answer's tokens, lists of scalars."""
        ids = torch.tensor([response.prompt + response.answer])
        out = self.policy.model(input_ids=ids, output_hidden_states=True)
        first = len(response.prompt) - 1
        logprobs, entropies, values = [], [], []
        for offset, token in enumerate(response.answer):
            scores = out.logits[0, first + offset].float() / self.config.temperature
            distribution = scores - torch.log(torch.exp(scores - scores.max()).sum()) - scores.max()
            logprobs.append(distribution[token])
            entropies.append(-(torch.exp(distribution) * distribution).sum())
            values.append(self.policy.value_head(out.hidden_states[-1][0, first + offset])[0])
        return logprobs, entropies, values

    def _scaled(self, scores: list[float]) -> list[float]:
        self.seen_scores += scores
        mean = sum(self.seen_scores) / len(self.seen_scores)
        variance = sum((s - mean) ** 2 for s in self.seen_scores) / len(self.seen_scores)
        std = math.sqrt(variance) or 1.0
        return [max(-10.0, min(10.0, score / std)) for score in scores]

    @torch.no_grad()
    def _row(self, response: Response, score: float) -> _Row:
        old, _, values = self._forward(response)
        with self.policy.model.disable_adapter():
            reference, _, _ = self._forward(response)
        old, values, reference = ([float(x) for x in xs] for xs in (old, values, reference))
        count = len(old)
        rewards = [-self.config.kl_coef * (old[t] - reference[t]) for t in range(count)]
        rewards[-1] += score
        following = [*values[1:], 0.0]
        gamma, lam = self.config.gamma, self.config.lam
        deltas = [rewards[t] + gamma * following[t] - values[t] for t in range(count)]
        advantages = [
            sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, count)) for t in range(count)
        ]
        returns = [a + v for a, v in zip(advantages, values, strict=True)]
        return _Row(old=old, values=values, advantages=advantages, returns=returns)

    def _standardize(self, rows: list[_Row]) -> None:
        every = [a for row in rows for a in row.advantages]
        mean = sum(every) / len(every)
        variance = sum((a - mean) ** 2 for a in every) / (len(every) - 1)
        for row in rows:
            row.advantages = [(a - mean) / math.sqrt(variance + 1e-8) for a in row.advantages]

    def _pass(self, minibatch: list[tuple[Response, _Row]]) -> float:
        config = self.config
        for parameter in [*self.adapter, *self.head]:
            parameter.grad = None
        tokens = sum(len(response.answer) for response, _ in minibatch)
        policy_loss, total = 0.0, torch.zeros(())
        for response, row in minibatch:
            for t, (logprob, entropy, value) in enumerate(
                zip(*self._forward(response), strict=True)
            ):
                advantage = row.advantages[t]
                ratio = torch.exp(logprob - row.old[t])
                bounded = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
                objective = torch.minimum(ratio * advantage, bounded * advantage)
                if advantage < 0 and config.dual_clip is not None:
                    floor = config.dual_clip * advantage
                    objective = objective if float(objective.detach()) >= floor else floor
                moved = (value - row.values[t]).clamp(
                    -config.value_clip_range, config.value_clip_range
                )
                value_error = 0.5 * torch.maximum(
                    (value - row.returns[t]) ** 2,
                    (row.values[t] + moved - row.returns[t]) ** 2,
                )
                policy_loss -= float(torch.as_tensor(objective).detach()) / tokens
                total = (
                    total
                    + (-objective + config.value_coef * value_error - config.entropy_coef * entropy)
                    / tokens
                )
        total.backward()
        self._adam()
        return policy_loss

    @torch.no_grad()
    def _adam(self) -> None:
        config = self.config
        warmup = math.ceil(config.warmup_fraction * config.total_steps)
        factor = min(1.0, self.step / warmup) if warmup else 1.0
        trained = [p for p in [*self.adapter, *self.head] if p.grad is not None]
        norm = math.sqrt(sum(float((p.grad**2).sum()) for p in trained))
        shrink = min(1.0, config.max_grad_norm / (norm + 1e-6))
        for parameter in trained:
            is_head = any(parameter is p for p in self.head)
            rate = config.value_learning_rate if is_head else config.learning_rate
            count, first, second = self.moments[id(parameter)]
            gradient = parameter.grad * shrink
            count, first, second = (
                count + 1,
                0.9 * first + 0.1 * gradient,
                0.999 * second + 0.001 * gradient**2,
            )
            self.moments[id(parameter)] = (count, first, second)
            corrected = torch.sqrt(second / (1 - 0.999**count)) + 1e-5
            parameter.sub_(factor * rate * (first / (1 - 0.9**count)) / corrected)
