"""Linear layers that read the same input, with their low-rank adapters, forward and backward."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from ppo_engine.native import (
    MOST_RANKS,
    Conversion,
    Kernels,
    LowRank,
    Part,
    kernels_for,
    large_product_kernels_for,
    product_kernels_for,
)
from ppo_engine.products import product, wide_product


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
    parts: tuple[Part, ...]
    """Where the additions go."""

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
        return GroupAdapters(self.down, ups, (everything,), ((0, width, 0, len(ups)),))


NO_ADAPTERS = GroupAdapters(None, None, (), ())


class _Place(NamedTuple):
    """What is known of a group's adapters before their numbers are."""

    parts: tuple[Part, ...]
    sizes: tuple[int, ...]
    """Numbers in each B."""

    @classmethod
    def of(cls, adapters: Sequence[tuple[slice, Adapter]]) -> "_Place":
        parts, rank = [], 0
        for columns, adapter in adapters:
            end = rank + len(adapter.a)
            parts.append((columns.start, columns.stop, rank, end))
            rank = end
        return cls(tuple(parts), tuple(adapter.b.numel() for _, adapter in adapters))

    def adapters(self, downs: Tensor, ups: Tensor) -> GroupAdapters:
        """Of every A and every (scale·B)ᵀ, flat."""
        if not self.parts:
            return NO_ADAPTERS
        additions = [
            Addition(slice(first, end), slice(rank, end_rank), up.view(end_rank - rank, -1).t())
            for (first, end, rank, end_rank), up in zip(
                self.parts, ups.split(self.sizes), strict=True
            )
        ]
        return GroupAdapters(downs.view(self.parts[-1][-1], -1), ups, tuple(additions), self.parts)


class AdapterSet:
    """The adapters of one name in many groups, converted at once: each alone is not worth it."""

    def __init__(self, groups: Sequence[LinearGroup], name: str | None) -> None:
        found = [group.adapters(name) for group in groups]
        adapters = [adapter for of_group in found for _, adapter in of_group]
        self.parameters = [weight for each in adapters for weight in (each.a, each.b)]
        """A and B of every adapter in turn."""
        self.scales = [each.scale for each in adapters]
        """Of every adapter in turn."""
        self._places = [_Place.of(of_group) for of_group in found]
        self._sizes: list[int] = []
        """Numbers in every A, and in every B, of each group in turn."""
        self._sources: list[nn.Parameter] = []
        """Every A, then every B, of each group in turn."""
        conversions = []
        for of_group in found:
            downs, ups = [x.a for _, x in of_group], [x.b for _, x in of_group]
            self._sources += [*downs, *ups]
            self._sizes += [sum(x.numel() for x in each) for each in (downs, ups)]
            conversions += [
                *(Conversion((len(x), x.shape[1]), 1.0, is_transposed=False) for x in downs),
                *(
                    Conversion((len(x.b), x.b.shape[1]), x.scale, is_transposed=True)
                    for _, x in of_group
                ),
            ]
        self._conversions = tuple(conversions)

    def prepared(self, dtype: torch.dtype) -> list[GroupAdapters]:
        """Of each group, as its adapters are now."""
        if not self._sources:
            return [NO_ADAPTERS] * len(self._places)
        flat = self._sources[0].new_empty(sum(self._sizes), dtype=dtype, requires_grad=False)
        self._convert_to(flat)
        parts = flat.split(self._sizes)
        return [
            place.adapters(downs, ups)
            for place, downs, ups in zip(self._places, parts[::2], parts[1::2], strict=True)
        ]

    def _convert_to(self, flat: Tensor) -> None:
        """Sets it to every A and every (scale·B)ᵀ of each group in turn."""
        kernels = kernels_for(flat)
        if kernels is not None and all(
            each.dtype == torch.float32 and each.is_contiguous() for each in self._sources
        ):
            kernels.convert(self._sources, self._conversions, flat)
            return
        sources = [each.detach() for each in self._sources]
        # What optimizers, too, call for many small tensors.
        targets = [
            room.view(x.shape[::-1]).t() if conversion.is_transposed else room.view(x.shape)
            for x, conversion, room in zip(
                sources,
                self._conversions,
                flat.split([x.numel() for x in sources]),
                strict=True,
            )
        ]
        factors = [each.factor for each in self._conversions]
        torch._foreach_copy_(targets, torch._foreach_mul(sources, factors))  # noqa: SLF001


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
