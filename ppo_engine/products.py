"""Products of matrices that add up in more digits than their factors have."""

import torch
from torch import Tensor


def wide_product(left: Tensor, right: Tensor) -> Tensor:
    """The product of two matrices, summed up and given in fp32 or wider."""
    if left.is_cuda and left.dtype == right.dtype == torch.bfloat16:
        return torch.mm(left, right, out_dtype=torch.float32)
    wide = torch.promote_types(torch.promote_types(left.dtype, right.dtype), torch.float32)
    return left.to(wide) @ right.to(wide)
