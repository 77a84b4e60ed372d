"""What storing weights in few digits adds to a task vector."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["rounding_edge"]

_NARROW = (torch.bfloat16, torch.float16)
# A finite matrix of noise goes a little beyond the edge of an infinite one.
_ABOVE = 1.1


def rounding_edge(weights: Float[Tensor, "*batch out in"]) -> Float[Tensor, "*batch"]:
    """1.1 s(√out + √in), just above all singular values of noise with the variance s² of the weights' rounding.

    An entry v of a checkpoint in bfloat16 or float16 is off by up to half of the distance u(v) to its neighbour, so s²
    is the mean of u(v)²/12 (the edge is Marchenko and Pastur's). Arguments: `weights` float32, fine-tuned and not minus
    the base; those that a narrower type holds exactly count as stored in it. Float64; 0 for weights in full precision.
    """
    flat = [_variance(one) for one in weights.reshape(-1, *weights.shape[-2:])]
    rows, columns = weights.shape[-2:]
    deviation = torch.stack(flat).reshape(weights.shape[:-2]).sqrt()
    return _ABOVE * deviation * (math.sqrt(rows) + math.sqrt(columns))


def _variance(weights: Float[Tensor, "out in"]) -> Float[Tensor, ""]:
    for dtype in _NARROW:
        if bool((weights.to(dtype).to(weights.dtype) == weights).all()):
            exponent = torch.frexp(weights).exponent
            apart = torch.where(weights == 0, 0.0, torch.exp2(exponent.double() - 1)) * torch.finfo(dtype).eps
            return apart.square().mean() / 12
    return torch.zeros((), dtype=torch.float64, device=weights.device)
