"""Kind `perplexity`: how well a causal language model predicts texts, token by token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from poemerge.suites.data import read_split
from poemerge.suites.protocol import Model, SuiteSpec
from poemerge.suites.scores import METRICS, Columns, metric_named

if TYPE_CHECKING:
    from poemerge.suites.runtime import Runtime

__all__ = ["Perplexity"]

_OPTIONS: dict[str, Any] = {
    "text": "text",
    "max_tokens": None,  # the window; default: what the model takes, at most 2048
    "stride": None,  # how far the window moves; default: half of it
}


class Perplexity:
    """exp(Σ −log p(token | those before it in the window) / number of tokens), over all texts; lower is better.

    A text longer than the window is read by windows that overlap, and each token is scored once, with at least
    `max_tokens − stride` tokens before it from the second window on. The first token of a text is not scored.
    """

    version = 1

    def __init__(self, spec: SuiteSpec) -> None:
        self.spec = spec
        self.options = spec.options(_OPTIONS)
        self.metric = metric_named("perplexity" if spec.settings.metric == "accuracy" else spec.settings.metric)

    def load(self) -> int:
        """Reads the texts."""
        rows = read_split(self.spec, (self.options["text"],))
        self.texts = rows[self.options["text"]].astype(str).tolist()
        return len(self.texts)

    def predict(self, model: Model, runtime: Runtime) -> Columns:
        """Negative log-likelihood in nats and number of scored tokens of each text."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        module = runtime.module(AutoModelForCausalLM, Model(model.name, model.folder, model.base))
        tokenizer = AutoTokenizer.from_pretrained(model.base)
        places = getattr(module.config, "max_position_embeddings", None) or 2048
        window = int(self.options["max_tokens"] or min(places, 2048))
        stride = int(self.options["stride"] or max(window // 2, 1))
        nll, tokens = [], []
        with torch.inference_mode():
            for text in self.texts:
                ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long)
                if len(ids) < 2:
                    raise self.spec.error(
                        "text",
                        got=f"{text[:40]!r}, which has {len(ids)} tokens",
                        expected="texts of at least two tokens",
                        next_step="take it out of the data",
                    )
                nll.append(_nll(module, ids.to(runtime.device), window, stride, runtime))
                tokens.append(len(ids) - 1)
                runtime.tick(1)
        return {"nll": np.array(nll), "tokens": np.array(tokens, dtype=np.int64)}

    def score(self, predictions: Columns) -> dict[str, float]:
        """perplexity, and nll: the mean over the texts."""
        return {name: METRICS[name](predictions) for name in ("perplexity", "nll")}


def _nll(module: Any, ids: Tensor, window: int, stride: int, runtime: Runtime) -> float:
    """Σ −log p over all tokens of `ids [token]` but the first."""
    total, scored = 0.0, 1
    for start in range(0, len(ids), stride):
        piece = ids[start : start + window]
        with runtime.precision():
            logits = module(input_ids=piece[None]).logits[0]
        losses = torch.nn.functional.cross_entropy(logits[:-1].float(), piece[1:], reduction="none")
        new = losses[scored - start - 1 :]  # those whose token no window before has scored
        total += float(new.double().sum())
        scored = start + len(piece)
        if scored == len(ids):
            break
    return total
