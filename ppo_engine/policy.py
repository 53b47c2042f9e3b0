"""The model in training: one frozen base that serves policy, reference and critic.

The policy is the base with a LoRA adapter, the reference the same base with the adapter off.  The
critic is a scalar head on the policy's last hidden state, computed in the same forward pass, or on
that of the base with an adapter of its own.
"""

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppo_engine.config import Critic, LoraConfig
from ppo_engine.errors import InvalidConfig, ModelLoadFailed
from ppo_engine.logprobs import OutputHead, head_comparison, head_logprobs

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_CHUNK_TOKENS = {"cuda": 1024}
_CPU_CHUNK_TOKENS = 64
"""Tokens whose scores are held at once; on a CPU larger chunks save no time."""
_POLICY, _CRITIC = "default", "critic"
"""Names of the two adapters."""


class Evaluation(NamedTuple):
    """What one forward pass says of the responses, [B, T] fp32, zero outside `response_mask`."""

    logprobs: Tensor
    entropy: Tensor
    values: Tensor
    """The critic's value of the state in which each token was chosen; zeros without a critic."""


class Estimates(NamedTuple):
    """What is known of responses before an update, [B, T] fp32, zero outside `response_mask`."""

    logprobs: Tensor
    entropy: Tensor
    values: Tensor
    kl_reference_logprobs: Tensor
    """Under the frozen reference."""
    kl_exact: Tensor
    """KL(π‖π_ref) over the whole vocabulary."""
    last_values: Tensor
    """[B]; value of the state after the last response token."""


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A frozen causal language model with its tokenizer."""

    model: Any
    """The transformers model; every parameter frozen."""
    tokenizer: Any
    """Its tokenizer."""
    stop_ids: tuple[int, ...]
    """Tokens that end a response."""
    pad_id: int
    """Fills rows up; masked everywhere, so it may equal a stop token."""

    @classmethod
    def load(cls, path: Path, *, precision: str, device: str) -> "BaseModel":
        """The model in a local folder; safetensors only, and no code of the folder is run."""
        try:
            model = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=_DTYPES[precision],
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
            ).to(device)
            tokenizer = AutoTokenizer.from_pretrained(
                path, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            # The cause names folders of this machine; it stays in the log.
            raise ModelLoadFailed(
                "the base model cannot be loaded; the worker's log says why", param="model"
            ) from error
        _refuse_scaled_logits(model.config)
        model.requires_grad_(requires_grad=False)
        model.eval()  # dropout off: equal tokens must get equal log-probabilities in every pass
        stop_ids = _stop_ids(model, tokenizer)
        pad_id = stop_ids[0] if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
        return cls(model=model, tokenizer=tokenizer, stop_ids=stop_ids, pad_id=pad_id)


def _refuse_scaled_logits(config: Any) -> None:
    """Refuse models that do more to their logits than one matrix product.

    They would be sampled from another distribution than their own.
    """
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise ModelLoadFailed(
                f"models with {name} are not supported: their output head scales its scores",
                param="model",
            )


def _stop_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Every token that ends an answer, by the model's generation settings and its tokenizer."""
    configured = model.generation_config.eos_token_id
    listed = configured if isinstance(configured, list) else [configured]
    found = {int(token) for token in [*listed, tokenizer.eos_token_id] if token is not None}
    if not found:
        raise ModelLoadFailed("the base model names no token that ends an answer", param="model")
    return tuple(sorted(found))


class CausalPolicy:
    """A causal language model as something to sample from."""

    def __init__(self, base: BaseModel, model: Any, *, temperature: float) -> None:
        self.base = base
        self.adapter_version = 0
        """Optimizer steps taken so far; stamps samples and what is computed from them."""
        causal_lm = model.get_base_model() if isinstance(model, PeftModel) else model
        self._backbone = causal_lm.base_model
        self._output = causal_lm.get_output_embeddings()
        self._has_window = getattr(causal_lm.config, "sliding_window", None) is not None
        self._dtype = causal_lm.dtype
        bias = self._output.bias
        self._head = OutputHead(
            # fp32 from the scores on, whatever the base is; converted once.
            weight=self._output.weight.detach().float(),
            bias=None if bias is None else bias.detach().float(),
            temperature=temperature,
            chunk_tokens=_CHUNK_TOKENS.get(self.device.type, _CPU_CHUNK_TOKENS),
        )

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        device: torch.device = self._output.weight.device
        return device

    def _attention(self, attention_mask: Tensor, queries: int) -> Tensor:
        """What the model takes as its mask; [B, S] in.

        Models whose layers differ in what they see make their masks themselves.
        """
        if self._has_window:
            return attention_mask.long()
        return causal_bias(attention_mask, queries, dtype=self._dtype)

    def step(
        self, tokens: Tensor, attention_mask: Tensor, positions: Tensor, cache: Any
    ) -> tuple[Tensor, Any]:
        """Next-token scores z/τ [B, V] after `tokens`, and the grown key-value cache."""
        output = self._backbone(
            input_ids=tokens,
            attention_mask=self._attention(attention_mask, tokens.shape[1]),
            position_ids=positions,
            cache=cache,
            use_cache=True,
        )
        return self._head.scores(output.last_hidden_state[:, -1]), output.cache


class Policy(CausalPolicy):
    """Base, adapter and critic; evaluates given responses and hands out what may be trained."""

    def __init__(
        self,
        base: BaseModel,
        lora: LoraConfig,
        *,
        temperature: float,
        seed: int,
        critic: Critic | None = Critic.SHARED_HEAD,
    ) -> None:
        self._critic = critic
        settings = _peft_config(lora)
        try:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                self.model: PeftModel = get_peft_model(base.model, settings)
                if critic is Critic.ADAPTER:
                    self.model.add_adapter(_CRITIC, _peft_config(lora))
        except ValueError as error:
            raise InvalidConfig(
                f"the adapter does not fit the model: {error}", param="lora.target_modules"
            ) from error
        self.model.eval()
        if isinstance(self.model.get_base_model().get_output_embeddings(), BaseTunerLayer):
            raise InvalidConfig(
                "the output head cannot carry an adapter; leave it out", param="lora.target_modules"
            )
        super().__init__(base, self.model, temperature=temperature)
        self.value_head = nn.Linear(self._output.weight.shape[1], 1, device=self.device)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        for parameter in self.value_parameters().values():
            parameter.requires_grad = True

    def peak_memory_bytes(self) -> int:
        """Most memory held so far: of the device, or of the process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        # Kilobytes everywhere but on macOS, where they are bytes.
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The policy adapter's weights by name: all that PPO's policy term trains."""
        return self._lora_parameters(_POLICY)

    def value_parameters(self) -> dict[str, nn.Parameter]:
        """The critic's weights by name: its head, and its adapter if it has one."""
        if self._critic is None:
            return {}
        head = dict(self.value_head.named_parameters(prefix="value_head"))
        return head | self._lora_parameters(_CRITIC)

    def _lora_parameters(self, adapter: str) -> dict[str, nn.Parameter]:
        return {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if "lora_" in name and f".{adapter}." in name
        }

    def start_value_head_at(self, value: float) -> None:
        """Let the critic answer `value` everywhere, until it has learned."""
        with torch.no_grad():
            self.value_head.bias.fill_(value)

    def set_adapter_trainable(self, *, trainable: bool) -> None:
        """Freeze or unfreeze the adapter; a frozen one costs no backward pass."""
        for parameter in self.adapter_parameters().values():
            parameter.requires_grad_(trainable)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the model is the frozen reference: the base with the adapter off."""
        trained = self._trainable()
        try:
            with self.model.disable_adapter():
                yield
        finally:
            _restore_trainable(trained)

    @contextmanager
    def _critics_adapter(self) -> Iterator[None]:
        """Inside, the critic's adapter is in use; what may be trained stays as it was."""
        trained = self._trainable()
        self.model.set_adapter(_CRITIC)
        _restore_trainable(trained)
        try:
            yield
        finally:
            self.model.set_adapter(_POLICY)
            _restore_trainable(trained)

    def _trainable(self) -> dict[nn.Parameter, bool]:
        return {p: p.requires_grad for _, p in self.model.named_parameters()}

    def evaluate(self, tokens: Tensor, attention_mask: Tensor, response_mask: Tensor) -> Evaluation:
        """Log-probabilities, entropies and values of responses; [B, P+T], [B, P+T], [B, T] in."""
        hidden = self._hidden(tokens, attention_mask)
        chosen = tokens[:, -response_mask.shape[1] :][response_mask]
        result = head_logprobs(_states(hidden, response_mask), chosen, self._head)
        critic_hidden = self._critic_hidden(hidden, tokens, attention_mask)
        return Evaluation(
            _scattered(result.logprobs, response_mask),
            _scattered(result.entropy, response_mask),
            self._values(critic_hidden, response_mask),
        )

    @torch.no_grad()
    def estimate(self, tokens: Tensor, attention_mask: Tensor, response_mask: Tensor) -> Estimates:
        """What `evaluate` says, exactly, with what is needed once per rollout."""
        hidden = self._hidden(tokens, attention_mask)
        with self.reference():
            reference_hidden = self._hidden(tokens, attention_mask)
        chosen = tokens[:, -response_mask.shape[1] :][response_mask]
        found = head_comparison(
            _states(hidden, response_mask),
            _states(reference_hidden, response_mask),
            chosen,
            self._head,
        )
        critic_hidden = self._critic_hidden(hidden, tokens, attention_mask)
        return Estimates(
            logprobs=_scattered(found.logprobs, response_mask),
            entropy=_scattered(found.entropy, response_mask),
            values=self._values(critic_hidden, response_mask),
            kl_reference_logprobs=_scattered(found.reference_logprobs, response_mask),
            kl_exact=_scattered(found.kl, response_mask),
            last_values=self._last_values(critic_hidden, response_mask),
        )

    def _hidden(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        """Last hidden states, [B, P+T, H]."""
        states: Tensor = self._backbone(
            input_ids=tokens,
            attention_mask=self._attention(attention_mask, tokens.shape[1]),
            position_ids=position_ids(attention_mask),
            use_cache=False,
        ).last_hidden_state
        return states

    def _critic_hidden(self, hidden: Tensor, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        """The states that the value head reads; the policy's own unless the critic has a trunk."""
        match self._critic:
            case Critic.DETACHED_HEAD:
                return hidden.detach()
            case Critic.ADAPTER:
                with self._critics_adapter():
                    return self._hidden(tokens, attention_mask)
            case _:
                return hidden

    def _values(self, hidden: Tensor, response_mask: Tensor) -> Tensor:
        if self._critic is None:
            return torch.zeros_like(response_mask, dtype=torch.float32)
        values = self.value_head(_states(hidden, response_mask)).squeeze(-1)
        return _scattered(values, response_mask)

    def _last_values(self, hidden: Tensor, response_mask: Tensor) -> Tensor:
        """Values of the states after the last response token, [B]."""
        if self._critic is None:
            return torch.zeros(len(response_mask), device=hidden.device)
        columns = response_mask.shape[1]
        numbered = torch.arange(1, columns + 1, device=hidden.device) * response_mask
        last = hidden.shape[1] - columns - 1 + numbered.amax(dim=1)
        rows = torch.arange(len(hidden), device=hidden.device)
        values: Tensor = self.value_head(hidden[rows, last].float()).squeeze(-1)
        return values


def _peft_config(lora: LoraConfig) -> PeftLoraConfig:
    return PeftLoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=(
            "all-linear" if lora.target_modules == "auto" else list(lora.target_modules)
        ),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )


def _restore_trainable(trained: dict[nn.Parameter, bool]) -> None:
    """Switching adapters also decides what may be trained; that is not its business here."""
    for parameter, is_trained in trained.items():
        parameter.requires_grad_(is_trained)


def _states(hidden: Tensor, response_mask: Tensor) -> Tensor:
    """States in which the response tokens were chosen, [N, H] fp32, row by row.

    `hidden[:, P-1 : P+T-1]` is where the tokens `[:, P : P+T]` were chosen.
    """
    columns = response_mask.shape[1]
    return hidden[:, -columns - 1 : -1][response_mask].float()


def _scattered(values: Tensor, response_mask: Tensor) -> Tensor:
    """Values of response tokens [N] at their places, [B, T] fp32; exact zeros elsewhere."""
    result = torch.zeros(response_mask.shape, dtype=torch.float32, device=values.device)
    return result.masked_scatter(response_mask, values.float())


def causal_bias(attention_mask: Tensor, queries: int, *, dtype: torch.dtype) -> Tensor:
    """0 where the last `queries` tokens may look, the lowest number elsewhere; [B, 1, Q, S].

    Real tokens see the real tokens before them.  Padding sees what stands before it: nobody reads
    it, but a row that sees nothing at all is NaN in some kernels, in their backward pass at least.
    Every batch gets a mask, padded or not: without one another kernel would run, which rounds
    differently, and the first ratio of an update would not be 1.
    """
    places = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    is_before = places <= places[-queries:, None]
    is_padding = ~attention_mask[:, -queries:, None]
    allowed = is_before & (attention_mask[:, None, :] | is_padding)
    bias = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return bias.masked_fill(~allowed, torch.finfo(dtype).min)[:, None]


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions that count real tokens only, so that left padding moves nothing; [B, S] int64."""
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
