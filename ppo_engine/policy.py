"""The model in training: one frozen base that serves policy, reference and critic.

The policy is the base with a LoRA adapter, the reference the same base with the adapter off, or
with the adapter that training started from.  The critic is a scalar head on the policy's last
hidden state, computed in the same forward pass, or on that of the base with an adapter of its own.
"""

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppo_engine.attention import depends_on_beginning
from ppo_engine.config import Critic, LoraConfig
from ppo_engine.decoder import Decoder
from ppo_engine.errors import InvalidConfig, ModelLoadFailed
from ppo_engine.flat_weights import FlatWeights
from ppo_engine.generation import DecoderGeneration, Generation, ModelGeneration, position_ids
from ppo_engine.logprobs import OutputHead, head_comparison, head_logprobs
from ppo_engine.machine import block_entries
from ppo_engine.packing import CommonShape, Packed, common_prefix, pack
from ppo_engine.products import row_depends_on_others

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_POLICY, _CRITIC, _REFERENCE = "default", "critic", "kl_reference"
"""Names of the adapters."""


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
    boundary: Tensor
    """[B, P+T, H]; what the lowest adapted layer reads; H = 0 where it is the first."""


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
        self._decoder = Decoder(causal_lm) if Decoder.supports(causal_lm) else None
        self._sampling_adapter = _POLICY if isinstance(model, PeftModel) else None
        bias = self._output.bias
        self._head = OutputHead(
            self._output.weight.detach(),
            None if bias is None else bias.detach(),
            temperature=temperature,
            block_entries=block_entries(self.device.type),
        )

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        device: torch.device = self._output.weight.device
        return device

    @property
    def packs(self) -> bool:
        """Whether rows are laid end to end, so that their padding costs nothing."""
        return self._decoder is not None

    @cached_property
    def rounds_by_shape(self) -> bool:
        """Whether a row's last bits may depend on how many tokens stand beside it.

        In fp32 they do not (`packing.FEWEST_TOKENS`); other formats are tried out on a CPU, and on
        other devices they may.
        """
        if self._dtype is torch.float32 or self._decoder is None:
            return False
        if self.device.type != "cpu":
            return True
        return row_depends_on_others([group.weight for group in self._decoder.layers[0].groups])

    def rounds_by_beginning(self, longest: int) -> bool:
        """Whether a row's last bits may depend on how long a beginning its micro-batch shares.

        With rows of up to `longest` tokens.
        """
        return self._decoder is not None and depends_on_beginning(self._decoder.norm, longest)

    def _attention(self, attention_mask: Tensor, queries: int) -> Tensor:
        """What the model takes as its mask; [B, S] in.

        Models whose layers differ in what they see make their masks themselves.
        """
        if self._has_window:
            return attention_mask.long()
        return causal_bias(attention_mask, queries, dtype=self._dtype)

    def generation(self, *, max_response_tokens: int) -> Generation:
        """Something that continues prompts by so many tokens at most."""
        if self._decoder is None:
            return ModelGeneration(self._cached_forward, self._head)
        return DecoderGeneration(
            self._decoder,
            self._head,
            self._sampling_adapter,
            max_response_tokens=max_response_tokens,
        )

    def _cached_forward(
        self, tokens: Tensor, attention_mask: Tensor, positions: Tensor, cache: Any
    ) -> tuple[Tensor, Any]:
        output = self._backbone(
            input_ids=tokens,
            attention_mask=self._attention(attention_mask, tokens.shape[1]),
            position_ids=positions,
            cache=cache,
            use_cache=True,
        )
        return output.last_hidden_state, output.cache


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
        self._adapters: dict[str, dict[str, nn.Parameter]] = {}
        self._reference: str | None = None
        """The frozen reference's adapter; None is the bare base."""
        settings = _peft_config(lora, base.model)
        try:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                self.model: PeftModel = get_peft_model(base.model, settings)
                if critic is Critic.ADAPTER:
                    self.model.add_adapter(_CRITIC, _peft_config(lora, base.model))
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
        self.adapter_weights = FlatWeights(self.adapter_parameters())
        """All that PPO's policy term trains."""
        self.value_weights = None if critic is None else FlatWeights(self.value_parameters())
        """The critic's, if there is one."""

    def peak_memory_bytes(self) -> int:
        """Most memory held so far: of the device, or of the process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        # Kilobytes everywhere but on macOS, where they are bytes.
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The policy adapter's weights by name."""
        return self._lora_parameters(_POLICY)

    def value_parameters(self) -> dict[str, nn.Parameter]:
        """The critic's weights by name: its head, and its adapter if it has one."""
        if self._critic is None:
            return {}
        head = dict(self.value_head.named_parameters(prefix="value_head"))
        return head | self._lora_parameters(_CRITIC)

    def trained_weights(self) -> list[FlatWeights]:
        """Those of the adapter, and of the critic if there is one."""
        return [self.adapter_weights, *([self.value_weights] if self.value_weights else [])]

    def _weights_with(self, adapter: str | None) -> FlatWeights | None:
        """The trained weights that hold this adapter's."""
        if adapter == _POLICY:
            return self.adapter_weights
        return self.value_weights if adapter == _CRITIC else None

    def _lora_parameters(self, adapter: str) -> dict[str, nn.Parameter]:
        """An adapter's weights by name; looked up once, as a walk over all modules takes long."""
        if adapter not in self._adapters:
            self._adapters[adapter] = {
                name: parameter
                for name, parameter in self.model.named_parameters()
                if "lora_" in name and f".{adapter}." in name
            }
        return self._adapters[adapter]

    def hold_to_present_adapter(self) -> None:
        """From now on the frozen reference is the policy as it stands, not the bare base."""
        self.model.add_adapter(_REFERENCE, self.model.peft_config[_POLICY])
        self._reference = _REFERENCE
        present = self._lora_parameters(_POLICY)
        with torch.no_grad():
            for name, parameter in self._lora_parameters(_REFERENCE).items():
                parameter.copy_(present[name.replace(f".{_REFERENCE}.", f".{_POLICY}.")])
                parameter.requires_grad = False

    def start_value_head_at(self, value: float) -> None:
        """Let the critic answer `value` everywhere, until it has learned."""
        with torch.no_grad():
            self.value_head.bias.fill_(value)

    def set_adapter_trainable(self, *, trainable: bool) -> None:
        """Freeze or unfreeze the adapter; a frozen one costs no backward pass."""
        for parameter in self.adapter_parameters().values():
            parameter.requires_grad_(trainable)

    @contextmanager
    def _switched_to(self, adapter: str | None) -> Iterator[None]:
        """Inside, transformers' forward pass uses this adapter, or none.

        Switching also decides what may be trained; that is not its business here.
        """
        trained = {p: p.requires_grad for p in self.model.parameters()}
        try:
            if adapter is None:
                with self.model.disable_adapter():
                    yield
            else:
                self.model.set_adapter(adapter)
                _restore_trainable(trained)
                yield
        finally:
            self.model.set_adapter(_POLICY)
            _restore_trainable(trained)

    def evaluate(
        self,
        tokens: Tensor,
        attention_mask: Tensor,
        response_mask: Tensor,
        *,
        shape: CommonShape | None = None,
        boundary: Tensor | None = None,
        entropy_gradient: bool = True,
    ) -> Evaluation:
        """Log-probabilities, entropies and values of responses; [B, P+T], [B, P+T], [B, T] in.

        `shape`: `MicroBatch`.  `boundary`: these rows of what `estimate` found.  Without
        `entropy_gradient` the entropy is a number only.  Differentiable in `trained_weights`.
        """
        rows = self._rows(tokens, attention_mask, read_states(response_mask, tokens), shape)
        rows = rows._replace(boundary=boundary)
        states = self._states(rows, _POLICY)
        result = head_logprobs(
            states,
            _chosen(tokens, response_mask),
            self._head,
            entropy_gradient=entropy_gradient,
        )
        return Evaluation(
            _scattered(result.logprobs, response_mask),
            _scattered(result.entropy, response_mask),
            self._values(self._critic_states(states, rows), response_mask),
        )

    @torch.no_grad()
    def estimate(
        self,
        tokens: Tensor,
        attention_mask: Tensor,
        response_mask: Tensor,
        *,
        shape: CommonShape | None = None,
        with_last_values: bool = True,
    ) -> Estimates:
        """What `evaluate` says, exactly, with what is needed once per rollout.

        The last values are zeros unless they are asked for: they cost a token more per response.
        """
        read = read_states(response_mask, tokens)
        is_last = (
            _last_states(response_mask, tokens) if with_last_values else torch.zeros_like(read)
        )
        rows = self._rows(tokens, attention_mask, read | is_last, shape)
        if self._decoder is not None and rows.packed is not None and self._decoder.lowest_adapted:
            rows = rows._replace(boundary=self._decoder.boundary(tokens, rows.packed))
        is_chosen = read[read | is_last]
        states = self._states(rows, _POLICY)
        found = head_comparison(
            states[is_chosen],
            self._states(rows, self._reference)[is_chosen],
            _chosen(tokens, response_mask),
            self._head,
        )
        critic_states = self._critic_states(states, rows)
        return Estimates(
            logprobs=_scattered(found.logprobs, response_mask),
            entropy=_scattered(found.entropy, response_mask),
            values=self._values(critic_states[is_chosen], response_mask),
            kl_reference_logprobs=_scattered(found.reference_logprobs, response_mask),
            kl_exact=_scattered(found.kl, response_mask),
            last_values=self._values(critic_states[~is_chosen], is_last.any(dim=1)),
            boundary=states.new_zeros(*tokens.shape, 0) if rows.boundary is None else rows.boundary,
        )

    def _rows(
        self, tokens: Tensor, attention_mask: Tensor, read: Tensor, shape: CommonShape | None
    ) -> "_Rows":
        packed = None
        if self._decoder is not None and bool(read.any()):
            if shape is None:
                shape = CommonShape(tokens=0, prefix=common_prefix(tokens, attention_mask, read))
            packed = pack(attention_mask, read, prefix=shape.prefix, pad_to=shape.tokens)
        return _Rows(tokens, attention_mask, read, packed)

    def _states(self, rows: "_Rows", adapter: str | None) -> Tensor:
        """Last hidden states that are read, [n, H], row by row, with an adapter on or none."""
        if self._decoder is not None and rows.packed is not None:
            return self._decoder.states(
                rows.tokens,
                rows.packed,
                adapter=adapter,
                trained=self._weights_with(adapter),
                boundary=rows.boundary,
            )
        with self._switched_to(adapter):
            hidden: Tensor = self._backbone(
                input_ids=rows.tokens,
                attention_mask=self._attention(rows.attention_mask, rows.tokens.shape[1]),
                position_ids=position_ids(rows.attention_mask),
                use_cache=False,
            ).last_hidden_state
        return hidden[rows.read]

    def _critic_states(self, states: Tensor, rows: "_Rows") -> Tensor:
        """The states that the value head reads; the policy's own unless the critic has a trunk."""
        match self._critic:
            case Critic.DETACHED_HEAD:
                return states.detach()
            case Critic.ADAPTER:
                return self._states(rows, _CRITIC)
            case _:
                return states

    def _values(self, states: Tensor, mask: Tensor) -> Tensor:
        """Values of states [n, H] at the places that the mask selects, zeros elsewhere."""
        if self._critic is None:
            return torch.zeros_like(mask, dtype=torch.float32)
        return _scattered(self.value_head(states.float()).squeeze(-1), mask)


class _Rows(NamedTuple):
    """Rows of one forward pass, and which of their states are read."""

    tokens: Tensor
    """[B, S]."""
    attention_mask: Tensor
    read: Tensor
    """[B, S] bool."""
    packed: Packed | None
    """How our decoder lays them out; None where it is not used."""
    boundary: Tensor | None = None
    """What the lowest adapted layer reads, where it is known."""


def _peft_config(lora: LoraConfig, model: Any) -> PeftLoraConfig:
    modules: str | list[str] = list(lora.target_modules)
    if lora.target_modules == "auto":
        # PEFT takes its own word for all layers, and names for some.
        modules = "all-linear" if lora.last_layers is None else _linear_names(model)
    return PeftLoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=modules,
        layers_to_transform=_top_layers(lora.last_layers, model.config.num_hidden_layers),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )


def _linear_names(model: Any) -> list[str]:
    """Of all linear layers but the output head."""
    head = model.get_output_embeddings()
    found = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    return sorted(found)


def _top_layers(count: int | None, depth: int) -> list[int] | None:
    if count is None:
        return None
    if count > depth:
        raise InvalidConfig(
            f"the model has {depth} layers, so the last {count} cannot be adapted",
            param="lora.layers",
        )
    return list(range(depth - count, depth))


def _restore_trainable(trained: dict[nn.Parameter, bool]) -> None:
    for parameter, is_trained in trained.items():
        parameter.requires_grad_(is_trained)


def read_states(response_mask: Tensor, tokens: Tensor) -> Tensor:
    """Where response tokens were chosen: one column before each; [B, P+T] bool."""
    read = torch.zeros_like(tokens, dtype=torch.bool)
    read[:, -response_mask.shape[1] - 1 : -1] = response_mask
    return read


def _last_states(response_mask: Tensor, tokens: Tensor) -> Tensor:
    """Each response's last token; [B, P+T] bool."""
    behind = response_mask.flip(1).long().cumsum(dim=1).flip(1)
    last = torch.zeros_like(tokens, dtype=torch.bool)
    last[:, -response_mask.shape[1] :] = response_mask & (behind == 1)
    return last


def _chosen(tokens: Tensor, response_mask: Tensor) -> Tensor:
    """The response tokens, [N], row by row."""
    return tokens[:, -response_mask.shape[1] :][response_mask]


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
