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
    MOST_RANKS,
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
        """∂/∂inputs; leaves ∂/∂A and ∂/∂B of every adapter in `gradients`."""
        kernels, low_rank = adapters.product_kernels(inputs), adapters.low_rank
        if low_rank is None or inner is None:
            if kernels is not None:
                return kernels.large_product(of_outputs, self.weight)
            return of_outputs @ self.weight
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
            gradients.elsewhere.extend((of_down[rank], of_up))
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
        ups = self.low_rank.ups.split([_numbers(part) for part in self.low_rank.parts])
        return tuple(
            Addition(slice(first, end), slice(rank, end_rank), up.view(end_rank - rank, -1).t())
            for (first, end, rank, end_rank), up in zip(self.low_rank.parts, ups, strict=True)
        )

    def product_kernels(self, inputs: Tensor) -> Kernels | None:
        """Those that make the group's large products, if there are any."""
        if self.low_rank is not None and len(self.low_rank.down) > MOST_RANKS:
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
        return GroupAdapters(LowRank(down, ups.flatten(), ((0, width, 0, len(down)),)))


def _numbers(part: Part) -> int:
    """In the part's B."""
    first, end, first_rank, end_rank = part
    return (end - first) * (end_rank - first_rank)


NO_ADAPTERS = GroupAdapters(None)


class GroupGradients(NamedTuple):
    """Where a group's backward pass leaves ∂/∂A and ∂/∂B of its adapters."""

    room: GradientRoom
    """For kernels, which put them in place."""
    elsewhere: list[Tensor]
    """∂/∂A and ∂/∂(scale·B) of each adapter in turn, where they are found otherwise."""


class _Places(NamedTuple):
    """Where the adapters' gradients go, in one tensor."""

    size: int
    """Numbers in the tensor."""
    starts: tuple[int, ...]
    """Where each begins: A and B of every adapter in turn."""
    by_group: tuple[Tensor, ...]
    """The same of each group, [adapters, 2]."""


class AdapterGradients:
    """∂/∂A and ∂/∂B of all adapters of a set, in one tensor: what a backward pass fills."""

    def __init__(
        self, parameters: Sequence[Tensor], places: _Places, scales: Sequence[Tensor]
    ) -> None:
        """`scales`: those of each group's adapters."""
        self._parameters, self._places, self._scales = parameters, places, scales
        covered = sum(each.numel() for each in parameters)
        make = torch.empty if covered == places.size else torch.zeros
        self.together = make(places.size, device=parameters[0].device)
        """[Σ numbers] fp32."""
        self.groups = [
            GroupGradients(GradientRoom(self.together, of_group, factors), [])
            for of_group, factors in zip(places.by_group, scales, strict=True)
        ]
        """In the order of the set's groups."""

    def views(self) -> list[Tensor]:
        """Of A and B of every adapter in turn, in their shapes."""
        return [
            self.together[start : start + each.numel()].view(each.shape)
            for each, start in zip(self._parameters, self._places.starts, strict=True)
        ]

    def gather(self) -> None:
        """Puts those that were found elsewhere in place; once."""
        found = [each for group in self.groups for each in group.elsewhere]
        if not found:
            return
        # What optimizers, too, call for many small tensors.
        views, scales = self.views(), torch.cat(list(self._scales)).tolist()
        torch._foreach_copy_(views, found)
        torch._foreach_mul_(views[1::2], scales)


class AdapterSet:
    """The adapters of one name in many groups, converted at once: each alone is not worth it."""

    def __init__(self, groups: Sequence[LinearGroup], name: str | None) -> None:
        found = [group.adapters(name) for group in groups]
        self.parameters = [weight for group in found for _, x in group for weight in (x.a, x.b)]
        """A and B of every adapter in turn."""
        self._parts = [_parts_of(of_group) for of_group in found]
        self._scales = [torch.tensor([x.scale for _, x in of_group]) for of_group in found]
        self._places: dict[FlatWeights | None, _Places] = {}
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

    def gradients(self, weights: FlatWeights | None) -> AdapterGradients:
        """Room for them: laid out like the one tensor of the weights, or one after the other."""
        if weights not in self._places:
            self._places[weights] = self._placed(weights)
        return AdapterGradients(self.parameters, self._places[weights], self._scales)

    def _placed(self, weights: FlatWeights | None) -> _Places:
        if weights is None:
            *starts, size = accumulate((x.numel() for x in self.parameters), initial=0)
        else:
            starts = [weights.start_of(each) for each in self.parameters]
            size = weights.together.numel()
        pairs = torch.tensor(starts).view(-1, 2)
        by_group = pairs.split([len(parts) for parts in self._parts])
        return _Places(size, tuple(starts), tuple(each.contiguous() for each in by_group))

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


def _parts_of(adapters: Sequence[tuple[slice, Adapter]]) -> tuple[Part, ...]:
    """Where the additions of a group's adapters go."""
    ends = list(accumulate((len(adapter.a) for _, adapter in adapters), initial=0))
    return tuple(
        (columns.start, columns.stop, first, end)
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
