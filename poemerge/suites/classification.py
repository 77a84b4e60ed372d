"""What text and image classification share: a linear head, predictions from logits, and their scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from poemerge.suites.protocol import SuiteSpec
from poemerge.suites.scores import METRICS, Columns, expected_calibration_error

__all__ = ["Head", "check_head", "columns_of", "scores_of"]


@dataclass(frozen=True)
class Head:
    """logits = weight · embedding + bias; `weight [class, hidden]`, `bias [class]` or None, both float32."""

    weight: Tensor
    bias: Tensor | None = None

    @staticmethod
    def among(private: Mapping[str, Tensor]) -> Head | None:
        """The head `head.weight` (and `head.bias`) among a task's private parameters, or None."""
        if "head.weight" not in private:
            return None
        bias = private.get("head.bias")
        return Head(private["head.weight"].float(), None if bias is None else bias.float())

    def to(self, device: torch.device) -> Head:
        """This head on `device`."""
        return Head(self.weight.to(device), None if self.bias is None else self.bias.to(device))

    def __call__(self, embedding: Tensor) -> Tensor:
        return torch.nn.functional.linear(embedding.float(), self.weight, self.bias)


def check_head(spec: SuiteSpec, classes: int, target: Any) -> None:
    """Raises SuiteError when the examples hold a label beyond the `classes` of the head."""
    if int(target.max()) >= classes:
        raise spec.error(
            "head",
            got=f"{classes} classes",
            expected=f"at least {int(target.max()) + 1}, as the labels need",
            next_step="check that the head belongs to this data",
        )


def columns_of(logits: Tensor, target: Any) -> Columns:
    """Predictions from `logits [example, class]`: target, predicted class, confidence, nll of the target."""
    log_share = torch.log_softmax(logits.double(), dim=-1)
    confidence, predicted = log_share.max(dim=-1)
    nll = -log_share.gather(1, torch.as_tensor(target)[:, None].to(logits.device))[:, 0]
    return {
        "target": np.asarray(target, dtype=np.int64),
        "predicted": predicted.cpu().numpy(),
        "confidence": confidence.exp().cpu().numpy(),
        "nll": nll.cpu().numpy(),
    }


def scores_of(predictions: Columns) -> dict[str, float]:
    """accuracy, macro_f1, nll and ece of classification."""
    right = np.asarray(predictions["target"] == predictions["predicted"])
    scores = {name: METRICS[name](predictions) for name in ("accuracy", "macro_f1", "nll")}
    return scores | {"ece": expected_calibration_error(predictions["confidence"], right)}
