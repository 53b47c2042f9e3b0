"""The decoder stack of Llama-like models, forward and backward, for packed rows.

It reads the weights of a transformers model and the adapters that PEFT put there, and computes what
they compute, faster: linear layers with the same input are one product, nothing is computed for
padding, and the backward pass, written out, keeps only what it needs.  Models of other families
take transformers' own forward pass.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ppo_engine.attention import Attended, Attention, HeadShape, attention_over
from ppo_engine.flat_weights import FlatWeights
from ppo_engine.linear_groups import AdapterSet, GroupAdapters, GroupGradients, LinearGroup
from ppo_engine.native import kernels_for
from ppo_engine.packing import Packed

T = TypeVar("T")

_FAMILIES = ("llama", "mistral", "qwen2")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary embedding whose angles do not depend on the length of the input."""


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """The weights of one layer."""

    attention_norm: Tensor
    qkv: LinearGroup
    output: LinearGroup
    mlp_norm: Tensor
    gate_up: LinearGroup
    down: LinearGroup

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        """In the order in which a forward pass meets them."""
        return self.qkv, self.output, self.gate_up, self.down

    @property
    def has_adapters(self) -> bool:
        """Whether any adapter touches the layer."""
        return any(group.has_adapters for group in self.groups)


class Decoder:
    """Embedding, layers and last norm of one model, with any of its adapters on, or none."""

    def __init__(self, causal_lm: Any) -> None:
        config, backbone = causal_lm.config, causal_lm.base_model
        self.dtype: torch.dtype = causal_lm.dtype
        heads: int = config.num_attention_heads
        size: int = getattr(config, "head_dim", None) or config.hidden_size // heads
        self.shape = HeadShape(heads, config.num_key_value_heads, size)
        self.epsilon: float = config.rms_norm_eps
        self.norm: Tensor = backbone.norm.weight.detach()
        self.layers = [
            DecoderLayer(
                attention_norm=layer.input_layernorm.weight.detach(),
                qkv=LinearGroup(
                    [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]
                ),
                output=LinearGroup([layer.self_attn.o_proj]),
                mlp_norm=layer.post_attention_layernorm.weight.detach(),
                gate_up=LinearGroup([layer.mlp.gate_proj, layer.mlp.up_proj]),
                down=LinearGroup([layer.mlp.down_proj]),
            )
            for layer in backbone.layers
        ]
        self.lowest_adapted = next(
            (number for number, layer in enumerate(self.layers) if layer.has_adapters),
            len(self.layers),
        )
        """Number of the lowest layer that any adapter touches."""
        self._embedding: Tensor = backbone.embed_tokens.weight.detach()
        self._rotary = backbone.rotary_emb
        self._adapter_sets: dict[str | None, AdapterSet] = {}

    @classmethod
    def supports(cls, causal_lm: Any) -> bool:
        """Whether this module computes what the model does."""
        config = causal_lm.config
        rope = getattr(config, "rope_parameters", None) or {}
        adapted = [
            (name, module)
            for name, module in causal_lm.named_modules()
            if isinstance(module, BaseTunerLayer)
        ]
        return (
            config.model_type in _FAMILIES
            and all(
                isinstance(module, LoraLinear) and name.rsplit(".", 1)[-1] in _PROJECTIONS
                for name, module in adapted
            )
            and config.hidden_act == "silu"
            and getattr(config, "sliding_window", None) is None
            and rope.get("rope_type", "default") in _ROPE_TYPES
        )

    def embedded(self, tokens: Tensor) -> Tensor:
        """What the first layer reads, [N, H]; tokens [N]."""
        return self._embedding[tokens]

    def rotation(self, positions: Tensor) -> "Rotation":
        """Of tokens at these places, [N]."""
        cos, sin = self._rotary(self.norm, positions[None])
        first, second = sin[0, :, None].chunk(2, dim=-1)
        return Rotation(cos[0, :, None], torch.cat([-first, second], dim=-1))

    def group_adapters(self, name: str | None) -> list[list[GroupAdapters]]:
        """Of each layer's groups, as they are now."""
        return self.by_layer(self._adapter_set(name).prepared(self.dtype))

    def by_layer(self, of_groups: Iterable[T]) -> list[list[T]]:
        """What there is of all groups in turn, layer by layer."""
        each = iter(of_groups)
        return [[next(each) for _ in layer.groups] for layer in self.layers]

    def _adapter_set(self, name: str | None) -> AdapterSet:
        """Looked up once: a walk over all modules takes long."""
        if name not in self._adapter_sets:
            groups = [group for layer in self.layers for group in layer.groups]
            self._adapter_sets[name] = AdapterSet(groups, name)
        return self._adapter_sets[name]

    def states(
        self,
        tokens: Tensor,
        packed: Packed,
        *,
        adapter: str | None,
        trained: FlatWeights | None = None,
        boundary: Tensor | None = None,
        collected: list[Tensor] | None = None,
    ) -> Tensor:
        """Last hidden states that are read, [num_kept, H]; tokens are the batch, [B, S].

        Differentiable in the one tensor of `trained`, which holds the adapter's weights, if they
        may be trained; not in each of them.  `boundary` [B, S, H] saves the layers that no adapter
        touches: see `boundary`.  `collected` takes every layer's queries, keys and values,
        [N, (heads + 2·kv)·d].
        """
        is_trained = torch.is_grad_enabled() and trained is not None and trained.is_trainable
        leaf = trained.together if trained is not None and is_trained else None
        work = self._work(packed, adapter, trained, collected)
        kept: list[_Kept] | None = [] if is_trained else None
        if boundary is None:
            first, hidden = 0, self.embedded(tokens.flatten()[packed.sources])
        else:
            first, hidden = self.lowest_adapted, boundary.flatten(0, 1)[packed.sources]
        states: Tensor = _Stack.apply(work, kept, first, hidden, leaf)  # type: ignore[no-untyped-call]
        return states[: packed.num_kept]

    @torch.no_grad()
    def boundary(self, tokens: Tensor, packed: Packed) -> Tensor:
        """What the lowest adapted layer reads, [B, S, H]; zeros where nothing was computed.

        It is the same with every adapter and before and after every pass, so once per rollout is
        enough.
        """
        work = self._work(packed, None, None, None)
        hidden = self.embedded(tokens.flatten()[packed.sources])
        for number in range(self.lowest_adapted):
            hidden = _forward_layer(work, number, hidden, None, is_last=False)
        return packed.unpacked(hidden, tokens.shape)

    def _work(
        self,
        packed: Packed,
        adapter: str | None,
        trained: FlatWeights | None,
        collected: list[Tensor] | None,
    ) -> "_Work":
        return _Work(
            decoder=self,
            packed=packed,
            rotation=self.rotation(packed.positions),
            attention=attention_over(packed, self.shape, self.norm),
            adapters=self.group_adapters(adapter),
            adapter_set=self._adapter_set(adapter),
            trained=trained,
            collected=collected,
        )


class Rotation(NamedTuple):
    """Rotary angles of N tokens."""

    cos: Tensor
    """[N, 1, d]."""
    sin: Tensor
    """[N, 1, d]; negative for the first half of a head."""

    def turn(self, qkv: Tensor, shape: HeadShape) -> None:
        """Rotates queries and keys of [N, (queries + 2·keys)·d] (RoFormer, arXiv:2104.09864)."""
        self._turn(qkv, shape, direction=1)

    def turn_back(self, of_qkv: Tensor, shape: HeadShape) -> None:
        """The same for gradients: the transposed map."""
        self._turn(of_qkv, shape, direction=-1)

    def _turn(self, qkv: Tensor, shape: HeadShape, *, direction: int) -> None:
        turned = shape.queries + shape.keys
        if (kernels := kernels_for(qkv)) is not None:
            kernels.rotate(qkv, self.cos, self.sin, heads=turned, direction=direction)
            return
        heads = qkv[:, : turned * shape.size].view(len(qkv), turned, shape.size)
        first, second = heads.chunk(2, dim=-1)
        swapped = torch.cat([second, first], dim=-1)
        heads.mul_(self.cos).addcmul_(swapped, self.sin, value=direction)


class _Work(NamedTuple):
    """What one pass through the stack works with."""

    decoder: Decoder
    packed: Packed
    rotation: Rotation
    attention: Attention
    adapters: list[list[GroupAdapters]]
    adapter_set: AdapterSet
    trained: FlatWeights | None
    collected: list[Tensor] | None


class _Kept(NamedTuple):
    """What a layer's backward pass needs of its forward pass."""

    inputs: Tensor
    qkv: Tensor
    """Rotated."""
    attended: Attended
    middle: Tensor
    """After attention, before the MLP."""
    gate_up: Tensor
    inner: tuple[Tensor | None, ...]
    """Of each group's adapters."""


class _Stack(torch.autograd.Function):
    """All layers and the last norm."""

    @staticmethod
    def forward(
        ctx: Any,
        work: _Work,
        kept: list[_Kept] | None,
        first: int,
        hidden: Tensor,
        _leaf: Tensor | None,
    ) -> Tensor:
        last = len(work.decoder.layers) - 1
        for number in range(first, last + 1):
            hidden = _forward_layer(work, number, hidden, kept, is_last=number == last)
        ctx.work, ctx.kept, ctx.first, ctx.hidden = work, kept, first, hidden
        normed, ctx.inverse = rms_norm(hidden, work.decoder.norm, work.decoder.epsilon)
        return normed

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        work: _Work = ctx.work
        decoder = work.decoder
        of_hidden = _norm_backward(upstream[0], ctx.hidden, decoder.norm, ctx.inverse)
        assert work.trained is not None  # noqa: S101 - or autograd would not ask
        found = work.adapter_set.gradients(work.trained)
        by_layer = decoder.by_layer(found.groups)
        # Below the lowest adapter nothing needs a gradient.
        for number in reversed(range(decoder.lowest_adapted, len(decoder.layers))):
            of_hidden = _backward_layer(
                work,
                number,
                ctx.kept[number - ctx.first],
                of_hidden,
                by_layer[number],
                is_last=number == len(decoder.layers) - 1,
            )
        found.gather()
        return None, None, None, None, found.together


def _forward_layer(
    work: _Work, number: int, hidden: Tensor, kept: list[_Kept] | None, *, is_last: bool
) -> Tensor:
    """What the layer makes of [N, H]; of the last layer only at the kept places."""
    decoder, layer = work.decoder, work.decoder.layers[number]
    adapters = work.adapters[number]
    inputs = hidden
    normed, _ = rms_norm(hidden, layer.attention_norm, decoder.epsilon)
    qkv, inner_qkv = layer.qkv.forward(normed, adapters[0])
    work.rotation.turn(qkv, decoder.shape)
    if work.collected is not None:
        work.collected.append(qkv)
    attended = work.attention.forward(qkv)
    result = attended.result
    if is_last:
        hidden, result = hidden[work.packed.kept], result[work.packed.kept]
    middle, inner_output = layer.output.forward(result, adapters[1], onto=hidden)
    normed, _ = rms_norm(middle, layer.mlp_norm, decoder.epsilon)
    gate_up, inner_gate_up = layer.gate_up.forward(normed, adapters[2])
    outputs, inner_down = layer.down.forward(gated(gate_up), adapters[3], onto=middle)
    if kept is not None:
        inner = (inner_qkv, inner_output, inner_gate_up, inner_down)
        kept.append(_Kept(inputs, qkv, attended, middle, gate_up, inner))
    return outputs


def _backward_layer(
    work: _Work,
    number: int,
    kept: _Kept,
    of_outputs: Tensor,
    gradients: list[GroupGradients],
    *,
    is_last: bool,
) -> Tensor:
    """∂/∂inputs; hands those of the adapters to `gradients`, of each group in turn."""
    decoder, layer = work.decoder, work.decoder.layers[number]
    adapters, inner = work.adapters[number], kept.inner
    of_gated = layer.down.backward(
        of_outputs, gated(kept.gate_up), inner[3], adapters[3], gradients[3]
    )
    of_gate_up = _gated_backward(of_gated, kept.gate_up)
    normed, inverse = rms_norm(kept.middle, layer.mlp_norm, decoder.epsilon)
    of_normed = layer.gate_up.backward(of_gate_up, normed, inner[2], adapters[2], gradients[2])
    of_middle = _norm_backward(of_normed, kept.middle, layer.mlp_norm, inverse, onto=of_outputs)
    result = kept.attended.result
    if is_last:
        result = result[work.packed.kept]
    of_result = layer.output.backward(of_middle, result, inner[1], adapters[1], gradients[1])
    if is_last:
        of_middle, of_result = (_spread(each, work.packed) for each in (of_middle, of_result))
    of_qkv = work.attention.backward(kept.qkv, kept.attended, of_result)
    work.rotation.turn_back(of_qkv, decoder.shape)
    normed, inverse = rms_norm(kept.inputs, layer.attention_norm, decoder.epsilon)
    of_normed = layer.qkv.backward(of_qkv, normed, inner[0], adapters[0], gradients[0])
    return _norm_backward(of_normed, kept.inputs, layer.attention_norm, inverse, onto=of_middle)


def _spread(values: Tensor, packed: Packed) -> Tensor:
    """Rows [n, H] at the kept places among zeros, [N, H]; filler stays out."""
    result = values.new_zeros(len(packed.sources), values.shape[1])
    result[packed.kept[: packed.num_kept]] = values[: packed.num_kept]
    return result


def rms_norm(hidden: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The input over its root mean square, in fp32, times the weight; and 1/rms, [N, 1].

    Source: arXiv:1910.07467, eq. 4.
    """
    if hidden.is_cuda:
        normed, inverse = torch.ops.aten._fused_rms_norm(  # noqa: SLF001 - the public one keeps 1/rms
            hidden, [hidden.shape[-1]], weight, epsilon
        )
        return normed, inverse
    if (kernels := kernels_for(hidden)) is not None:
        return kernels.rms_norm(hidden, weight, epsilon)
    wide = hidden.float()
    norms: Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    inverse = norms.square_().div_(wide.shape[-1]).add_(epsilon).rsqrt_()
    return (wide * inverse).to(hidden.dtype) * weight, inverse


def _norm_backward(
    of_normed: Tensor,
    hidden: Tensor,
    weight: Tensor,
    inverse: Tensor,
    *,
    onto: Tensor | None = None,
) -> Tensor:
    """∂/∂x of `rms_norm`, r·(w·g − x·r²·mean(w·g·x)); added to `onto`."""
    if hidden.is_cuda:
        result: Tensor = torch.ops.aten._fused_rms_norm_backward(  # noqa: SLF001
            of_normed, hidden, [hidden.shape[-1]], inverse, weight, [True, False]
        )[0]
        return result if onto is None else result.add_(onto)
    if (kernels := kernels_for(hidden)) is not None:
        return kernels.rms_norm_backward(of_normed, hidden, weight, inverse, onto)
    wide = hidden.float()
    weighted: Tensor = of_normed.float() * weight
    share: Tensor = torch.linalg.vecdot(weighted, wide)[:, None].div_(wide.shape[-1])
    weighted -= wide * (share * inverse.square())
    found = weighted.mul_(inverse).to(hidden.dtype)
    return found if onto is None else found.add_(onto)


def gated(gate_up: Tensor) -> Tensor:
    """silu(gate)·up, [N, F], of both side by side, [N, 2F] (SwiGLU, arXiv:2002.05202)."""
    if (kernels := kernels_for(gate_up)) is not None:
        return kernels.gated(gate_up)
    gate, up = gate_up.chunk(2, dim=1)
    return nn.functional.silu(gate).mul_(up)


def _gated_backward(of_result: Tensor, gate_up: Tensor) -> Tensor:
    """∂/∂gate_up of `gated`; `of_result` is used up."""
    if (kernels := kernels_for(gate_up)) is not None:
        return kernels.gated_backward(of_result, gate_up)
    gate, up = gate_up.chunk(2, dim=1)
    of_gate_up = torch.empty_like(gate_up)
    of_gate, of_up = of_gate_up.chunk(2, dim=1)
    torch.mul(of_result, nn.functional.silu(gate), out=of_up)
    torch.ops.aten.silu_backward.grad_input(of_result.mul_(up), gate, grad_input=of_gate)
    return of_gate_up
