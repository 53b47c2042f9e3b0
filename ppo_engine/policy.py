"""The model in training: one frozen base that serves policy, reference and critic.

The policy is the base with a LoRA adapter, the reference the same base with the adapter off, the
critic a scalar head on the policy's last hidden state, computed in the same forward pass.
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

from ppo_engine.config import LoraConfig
from ppo_engine.errors import InvalidConfig, ModelLoadFailed
from ppo_engine.logprobs import token_logprobs

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Evaluation(NamedTuple):
    """What one forward pass says of the responses, [B, T] fp32, zero outside `response_mask`."""

    logprobs: Tensor
    entropy: Tensor
    values: Tensor


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
        self.temperature = temperature
        causal_lm = model.get_base_model() if isinstance(model, PeftModel) else model
        self._backbone = causal_lm.base_model
        self._output = causal_lm.get_output_embeddings()

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        device: torch.device = self._output.weight.device
        return device

    def logits(self, states: Tensor) -> Tensor:
        """Next-token scores of hidden states [..., H] -> [..., V], in fp32 whatever the base is."""
        bias = None if self._output.bias is None else self._output.bias.float()
        return nn.functional.linear(states.float(), self._output.weight.float(), bias)

    def step(
        self, tokens: Tensor, attention_mask: Tensor, positions: Tensor, cache: Any
    ) -> tuple[Tensor, Any]:
        """Next-token scores [B, V] after `tokens`, and the grown key-value cache."""
        output = self._backbone(
            input_ids=tokens,
            attention_mask=attention_mask.long(),
            position_ids=positions,
            cache=cache,
            use_cache=True,
        )
        return self.logits(output.last_hidden_state[:, -1]), output.cache


class Policy(CausalPolicy):
    """Base, adapter and value head; evaluates given responses and hands out what may be trained."""

    def __init__(self, base: BaseModel, lora: LoraConfig, *, temperature: float, seed: int) -> None:
        modules = "all-linear" if lora.target_modules == "auto" else list(lora.target_modules)
        settings = PeftLoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            target_modules=modules,
            lora_dropout=0.0,
            bias="none",
            task_type="CAUSAL_LM",
        )
        try:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                self.model: PeftModel = get_peft_model(base.model, settings)
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

    def peak_memory_bytes(self) -> int:
        """Most memory held so far: of the device, or of the process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        # Kilobytes everywhere but on macOS, where they are bytes.
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The adapter's weights by name: all that PPO's policy term trains."""
        return {name: p for name, p in self.model.named_parameters() if "lora_" in name}

    def value_parameters(self) -> dict[str, nn.Parameter]:
        """The value head's weights by name."""
        return dict(self.value_head.named_parameters(prefix="value_head"))

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
        with self.model.disable_adapter():
            yield

    def evaluate(self, tokens: Tensor, attention_mask: Tensor, response_mask: Tensor) -> Evaluation:
        """Log-probabilities, entropies and values of responses; [B, P+T], [B, P+T], [B, T] in.

        `hidden[:, P-1 : P+T-1]` is the state in which the tokens `[:, P : P+T]` were chosen.
        """
        hidden = self._backbone(
            input_ids=tokens,
            attention_mask=attention_mask.long(),
            position_ids=position_ids(attention_mask),
            use_cache=False,
        ).last_hidden_state
        columns = response_mask.shape[1]
        states = hidden[:, -columns - 1 : -1].float()
        result = token_logprobs(
            self.logits(states), tokens[:, -columns:], temperature=self.temperature
        )
        values = self.value_head(states).squeeze(-1)
        return Evaluation(
            *(torch.where(response_mask, x, 0.0) for x in (*result, values)),
        )


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions that count real tokens only, so that left padding moves nothing; [B, S] int64."""
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
