"""Kind `text-classification`: an encoder with pooling and a linear head, or a sequence classifier of transformers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from poemerge.checkpoints.names import classes_of
from poemerge.suites.classification import Head, check_head, columns_of, scores_of
from poemerge.suites.data import class_indices, description, read_split
from poemerge.suites.protocol import Model, SuiteSpec
from poemerge.suites.runtime import private_tensors
from poemerge.suites.scores import Columns, metric_named

if TYPE_CHECKING:
    from pathlib import Path

    from poemerge.suites.runtime import Runtime

__all__ = ["TextClassification"]

_OPTIONS: dict[str, Any] = {
    "text": "text",  # the column of the text, or two columns of a pair
    "label": "label",
    "max_tokens": None,  # default: what labels.json says, else what the model takes
    "pooling": None,  # mean or cls; default: what labels.json says, else mean
    "normalize": None,  # default: what labels.json says, else true
}


class TextClassification:
    """Texts with one label each. Where the task's private parameters hold `head.weight`, the model is an encoder:

    logits = head.weight · embedding + head.bias, embedding = the mean of the last hidden states over the tokens that
    are not padding (or the first token's, `pooling: cls`), of unit length unless `normalize: false`. Otherwise it is
    the sequence classifier that the expert's config.json names, with the private parameters (classifier.*) put in.
    """

    version = 1

    def __init__(self, spec: SuiteSpec) -> None:
        self.spec = spec
        self.options = spec.options(_OPTIONS)
        self.metric = metric_named(spec.settings.metric)

    def load(self) -> int:
        """Reads the split, its labels and labels.json."""
        about = description(self.spec)
        for name, default in (("max_tokens", None), ("pooling", "mean"), ("normalize", True)):
            if self.options[name] is None:
                self.options[name] = about.get(name, default)
        if self.options["pooling"] not in ("mean", "cls"):
            raise self.spec.error(
                "options.pooling", got=repr(self.options["pooling"]), expected="mean or cls", next_step="mend it"
            )
        text = self.options["text"]
        columns = [text] if isinstance(text, str) else list(text)
        rows = read_split(self.spec, (*columns, self.options["label"]))
        self.texts: list[tuple[str, ...]] = list(rows[columns].astype(str).itertuples(index=False, name=None))
        self.target = class_indices(self.spec, rows[self.options["label"]].tolist(), about.get("labels", []))
        self._tokens: tuple[Path, dict[str, list[list[int]]], dict[str, int]] | None = None
        return len(self.texts)

    def predict(self, model: Model, runtime: Runtime) -> Columns:
        """Target, predicted class, confidence and nll of every text."""
        return columns_of(self.logits(model, runtime), self.target)

    def logits(self, model: Model, runtime: Runtime) -> Tensor:
        """`[example, class]`, computed in batches of like length."""
        from transformers import AutoModel, AutoModelForSequenceClassification

        private = private_tensors(model)
        head = Head.among(private)
        if head is not None:
            check_head(self.spec, len(head.weight), self.target)
            # The expert's own config may name a classifier; the encoder is what the base is.
            encoder = Model(model.name, model.folder, model.base)
            module, head = runtime.module(AutoModel, encoder), head.to(runtime.device)
        else:
            module = runtime.module(AutoModelForSequenceClassification, model, private, **classes_of(private))
            check_head(self.spec, module.config.num_labels, self.target)
        inputs, padding = self._tokenised(model.base, module.config)
        if module.config.pad_token_id is None:
            module.config.pad_token_id = padding["input_ids"]  # decoders find their last token by it
        order = sorted(range(len(self.texts)), key=lambda index: len(inputs["input_ids"][index]))
        found = []
        with torch.inference_mode():
            for batch in self._batches(inputs, order, padding, runtime):
                with runtime.precision():
                    out = module(**batch)
                logits = out.logits if head is None else head(self._embedding(out, batch["attention_mask"]))
                found.append(logits.float().cpu())
                runtime.tick(len(logits))
        logits = torch.cat(found)
        return logits[torch.argsort(torch.tensor(order))]

    def score(self, predictions: Columns) -> dict[str, float]:
        """accuracy, macro_f1, nll, ece."""
        return scores_of(predictions)

    def _embedding(self, out: Any, mask: Tensor) -> Tensor:
        states = out.last_hidden_state.float()
        if self.options["pooling"] == "cls":
            pooled = states[:, 0]
        else:
            keep = mask.unsqueeze(-1).to(states.dtype)
            pooled = (states * keep).sum(1) / keep.sum(1)
        return torch.nn.functional.normalize(pooled, dim=-1) if self.options["normalize"] else pooled

    def _tokenised(self, base: Path, config: Any) -> tuple[dict[str, list[list[int]]], dict[str, int]]:
        """The inputs for every text by the base's tokenizer, made once for all models; and each input's padding."""
        if self._tokens is None or self._tokens[0] != base:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(base)
            places = getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length
            limit = self.options["max_tokens"] or min(places, tokenizer.model_max_length)
            sides = [list(side) for side in zip(*self.texts, strict=True)]
            inputs = dict(tokenizer(*sides, truncation=True, max_length=int(limit)))
            padding = dict.fromkeys(inputs, 0) | {"input_ids": tokenizer.pad_token_id or 0}
            self._tokens = (base, inputs, padding)
        return self._tokens[1], self._tokens[2]

    def _batches(
        self, inputs: dict[str, list[list[int]]], order: list[int], padding: dict[str, int], runtime: Runtime
    ) -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(order), runtime.batch_size):
            chosen = order[start : start + runtime.batch_size]
            longest = max(len(inputs["input_ids"][index]) for index in chosen)
            batch = {}
            for name, rows in inputs.items():
                padded = [rows[index] + [padding[name]] * (longest - len(rows[index])) for index in chosen]
                batch[name] = torch.tensor(padded).to(runtime.device)
            yield batch
