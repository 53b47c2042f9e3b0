"""Many trained tensors as one: an optimizer's work on each would be small beside starting it."""

from collections.abc import Mapping
from itertools import accumulate

import torch
from torch import Tensor, nn

_NORM_PART = 65_536
"""Numbers whose squares are summed up at once: with millions the norm is 2e-4 too small."""


class FlatWeights:
    """Parameters that lie one after the other in one tensor, which an optimizer may train."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """They become views of the tensor; fp32, and at least one."""
        self.parameters = dict(parameters)
        together = torch.cat([each.detach().flatten() for each in self.parameters.values()])
        for name, view in self.split(together).items():
            self.parameters[name].data = view
        self.together = nn.Parameter(together)
        """[Σ numbers]; its gradient is whole between `gather_gradients` and `drop_gradients`."""
        sizes = (each.numel() for each in self.parameters.values())
        starts = accumulate(sizes, initial=0)
        self._starts = dict(zip(self.parameters.values(), starts, strict=False))

    def start_of(self, parameter: nn.Parameter) -> int:
        """Number of the parameter's first number in the one tensor."""
        return self._starts[parameter]

    @property
    def is_trainable(self) -> bool:
        """Whether all of them may be trained; they are together or not at all."""
        return all(each.requires_grad for each in self.parameters.values())

    def gradients_of(self, total: Tensor) -> dict[str, Tensor]:
        """∂total/∂parameter by name, 0 where it depends on none; the graph stays.

        All must require gradients.  What a graph knows is each parameter, or the one tensor: see
        `Decoder.states`.
        """
        together, *apart = torch.autograd.grad(
            total,
            [self.together, *self.parameters.values()],
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        pairs = zip(self.split(together).items(), apart, strict=True)
        return {name: each + other for (name, each), other in pairs}

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Views of numbers laid out like the weights, in the parameters' shapes, by name."""
        sizes = [each.numel() for each in self.parameters.values()]
        parts = zip(self.parameters.items(), flat.split(sizes), strict=True)
        return {name: part.view(each.shape) for (name, each), part in parts}

    def joined(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """What `split` gives such views of."""
        parts = [tensors[name].flatten() for name in self.parameters]
        return torch.cat(parts).to(self.together.device)

    def gather_gradients(self) -> None:
        """Moves the parameters' gradients to the one tensor, onto what it has already."""
        found = {name: each.grad for name, each in self.parameters.items() if each.grad is not None}
        if not found:
            return
        gathered = self.together.grad
        if gathered is None:
            self.together.grad = gathered = torch.zeros_like(self.together)
        views = self.split(gathered)
        # What optimizers, too, call for many small tensors.
        torch._foreach_add_([views[name] for name in found], list(found.values()))
        for each in self.parameters.values():
            each.grad = None

    def gradient_parts(self) -> tuple[Tensor, ...]:
        """Of the one tensor; a norm over each is exact enough."""
        gradient = self.together.grad
        return () if gradient is None else gradient.split(_NORM_PART)

    def drop_gradients(self) -> None:
        """Of the parameters and of the one tensor."""
        for each in (self.together, *self.parameters.values()):
            each.grad = None
