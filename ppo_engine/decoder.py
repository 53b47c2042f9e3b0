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

from ppo_engine.packing import Packed, Rectangle

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

    def forward(self, inputs: Tensor, adapters: "GroupAdapters") -> tuple[Tensor, Tensor | None]:
        """Outputs [N, Σ out] and the adapters' inner values [N, Σ r]; [N, in] in."""
        if self.bias is None:
            result = inputs @ self.weight.t()
        else:
            result = torch.addmm(self.bias, inputs, self.weight.t())
        if adapters.down is None:
            return result, None
        inner = inputs @ adapters.down.t()
        for columns, rank, up in adapters.ups:
            result[:, columns].addmm_(inner[:, rank], up.t())
        return result, inner

    def backward(
        self, of_outputs: Tensor, inputs: Tensor, inner: Tensor | None, adapters: "GroupAdapters"
    ) -> tuple[Tensor, list[Tensor]]:
        """∂/∂inputs, and ∂/∂A, ∂/∂B of every adapter in turn."""
        of_inputs = of_outputs @ self.weight
        if adapters.down is None or inner is None:
            return of_inputs, []
        of_inner = torch.cat([of_outputs[:, part] @ up for part, _, up in adapters.ups], dim=1)
        of_inputs.addmm_(of_inner, adapters.down)
        of_down = of_inner.t() @ inputs
        gradients = []
        for (part, rank, _), scale in zip(adapters.ups, adapters.scales, strict=True):
            gradients += [of_down[rank], of_outputs[:, part].t() @ inner[:, rank] * scale]
        return of_inputs, gradients


class GroupAdapters:
    """A group's adapters in the model's format, ready for its products."""

    def __init__(self, adapters: Sequence[tuple[slice, Adapter]], dtype: torch.dtype) -> None:
        self.down: Tensor | None = None
        """[Σ r, in]: every A."""
        self.ups: list[tuple[slice, slice, Tensor]] = []
        """Output columns, inner columns, and scale·B [out, r] of each."""
        self.scales = [adapter.scale for _, adapter in adapters]
        if not adapters:
            return
        self.down = torch.cat([adapter.a.detach() for _, adapter in adapters]).to(dtype)
        start = 0
        for part, adapter in adapters:
            rank = slice(start, start + len(adapter.a))
            self.ups.append((part, rank, (adapter.b.detach() * adapter.scale).to(dtype)))
            start = rank.stop


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
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = config.num_key_value_heads
        self.head_size: int = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
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

    def embedded(self, tokens: Tensor) -> Tensor:
        """What the first layer reads, [N, H]; tokens [N]."""
        return self._embedding[tokens]

    def rotation(self, positions: Tensor) -> "Rotation":
        """Of tokens at these places, [N]."""
        cos, sin = self._rotary(self.norm, positions[None])
        half = self.head_size // 2
        return Rotation(cos[0, :, None, :half], sin[0, :, None, :half])

    def group_adapters(self, name: str | None) -> list[list[GroupAdapters]]:
        """Of each layer's groups."""
        return [
            [GroupAdapters(group.adapters(name), self.dtype) for group in layer.groups]
            for layer in self.layers
        ]

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
        parameters = [
            weight
            for layer in self.layers
            for group in layer.groups
            for _, each in group.adapters(adapter)
            for weight in (each.a, each.b)
        ]
        is_trained = torch.is_grad_enabled() and any(p.requires_grad for p in parameters)
        work = self._work(packed, adapter, collected)
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
        work = self._work(packed, None, None)
        hidden = self.embedded(tokens.flatten()[packed.sources])
        for number in range(self.lowest_adapted):
            hidden = _forward_layer(work, number, hidden, None, is_last=False)
        return packed.unpacked(hidden, tokens.shape)

    def _work(self, packed: Packed, adapter: str | None, collected: list[Tensor] | None) -> "_Work":
        return _Work(
            decoder=self,
            packed=packed,
            rotation=self.rotation(packed.positions),
            spans=_spans(self, packed),
            adapters=self.group_adapters(adapter),
            collected=collected,
        )


class Rotation(NamedTuple):
    """Rotary angles of N tokens, [N, 1, d/2]."""

    cos: Tensor
    sin: Tensor

    def turn(self, heads: Tensor) -> None:
        """Rotates queries or keys [N, heads, d] in place (RoFormer, arXiv:2104.09864)."""
        first, second = heads.chunk(2, dim=-1)
        turned = first * self.cos - second * self.sin
        second.mul_(self.cos).addcmul_(first, self.sin)
        first.copy_(turned)

    def turn_back(self, gradients: Tensor) -> None:
        """The same for gradients: the transposed map."""
        Rotation(self.cos, -self.sin).turn(gradients)


class _Work(NamedTuple):
    """What one pass through the stack works with."""

    decoder: Decoder
    packed: Packed
    rotation: Rotation
    spans: list["_Span"]
    adapters: list[list[GroupAdapters]]
    collected: list[Tensor] | None


class _Kept(NamedTuple):
    """What a layer's backward pass needs of its forward pass."""

    inputs: Tensor
    qkv: Tensor
    """Rotated."""
    attended: Tensor
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
        return rms_norm(hidden, work.decoder.norm, work.decoder.epsilon)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        work: _Work = ctx.work
        decoder = work.decoder
        of_hidden = _norm_backward(gradients[0], ctx.hidden, decoder.norm, decoder.epsilon)
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
        flat = [each.float() for found in reversed(of_parameters) for each in found]
        return (None, None, None, None, *flat)


def _forward_layer(
    work: _Work, number: int, hidden: Tensor, kept: list[_Kept] | None, *, is_last: bool
) -> Tensor:
    """What the layer makes of [N, H]; of the last layer only at the kept places."""
    decoder, layer = work.decoder, work.decoder.layers[number]
    adapters = work.adapters[number]
    inputs = hidden
    normed = rms_norm(hidden, layer.attention_norm, decoder.epsilon)
    qkv, inner_qkv = layer.qkv.forward(normed, adapters[0])
    work.rotation.turn(_turned_heads(qkv, decoder))
    if work.collected is not None:
        work.collected.append(qkv)
    attended = _attend(work, qkv)
    if is_last:
        hidden, attended = hidden[work.packed.kept], attended[work.packed.kept]
    added, inner_output = layer.output.forward(attended, adapters[1])
    middle = added.add_(hidden)
    normed = rms_norm(middle, layer.mlp_norm, decoder.epsilon)
    gate_up, inner_gate_up = layer.gate_up.forward(normed, adapters[2])
    gate, up = gate_up.chunk(2, dim=1)
    added, inner_down = layer.down.forward(nn.functional.silu(gate).mul_(up), adapters[3])
    if kept is not None:
        inner = (inner_qkv, inner_output, inner_gate_up, inner_down)
        kept.append(_Kept(inputs, qkv, attended, middle, gate_up, inner))
    return added.add_(middle)


def _backward_layer(
    work: _Work, number: int, kept: _Kept, of_outputs: Tensor, *, is_last: bool
) -> tuple[Tensor, list[Tensor]]:
    """∂/∂inputs, and ∂/∂A, ∂/∂B of every adapter of the layer in turn."""
    decoder, layer = work.decoder, work.decoder.layers[number]
    adapters = work.adapters[number]
    epsilon = decoder.epsilon
    gate, up = kept.gate_up.chunk(2, dim=1)
    activated = nn.functional.silu(gate)
    of_product, of_down = layer.down.backward(
        of_outputs, activated * up, kept.inner[3], adapters[3]
    )
    of_gate_up = torch.empty_like(kept.gate_up)
    of_gate, of_up = of_gate_up.chunk(2, dim=1)
    torch.mul(of_product, activated, out=of_up)
    torch.ops.aten.silu_backward.grad_input(of_product.mul_(up), gate, grad_input=of_gate)
    normed = rms_norm(kept.middle, layer.mlp_norm, epsilon)
    of_normed, of_gates = layer.gate_up.backward(of_gate_up, normed, kept.inner[2], adapters[2])
    of_middle = _norm_backward(of_normed, kept.middle, layer.mlp_norm, epsilon).add_(of_outputs)
    of_attended, of_output = layer.output.backward(
        of_middle, kept.attended, kept.inner[1], adapters[1]
    )
    if is_last:
        of_middle, of_attended = (_spread(each, work.packed) for each in (of_middle, of_attended))
    of_qkv = _attend_backward(work, kept.qkv, of_attended)
    work.rotation.turn_back(_turned_heads(of_qkv, decoder))
    normed = rms_norm(kept.inputs, layer.attention_norm, epsilon)
    of_normed, of_projections = layer.qkv.backward(of_qkv, normed, kept.inner[0], adapters[0])
    found = [*of_projections, *of_output, *of_gates, *of_down]
    of_inputs = _norm_backward(of_normed, kept.inputs, layer.attention_norm, epsilon)
    return of_inputs.add_(of_middle), found


def _spread(values: Tensor, packed: Packed) -> Tensor:
    """Rows [n, H] at the kept places among zeros, [N, H]; filler stays out."""
    result = values.new_zeros(len(packed.sources), values.shape[1])
    result[packed.kept[: packed.num_kept]] = values[: packed.num_kept]
    return result


def rms_norm(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """The input over its root mean square, in fp32, times the weight (arXiv:1910.07467, eq. 4)."""
    wide = hidden.float()
    return (wide * _inverse_rms(wide, epsilon)).to(hidden.dtype) * weight


def _inverse_rms(wide: Tensor, epsilon: float) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return norms.square_().div_(wide.shape[-1]).add_(epsilon).rsqrt_()


def _norm_backward(of_normed: Tensor, hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """∂/∂x of `rms_norm`: r·(w·g − x·r²·mean(w·g·x))."""
    wide = hidden.float()
    inverse = _inverse_rms(wide, epsilon)
    weighted: Tensor = of_normed.float() * weight
    share: Tensor = torch.linalg.vecdot(weighted, wide)[:, None].div_(wide.shape[-1])
    weighted -= wide * (share * inverse.square())
    return weighted.mul_(inverse).to(hidden.dtype)


def _turned_heads(qkv: Tensor, decoder: Decoder) -> Tensor:
    """Queries and keys, [N, heads, d], which rotary embeddings turn; a view."""
    turned = decoder.heads + decoder.kv_heads
    return qkv[:, : turned * decoder.head_size].view(len(qkv), turned, decoder.head_size)


class _Heads(NamedTuple):
    """Queries, keys and values of one rectangle, the heads that share keys below each other."""

    queries: Tensor
    """[G·kv, rep·S, d]."""
    keys: Tensor
    """[G·kv, L+S, d]; those of the shared beginning first."""
    values: Tensor
    """[G·kv, L+S, d]."""


class _Span(NamedTuple):
    """Some rows of one length, and what they see."""

    rectangle: Rectangle
    prefix: int
    """Shared tokens before the rows' own."""
    mask: Tensor
    """[1, rep·S, L+S]; 0 where a token may look, −∞ ahead of it."""


def _spans(decoder: Decoder, packed: Packed) -> list[_Span]:
    """The shared beginning, if there is one, and every rectangle."""
    repeats = decoder.heads // decoder.kv_heads
    spans = []
    beginning = [(Rectangle(0, 1, packed.prefix), 0)] if packed.prefix else []
    for rectangle, prefix in [*beginning, *((each, packed.prefix) for each in packed.rectangles)]:
        shape = (rectangle.columns, rectangle.columns)
        ahead = decoder.norm.new_full(shape, -torch.inf).triu(diagonal=1)
        mask = nn.functional.pad(ahead, (prefix, 0)).repeat(repeats, 1)[None]
        spans.append(_Span(rectangle, prefix, mask))
    return spans


def _heads(qkv: Tensor, span: _Span, decoder: Decoder) -> _Heads:
    rectangle, prefix = span.rectangle, span.prefix
    kv, size = decoder.kv_heads, decoder.head_size
    repeats = decoder.heads // kv
    rows, columns = rectangle.rows, rectangle.columns
    own = qkv[rectangle.start : rectangle.end]
    queries, keys, values = own.split([decoder.heads * size, kv * size, kv * size], dim=1)
    queries = queries.reshape(rows, columns, kv, repeats, size).permute(0, 2, 3, 1, 4)
    widened = []
    for part, first in ((keys, decoder.heads), (values, decoder.heads + kv)):
        each = part.reshape(rows, columns, kv, size).transpose(1, 2)
        if prefix:
            shared = qkv[:prefix, first * size : (first + kv) * size]
            shared = shared.reshape(1, prefix, kv, size).transpose(1, 2)
            each = torch.cat([shared.expand(rows, -1, -1, -1), each], dim=2)
        widened.append(each.reshape(rows * kv, prefix + columns, size))
    return _Heads(queries.reshape(rows * kv, repeats * columns, size), *widened)


def _probabilities(heads: _Heads, span: _Span, decoder: Decoder) -> Tensor:
    """Attention weights, [G·kv, rep·S, L+S]."""
    scores = torch.baddbmm(
        span.mask, heads.queries, heads.keys.transpose(1, 2), alpha=decoder.head_size**-0.5
    )
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(decoder.dtype)


def _attend(work: _Work, qkv: Tensor) -> Tensor:
    """Attention's result before its output layer, [N, heads·d]."""
    decoder = work.decoder
    result = qkv.new_empty(len(qkv), decoder.heads * decoder.head_size)
    for span in work.spans:
        heads = _heads(qkv, span, decoder)
        mixed = _probabilities(heads, span, decoder) @ heads.values
        by_query = _by_query(result, span.rectangle, decoder)
        by_query.copy_(mixed.view(by_query.shape))
    return result


def _by_query(flat: Tensor, rectangle: Rectangle, decoder: Decoder) -> Tensor:
    """A rectangle of [N, heads·d] as [G, kv, rep, S, d]; a view."""
    part = flat[rectangle.start : rectangle.end].view(
        rectangle.rows, rectangle.columns, decoder.kv_heads, -1, decoder.head_size
    )
    return part.permute(0, 2, 3, 1, 4)


def _attend_backward(work: _Work, qkv: Tensor, of_attended: Tensor) -> Tensor:
    """∂/∂qkv of `_attend`; the attention weights are made again."""
    decoder = work.decoder
    kv, size = decoder.kv_heads, decoder.head_size
    result = torch.zeros_like(qkv)
    of_queries, of_keys, of_values = result.split([decoder.heads * size, kv * size, kv * size], 1)
    for span in work.spans:
        heads = _heads(qkv, span, decoder)
        weights = _probabilities(heads, span, decoder)
        of_mixed = _by_query(of_attended, span.rectangle, decoder).reshape(heads.queries.shape)
        of_weights = of_mixed @ heads.values.transpose(1, 2)
        # The public way to this fused kernel leads through autograd.
        of_scores = torch._softmax_backward_data(  # noqa: SLF001
            of_weights, weights, -1, weights.dtype
        ).mul_(size**-0.5)
        by_query = _by_query(of_queries, span.rectangle, decoder)
        by_query.copy_((of_scores @ heads.keys).view(by_query.shape))
        _add_by_key(of_keys, of_scores.transpose(1, 2) @ heads.queries, span, kv)
        _add_by_key(of_values, weights.transpose(1, 2) @ of_mixed, span, kv)
    return result


def _add_by_key(flat: Tensor, found: Tensor, span: _Span, kv_heads: int) -> None:
    """Adds gradients [G·kv, L+S, d] to a span of [N, kv·d], and to the shared beginning."""
    rectangle, prefix = span.rectangle, span.prefix
    rows, columns = rectangle.rows, rectangle.columns
    by_row = found.unflatten(0, (rows, kv_heads)).transpose(1, 2)
    own = flat[rectangle.start : rectangle.end].view(rows, columns, kv_heads, -1)
    own.add_(by_row[:, prefix:])
    if prefix:
        flat[:prefix].view(prefix, kv_heads, -1).add_(by_row[:, :prefix].sum(dim=0))
