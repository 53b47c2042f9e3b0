"""Linear layers that read the same input, with their low-rank adapters, forward and backward."""

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from ppo_engine.flat_weights import FlatWeights
from ppo_engine.native import (
    Conversion,
    GradientRoom,
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
        bias, low_rank = self.bias, adapters.low_rank
        if (kernels := adapters.product_kernels(inputs)) is not None:
            bias = None if bias is None else bias.float()
            if low_rank is not None:
                return kernels.group_forward(inputs, self.weight, low_rank, bias=bias, onto=onto)
            return kernels.large_product(inputs, self.weight.t(), bias=bias, onto=onto), None
        weight, base = self.weight.t(), bias if onto is None else onto
        result = product(inputs, weight) if base is None else torch.addmm(base, inputs, weight)
        if onto is not None and bias is not None:
            result += bias
        if low_rank is None:
            return result, None
        inner = inputs @ low_rank.down.t()
        for columns, rank, up in adapters.additions:
            result[:, columns].addmm_(inner[:, rank], up.t())
        return result, inner

    def backward(
        self,
        of_outputs: Tensor,
        inputs: Tensor,
        inner: Tensor | None,
        adapters: "GroupAdapters",
        gradients: "GroupGradients",
    ) -> Tensor:
        """∂/∂inputs; hands ∂/∂A and ∂/∂B of every adapter to `gradients`."""
        kernels, low_rank = adapters.product_kernels(inputs), adapters.low_rank
        if low_rank is None:
            if kernels is not None:
                return kernels.large_product(of_outputs, self.weight)
            return of_outputs @ self.weight
        assert inner is not None  # noqa: S101 - the forward pass made them
        if kernels is not None:
            return kernels.group_backward(
                of_outputs, inputs, inner, self.weight, low_rank, gradients.room
            )
        of_inner = torch.empty_like(inner)
        for columns, rank, up in adapters.additions:
            torch.mm(of_outputs[:, columns], up, out=of_inner[:, rank])
        of_down = _weight_gradient(of_inner, inputs)
        for columns, rank, _ in adapters.additions:
            of_up = _weight_gradient(of_outputs[:, columns], inner[:, rank])
            gradients.found += [of_down[rank], of_up]
        return (of_outputs @ self.weight).addmm_(of_inner, low_rank.down)


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


class GroupAdapters:
    """A group's adapters in the model's format, ready for its products."""

    def __init__(self, low_rank: LowRank | None) -> None:
        self.low_rank = low_rank
        """Every A, every (scale·B)ᵀ and where each adds; None without an adapter."""

    @cached_property
    def additions(self) -> tuple[Addition, ...]:
        """Of each adapter in turn."""
        if self.low_rank is None:
            return ()
        ups = self.low_rank.ups.split([part.numbers for part in self.low_rank.parts])
        return tuple(
            Addition(slice(first, end), slice(rank, end_rank), up.view(end_rank - rank, -1).t())
            for (first, end, rank, end_rank), up in zip(self.low_rank.parts, ups, strict=True)
        )

    def product_kernels(self, inputs: Tensor) -> Kernels | None:
        """Those that make the group's large products, if there are any."""
        if self.low_rank is not None and not self.low_rank.is_small:
            return None
        return large_product_kernels_for(inputs)

    def joined(self, width: int) -> "GroupAdapters":
        """The same with one addition to all `width` columns: fewer products, though larger."""
        if self.low_rank is None:
            return self
        down = self.low_rank.down
        ups = down.new_zeros(len(down), width)
        for columns, rank, up in self.additions:
            ups[rank, columns] = up.t()
        return GroupAdapters(LowRank(down, ups.flatten(), (Part(0, width, 0, len(down)),)))


NO_ADAPTERS = GroupAdapters(None)


class _Places(NamedTuple):
    """Where the gradients of a group's adapters go in the one tensor of all weights."""

    starts: Tensor
    """Where ∂/∂A and ∂/∂B of each begin, [adapters, 2]."""
    shapes: tuple[torch.Size, ...]
    """Of both of each in turn."""
    scales: Tensor
    """[adapters] fp32."""

    def views(self, together: Tensor) -> list[Tensor]:
        """∂/∂A and ∂/∂B of each in turn."""
        starts = self.starts.flatten().tolist()
        return [
            together[start : start + shape.numel()].view(shape)
            for start, shape in zip(starts, self.shapes, strict=True)
        ]


class GroupGradients:
    """∂/∂A and ∂/∂B of a group's adapters, as its backward pass hands them over."""

    def __init__(self, together: Tensor, places: _Places) -> None:
        self.places = places
        self.room = GradientRoom(together, places.starts, places.scales)
        """Where kernels put them."""
        self.found: list[Tensor] = []
        """∂/∂A and ∂/∂(scale·B) of each in turn, where no kernel has put them there."""


class AdapterGradients:
    """The gradient of all weights, of which the adapters of a set are some or all."""

    def __init__(self, weights: FlatWeights, places: Sequence[_Places]) -> None:
        adapted = sum(shape.numel() for each in places for shape in each.shapes)
        whole = weights.together
        # A backward pass sets all of the adapters', and nothing else.
        make = torch.empty if adapted == whole.numel() else torch.zeros
        self.together = make(whole.shape, dtype=torch.float32, device=whole.device)
        """[Σ numbers] fp32, laid out as `weights` are; 0 for others than the adapters'."""
        self.groups = [GroupGradients(self.together, each) for each in places]
        """In the order of the set's groups."""

    def gather(self) -> None:
        """Puts in place what no kernel did."""
        views: list[Tensor] = []
        found: list[Tensor] = []
        scales: list[float] = []
        for group in self.groups:
            if group.found:
                views += group.places.views(self.together)
                found += group.found
                scales += group.places.scales.tolist()
        if found:
            # What optimizers, too, call for many small tensors.
            torch._foreach_copy_(views, found)
            torch._foreach_mul_(views[1::2], scales)


class AdapterSet:
    """The adapters of one name in many groups, converted at once: each alone is not worth it."""

    def __init__(self, groups: Sequence[LinearGroup], name: str | None) -> None:
        found = [group.adapters(name) for group in groups]
        self._adapters = [[adapter for _, adapter in of_group] for of_group in found]
        """Of each group in turn."""
        self._parts = [_parts_of(of_group) for of_group in found]
        self._places: dict[FlatWeights, list[_Places]] = {}
        self._sizes: list[int] = []
        """Numbers in every A, and in every B, of each group in turn."""
        self._sources: list[nn.Parameter] = []
        """Every A, then every B, of each group in turn."""
        conversions = []
        for of_group in self._adapters:
            downs, ups = [x.a for x in of_group], [x.b for x in of_group]
            self._sources += [*downs, *ups]
            self._sizes += [sum(x.numel() for x in each) for each in (downs, ups)]
            conversions += [
                *(Conversion((len(x), x.shape[1]), 1.0, is_transposed=False) for x in downs),
                *(
                    Conversion((len(x.b), x.b.shape[1]), x.scale, is_transposed=True)
                    for x in of_group
                ),
            ]
        self._conversions = tuple(conversions)

    def prepared(self, dtype: torch.dtype) -> list[GroupAdapters]:
        """Of each group, as its adapters are now."""
        if not self._sources:
            return [NO_ADAPTERS] * len(self._parts)
        flat = self._sources[0].new_empty(sum(self._sizes), dtype=dtype, requires_grad=False)
        self._convert_to(flat)
        numbers = flat.split(self._sizes)
        return [
            GroupAdapters(LowRank(downs.view(parts[-1][-1], -1), ups, parts))
            if parts
            else NO_ADAPTERS
            for parts, downs, ups in zip(self._parts, numbers[::2], numbers[1::2], strict=True)
        ]

    def gradients(self, weights: FlatWeights) -> AdapterGradients:
        """Room for those of a backward pass; the adapters are among the weights."""
        if weights not in self._places:
            self._places[weights] = [_placed(each, weights) for each in self._adapters]
        return AdapterGradients(weights, self._places[weights])

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


def _placed(adapters: Sequence[Adapter], weights: FlatWeights) -> _Places:
    pairs = [(each.a, each.b) for each in adapters]
    starts = [[weights.start_of(each) for each in pair] for pair in pairs]
    return _Places(
        torch.tensor(starts, dtype=torch.int64),
        tuple(each.shape for pair in pairs for each in pair),
        torch.tensor([each.scale for each in adapters]),
    )


def _parts_of(adapters: Sequence[tuple[slice, Adapter]]) -> tuple[Part, ...]:
    """Where the additions of a group's adapters go."""
    ends = list(accumulate((len(adapter.a) for _, adapter in adapters), initial=0))
    return tuple(
        Part(columns.start, columns.stop, first, end)
        for (columns, _), first, end in zip(adapters, ends, ends[1:], strict=False)
    )


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
