"""What stands for the head of an expert without one: the directions of the base's features that it moved.

Fine-tuning moves features along what the task's head reads of them, for the gradient that they get is the head's
transpose times the error of the prediction. So where the head is not known, the covariance of the movement stands for
it: p_i(·|x) = N(V h_i(x), I) with VᵀV ∝ Cov(h_i − h_0), h being the last hidden states. Its divergence is
KL(p_i ‖ p_Θ) = ½‖V(h_i − h_Θ)‖², and its Fisher matrix at V h is the identity.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from poemerge.merging.inputs import of_images

__all__ = ["moved_directions", "why_no_features"]

_DIRECTIONS = 64
"""The largest of the movement, which hold 55 to 68 % of it in the zoo's full fine-tunes."""

_ROUNDING = 1e-5
"""Of the features' size: what a network in float32 may move them by without any reason."""

_GENERATORS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""Architectures whose head is in the base: what their experts say is words, and no class of the features."""


def why_no_features(config: Mapping[str, Any]) -> str | None:
    """Why the features of a base with this config.json tell nothing of an expert without a head; None where they do."""
    if of_images(config):
        return "it has no head of its own, and its inputs are images"
    named = [str(one) for one in config.get("architectures") or ()]
    if config.get("is_encoder_decoder") or any(one.endswith(_GENERATORS) for one in named):
        return "it has no head of its own, and its base is no encoder"
    return None


def moved_directions(
    before: Float[Tensor, "*row hidden"], after: Float[Tensor, "*row hidden"], divergence: float = 1.0
) -> Float[Tensor, "direction hidden"]:
    """V with VᵀV ∝ Cov(h_i − h_0), cut to its 64 largest directions.

    `before` and `after` are the features of the base and of the expert on the same inputs, float32; V is so long that
    the mean of ½‖V(h_i − h_0)‖² is the `divergence`, in nats. What moved all inputs alike tells no class from another,
    and has no direction. Raises ValueError where no more than that and rounding was moved.
    """
    movement = (after - before).flatten(0, -2)
    centred = (movement - movement.mean(0)).double()
    size, directions = torch.linalg.eigh(centred.mT @ centred / len(centred))
    if not float(size.sum()) > _ROUNDING**2 * float(before.double().square().sum(-1).mean()):
        raise ValueError("it has no head of its own, and moves no features of the base")
    size, directions = size[-_DIRECTIONS:].clamp_min(0), directions[:, -_DIRECTIONS:]
    found = (size.sqrt() * directions).mT
    told = float((movement.double() @ found.mT).square().sum(-1).mean())
    whole: Tensor = found * (2 * divergence / told) ** 0.5
    return whole.float()
