"""Kind `seq2seq`: texts made by an encoder–decoder, compared with what they should be, or read as numbers."""

from __future__ import annotations

import string
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from poemerge.suites.data import read_split
from poemerge.suites.protocol import Model, SuiteSpec
from poemerge.suites.scores import METRICS, Columns, metric_named

if TYPE_CHECKING:
    from poemerge.suites.runtime import Runtime

__all__ = ["Seq2Seq"]

_OPTIONS: dict[str, Any] = {
    "prompt": "{text}",  # with the names of columns in braces
    "target": "label",  # the column of the answer
    "answers": None,  # its text by label, as a list or a mapping; default: the column itself
    "max_tokens": 512,
    "max_new_tokens": 16,
    "numeric": False,  # read both sides as numbers, for spearman
}


class Seq2Seq:
    """Prompts with one right answer each; the answer is made greedily and compared after trimming, exactly.

    With `numeric`, both are read as numbers for Spearman's correlation; what is no number counts as 0, as in the
    evaluation of the Flan-T5 GLUE models (https://arxiv.org/abs/2406.03280).
    """

    version = 1

    def __init__(self, spec: SuiteSpec) -> None:
        self.spec = spec
        self.options = spec.options(_OPTIONS)
        name = spec.settings.metric
        self.metric = metric_named("exact_match" if name == "accuracy" else name)
        if self.metric.name == "spearman" and not self.options["numeric"]:
            raise spec.error("metric", got="spearman", expected="options.numeric: true with it", next_step="set it")

    def load(self) -> int:
        """Reads the split and puts its columns into the prompt."""
        fields = [name for _, name, _, _ in string.Formatter().parse(self.options["prompt"]) if name]
        rows = read_split(self.spec, (*fields, self.options["target"]))
        columns = [rows[name].tolist() for name in fields]
        self.prompts = [
            self.options["prompt"].format(**dict(zip(fields, values, strict=True)))
            for values in zip(*columns, strict=True)
        ]
        answers = self.options["answers"]
        if isinstance(answers, list):
            answers = dict(enumerate(answers))
        known = {str(label): text for label, text in (answers or {}).items()}
        labels = [str(label) for label in rows[self.options["target"]]]
        missing = sorted({label for label in labels if label not in known}) if known else []
        if missing:
            raise self.spec.error(
                "options.answers",
                got=f"no text for the label {missing[0]!r}",
                expected=f"one for each; there are {', '.join(known)}",
                next_step="add it",
            )
        self.answers = [known.get(label, label).strip() for label in labels]
        return len(self.prompts)

    def predict(self, model: Model, runtime: Runtime) -> Columns:
        """What the model answers to every prompt."""
        from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

        module = runtime.module(AutoModelForSeq2SeqLM, Model(model.name, model.folder, model.base))
        tokenizer = AutoTokenizer.from_pretrained(model.base)
        order = sorted(range(len(self.prompts)), key=lambda index: len(self.prompts[index]))
        found = [""] * len(order)
        with torch.inference_mode():
            for start in range(0, len(order), runtime.batch_size):
                chosen = order[start : start + runtime.batch_size]
                batch = tokenizer(
                    [self.prompts[index] for index in chosen],
                    padding=True,
                    truncation=True,
                    max_length=self.options["max_tokens"],
                    return_tensors="pt",
                ).to(runtime.device)
                with runtime.precision():
                    made = module.generate(
                        input_ids=batch["input_ids"],
                        attention_mask=batch["attention_mask"],
                        max_new_tokens=self.options["max_new_tokens"],
                        do_sample=False,
                        num_beams=1,
                    )
                for index, text in zip(chosen, tokenizer.batch_decode(made, skip_special_tokens=True), strict=True):
                    found[index] = text.strip()
                runtime.tick(len(chosen))
        columns: dict[str, Any] = {
            "target_text": np.array(self.answers, dtype=object),
            "predicted_text": np.array(found, dtype=object),
        }
        if self.options["numeric"]:
            columns["target_value"] = np.array([_number(text) for text in self.answers])
            columns["predicted_value"] = np.array([_number(text) for text in found])
        return columns

    def score(self, predictions: Columns) -> dict[str, float]:
        """exact_match, and spearman where the answers are numbers."""
        names = ["exact_match", *(["spearman"] if self.options["numeric"] else [])]
        return {name: METRICS[name](predictions) for name in names}


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return 0.0
    return value if np.isfinite(value) else 0.0
