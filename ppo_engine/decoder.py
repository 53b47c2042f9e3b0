"""The decoder stack of Llama-like models, forward and backward, for packed rows.

It reads the weights of a transformers model and the adapters that PEFT put there, and computes what
they compute, faster: linear layers with the same input are one product, nothing is computed for
padding, and the backward pass, written out, keeps only what it needs.  Models of other families
take transformers' own forward pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ppo_engine.attention import Attended, Attention, HeadShape, attention_over
from ppo_engine.native import (
    MOST_RANKS,
    Kernels,
    LowRank,
    Part,
    kernels_for,
    large_product_kernels_for,
    product_kernels_for,
)
from ppo_engine.packing import Packed
from ppo_engine.products import product, wide_product

_FAMILIES = ("llama", "mistral", "qwen2")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary embedding whose angles do not depend on the length of the input."""


class Adapter(NamedTuple):
    """The low-rank addition of one linear layer: scale · B·A."""

    a: nn.Parameter
    """[r, in] fp32."""
    b: nn.Parameter
    """[out, r] fp32."""
    scale: float


class LinearGroup:
    """Linear layers that read the same input, as one product; each may carry adapters.

    Their weights become views of one tensor, so nothing is held twice.
    """

    def __init__(self, modules: Sequence[Any]) -> None:
        self._modules = modules
        bases = [m.base_layer if isinstance(m, LoraLinear) else m for m in modules]
        self.weight = _joined([base.weight for base in bases])
        """[Σ out, in]."""
        biases = [base.bias for base in bases]
        self.bias = None if biases[0] is None else _joined(biases)
        ends = torch.tensor([base.weight.shape[0] for base in bases]).cumsum(0).tolist()
        self.slices = [slice(*pair) for pair in zip([0, *ends[:-1]], ends, strict=True)]

    @property
    def has_adapters(self) -> bool:
        """Whether any of the layers carries one."""
        return any(isinstance(module, LoraLinear) for module in self._modules)

    def adapters(self, name: str | None) -> list[tuple[slice, Adapter]]:
        """Those of this name, with the output columns that each adds to."""
        return [
            (part, Adapter(m.lora_A[name].weight, m.lora_B[name].weight, m.scaling[name]))
            for part, m in zip(self.slices, self._modules, strict=True)
            if name is not None and isinstance(m, LoraLinear) and name in m.lora_A
        ]

    def forward(
        self, inputs: Tensor, adapters: "GroupAdapters", *, onto: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Outputs [N, Σ out] and the adapters' inner values [N, Σ r]; [N, in] in.

        `onto` [N, Σ out] is added to the outputs.
        """
        weight, bias = self.weight.t(), self.bias
        if (kernels := adapters.product_kernels(inputs)) is not None:
            inner = None if adapters.down is None else kernels.product(inputs, adapters.down)
            result = kernels.large_product(
                inputs,
                weight,
                low_rank=None if inner is None else LowRank(inner, adapters.ups, adapters.parts),
                bias=None if bias is None else bias.float(),
                onto=onto,
            )
            return result, inner
        base = bias if onto is None else onto
        result = product(inputs, weight) if base is None else torch.addmm(base, inputs, weight)
        if onto is not None and bias is not None:
            result += bias
        if adapters.down is None:
            return result, None
        inner = inputs @ adapters.down.t()
        for columns, rank, up in adapters.additions:
            result[:, columns].addmm_(inner[:, rank], up.t())
        return result, inner

    def backward(
        self, of_outputs: Tensor, inputs: Tensor, inner: Tensor | None, adapters: "GroupAdapters"
    ) -> tuple[Tensor, list[Tensor]]:
        """∂/∂inputs, and ∂/∂A, ∂/∂(scale·B) of every adapter in turn, fp32."""
        kernels = adapters.product_kernels(inputs)
        if adapters.down is None or inner is None:
            if kernels is not None:
                return kernels.large_product(of_outputs, self.weight), []
            return of_outputs @ self.weight, []
        of_inner = torch.empty_like(inner)
        if kernels is not None:
            for columns, rank, up in adapters.additions:
                kernels.product(of_outputs[:, columns], up.t(), out=of_inner[:, rank])
            everything = ((0, inputs.shape[1], 0, len(adapters.down)),)
            of_inputs = kernels.large_product(
                of_outputs, self.weight, low_rank=LowRank(of_inner, adapters.down, everything)
            )
        else:
            for columns, rank, up in adapters.additions:
                torch.mm(of_outputs[:, columns], up, out=of_inner[:, rank])
            of_inputs = (of_outputs @ self.weight).addmm_(of_inner, adapters.down)
        of_down = _weight_gradient(of_inner, inputs)
        found = []
        for columns, rank, _ in adapters.additions:
            found += [of_down[rank], _weight_gradient(of_outputs[:, columns], inner[:, rank])]
        return of_inputs, found


def _weight_gradient(of_outputs: Tensor, inputs: Tensor) -> Tensor:
    """∂/∂W of inputs·Wᵀ in fp32, [out, in]; one of both is narrow."""
    if of_outputs.is_cuda:
        return wide_product(of_outputs.t(), inputs)
    if (kernels := product_kernels_for(inputs)) is not None:
        return kernels.gradient(of_outputs, inputs)
    # Wide products of narrow numbers are slow there.
    return (of_outputs.t() @ inputs).float()


class Addition(NamedTuple):
    """What one adapter adds to the outputs of its layers."""

    columns: slice
    """Of the outputs."""
    rank: slice
    """Its columns of the inner values."""
    up: Tensor
    """scale·B, [out, r]."""


class GroupAdapters(NamedTuple):
    """A group's adapters in the model's format, ready for its products."""

    down: Tensor | None
    """Every A, [Σ r, in]; None without an adapter."""
    ups: Tensor | None
    """Every (scale·B)ᵀ, flat; None without an adapter."""
    additions: tuple[Addition, ...]

    @property
    def parts(self) -> tuple[Part, ...]:
        """Where the additions go."""
        return tuple(
            (columns.start, columns.stop, rank.start, rank.stop)
            for columns, rank, _ in self.additions
        )

    def product_kernels(self, inputs: Tensor) -> Kernels | None:
        """Those that make the group's large products, if there are any."""
        if self.down is not None and len(self.down) > MOST_RANKS:
            return None
        return large_product_kernels_for(inputs)

    def joined(self, width: int) -> "GroupAdapters":
        """The same with one addition to all `width` columns: fewer products, though larger."""
        if self.down is None:
            return self
        ups = self.down.new_zeros(len(self.down), width)
        for columns, rank, up in self.additions:
            ups[rank, columns] = up.t()
        everything = Addition(slice(0, width), slice(0, len(ups)), ups.t())
        return self._replace(ups=ups, additions=(everything,))


_Adapters = list[tuple[slice, Adapter]]
"""Of one group: output columns, and what is added to them."""


def _prepared(groups: Sequence[_Adapters], dtype: torch.dtype) -> list[GroupAdapters]:
    """The adapters of many groups, converted at once: each alone is hardly worth its call."""
    adapters = [adapter for group in groups for _, adapter in group]
    if not adapters:
        return [GroupAdapters(None, None, ())] * len(groups)
    downs = [_room_for(group, dtype) for group in groups]
    rows = [
        part
        for group, down in zip(groups, downs, strict=True)
        if down is not None
        for part in down.split([len(adapter.a) for _, adapter in group])
    ]
    flat = [_flat_room_for(group, dtype) for group in groups]
    ups = [
        part.view(adapter.b.shape[::-1]).t()
        for group, room in zip(groups, flat, strict=True)
        if room is not None
        for part, (_, adapter) in zip(
            room.split([adapter.b.numel() for _, adapter in group]), group, strict=True
        )
    ]
    _convert(
        [*(x.a.detach() for x in adapters), *(x.b.detach() for x in adapters)],
        [*rows, *ups],
        [*(1.0 for _ in adapters), *(x.scale for x in adapters)],
    )
    left = iter(ups)
    found = []
    for group, down, room in zip(groups, downs, flat, strict=True):
        start, additions = 0, []
        for columns, adapter in group:
            rank = slice(start, start + len(adapter.a))
            additions.append(Addition(columns, rank, next(left)))
            start = rank.stop
        found.append(GroupAdapters(down, room, tuple(additions)))
    return found


def _convert(sources: list[Tensor], targets: list[Tensor], factors: list[float]) -> None:
    """Sets every target to its source times its factor."""
    kernels = kernels_for(targets[0])
    if kernels is not None and all(
        each.dtype == torch.float32 and each.is_contiguous() for each in sources
    ):
        kernels.convert(sources, targets, factors)
        return
    # What optimizers, too, call for many small tensors.
    torch._foreach_copy_(targets, torch._foreach_mul(sources, factors))  # noqa: SLF001


def _room_for(group: _Adapters, dtype: torch.dtype) -> Tensor | None:
    """For every A of a group, [Σ r, in]."""
    if not group:
        return None
    first = group[0][1].a
    rows = sum(len(adapter.a) for _, adapter in group)
    return torch.empty(rows, first.shape[1], dtype=dtype, device=first.device)


def _flat_room_for(group: _Adapters, dtype: torch.dtype) -> Tensor | None:
    """For every B of a group."""
    if not group:
        return None
    count = sum(adapter.b.numel() for _, adapter in group)
    return torch.empty(count, dtype=dtype, device=group[0][1].b.device)


def _joined(parts: Sequence[nn.Parameter]) -> Tensor:
    """The tensors below each other in one; the parameters become views of it."""
    if len(parts) == 1:
        return parts[0].detach()
    if (shared := _already_joined(parts)) is not None:
        return shared
    together = torch.cat([part.detach() for part in parts])
    for part, view in zip(parts, together.split([len(part) for part in parts]), strict=True):
        part.data = view
    return together


def _already_joined(parts: Sequence[nn.Parameter]) -> Tensor | None:
    """The one tensor that the parameters are views of, if an earlier decoder made it."""
    first = parts[0].detach()
    place = first.data_ptr()
    for part in parts:
        if (
            part.data_ptr() != place
            or part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
        ):
            return None
        place += part.numel() * part.element_size()
    rows = sum(len(part) for part in parts)
    return first.as_strided((rows, *first.shape[1:]), first.stride())


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

    @property
    def _groups(self) -> list[LinearGroup]:
        return [group for layer in self.layers for group in layer.groups]

    def embedded(self, tokens: Tensor) -> Tensor:
        """What the first layer reads, [N, H]; tokens [N]."""
        return self._embedding[tokens]

    def rotation(self, positions: Tensor) -> "Rotation":
        """Of tokens at these places, [N]."""
        cos, sin = self._rotary(self.norm, positions[None])
        first, second = sin[0, :, None].chunk(2, dim=-1)
        return Rotation(cos[0, :, None], torch.cat([-first, second], dim=-1))

    def group_adapters(self, name: str | None) -> list[list[GroupAdapters]]:
        """Of each layer's groups."""
        return self._prepared(self._adapters(name))

    def _adapters(self, name: str | None) -> list[_Adapters]:
        """Of each group."""
        return [group.adapters(name) for group in self._groups]

    def _prepared(self, adapters: list[_Adapters]) -> list[list[GroupAdapters]]:
        """Of each layer's groups."""
        prepared = iter(_prepared(adapters, self.dtype))
        return [[next(prepared) for _ in layer.groups] for layer in self.layers]

    def states(
        self,
        tokens: Tensor,
        packed: Packed,
        *,
        adapter: str | None,
        boundary: Tensor | None = None,
        collected: list[Tensor] | None = None,
    ) -> Tensor:
        """Last hidden states that are read, [num_kept, H]; tokens are the batch, [B, S].

        Differentiable in the adapter's weights where they may be trained.  `boundary` [B, S, H]
        saves the layers that no adapter touches: see `boundary`.  `collected` takes every layer's
        queries, keys and values, [N, (heads + 2·kv)·d].
        """
        adapters = self._adapters(adapter)
        parameters = [
            weight for group in adapters for _, each in group for weight in (each.a, each.b)
        ]
        is_trained = torch.is_grad_enabled() and any(p.requires_grad for p in parameters)
        work = self._work(packed, adapters, collected)
        kept: list[_Kept] | None = [] if is_trained else None
        if boundary is None:
            first, hidden = 0, self.embedded(tokens.flatten()[packed.sources])
        else:
            first, hidden = self.lowest_adapted, boundary.flatten(0, 1)[packed.sources]
        states: Tensor = _Stack.apply(work, kept, first, hidden, *parameters)  # type: ignore[no-untyped-call]
        return states[: packed.num_kept]

    @torch.no_grad()
    def boundary(self, tokens: Tensor, packed: Packed) -> Tensor:
        """What the lowest adapted layer reads, [B, S, H]; zeros where nothing was computed.

        It is the same with every adapter and before and after every pass, so once per rollout is
        enough.
        """
        work = self._work(packed, self._adapters(None), None)
        hidden = self.embedded(tokens.flatten()[packed.sources])
        for number in range(self.lowest_adapted):
            hidden = _forward_layer(work, number, hidden, None, is_last=False)
        return packed.unpacked(hidden, tokens.shape)

    def _work(
        self, packed: Packed, adapters: list[_Adapters], collected: list[Tensor] | None
    ) -> "_Work":
        return _Work(
            decoder=self,
            packed=packed,
            rotation=self.rotation(packed.positions),
            attention=attention_over(packed, self.shape, self.norm),
            adapters=self._prepared(adapters),
            scales=[each.scale for group in adapters for _, each in group],
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
    scales: list[float]
    """Of each adapter in turn."""
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
        *_parameters: Tensor,
    ) -> Tensor:
        last = len(work.decoder.layers) - 1
        for number in range(first, last + 1):
            hidden = _forward_layer(work, number, hidden, kept, is_last=number == last)
        ctx.work, ctx.kept, ctx.first, ctx.hidden = work, kept, first, hidden
        normed, ctx.inverse = rms_norm(hidden, work.decoder.norm, work.decoder.epsilon)
        return normed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        work: _Work = ctx.work
        decoder = work.decoder
        of_hidden = _norm_backward(gradients[0], ctx.hidden, decoder.norm, ctx.inverse)
        of_parameters: list[list[Tensor]] = []
        # Below the lowest adapter nothing needs a gradient.
        for number in reversed(range(decoder.lowest_adapted, len(decoder.layers))):
            of_hidden, found = _backward_layer(
                work,
                number,
                ctx.kept[number - ctx.first],
                of_hidden,
                is_last=number == len(decoder.layers) - 1,
            )
            of_parameters.append(found)
        flat = [each for found in reversed(of_parameters) for each in found]
        torch._foreach_mul_(flat[1::2], work.scales)
        return (None, None, None, None, *flat)


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
    work: _Work, number: int, kept: _Kept, of_outputs: Tensor, *, is_last: bool
) -> tuple[Tensor, list[Tensor]]:
    """∂/∂inputs, and ∂/∂A, ∂/∂B of every adapter of the layer in turn."""
    decoder, layer = work.decoder, work.decoder.layers[number]
    adapters = work.adapters[number]
    of_gated, of_down = layer.down.backward(
        of_outputs, gated(kept.gate_up), kept.inner[3], adapters[3]
    )
    of_gate_up = _gated_backward(of_gated, kept.gate_up)
    normed, inverse = rms_norm(kept.middle, layer.mlp_norm, decoder.epsilon)
    of_normed, of_gates = layer.gate_up.backward(of_gate_up, normed, kept.inner[2], adapters[2])
    of_middle = _norm_backward(of_normed, kept.middle, layer.mlp_norm, inverse, onto=of_outputs)
    result = kept.attended.result
    if is_last:
        result = result[work.packed.kept]
    of_result, of_output = layer.output.backward(of_middle, result, kept.inner[1], adapters[1])
    if is_last:
        of_middle, of_result = (_spread(each, work.packed) for each in (of_middle, of_result))
    of_qkv = work.attention.backward(kept.qkv, kept.attended, of_result)
    work.rotation.turn_back(of_qkv, decoder.shape)
    normed, inverse = rms_norm(kept.inputs, layer.attention_norm, decoder.epsilon)
    of_normed, of_projections = layer.qkv.backward(of_qkv, normed, kept.inner[0], adapters[0])
    found = [*of_projections, *of_output, *of_gates, *of_down]
    of_inputs = _norm_backward(
        of_normed, kept.inputs, layer.attention_norm, inverse, onto=of_middle
    )
    return of_inputs, found


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
