"""Many trained tensors as one: an optimizer's work on each would be small beside starting it."""

from collections.abc import Mapping

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
        """[Σ numbers]; its gradient is there between `gather_gradients` and `drop_gradients`."""
        self._gradient: Tensor | None = None
        """Room that is kept: so much new memory for every pass would cost more than the work."""
        self._gradients: list[Tensor] = []
        """Its parts, parameter by parameter."""

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
        """Moves the parameters' gradients to the one tensor; where none has any, it has none."""
        found = [each.grad for each in self.parameters.values()]
        self.drop_gradients()
        if all(gradient is None for gradient in found):
            return
        if self._gradient is None:
            self._gradient = torch.empty_like(self.together, requires_grad=False)
            self._gradients = list(self.split(self._gradient).values())
        pairs = list(zip(self._gradients, found, strict=True))
        torch._foreach_copy_(  # what optimizers, too, call for many small tensors
            [part for part, gradient in pairs if gradient is not None],
            [gradient for _, gradient in pairs if gradient is not None],
        )
        for part, gradient in pairs:
            if gradient is None:
                part.zero_()
        self.together.grad = self._gradient

    def gradient_parts(self) -> tuple[Tensor, ...]:
        """Of the one tensor; a norm over each is exact enough."""
        gradient = self.together.grad
        return () if gradient is None else gradient.split(_NORM_PART)

    def drop_gradients(self) -> None:
        """Of the parameters and of the one tensor."""
        for each in (self.together, *self.parameters.values()):
            each.grad = None
