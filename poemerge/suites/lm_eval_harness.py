"""Kind `lm-eval`: a task of EleutherAI's language model evaluation harness, one of its own or a local task file."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import lm_eval
import numpy as np
from lm_eval.tasks import TaskManager

from poemerge.suites.protocol import Model, SuiteSpec
from poemerge.suites.scores import METRICS, Columns, Metric, metric_named

if TYPE_CHECKING:
    from poemerge.suites.runtime import Runtime

__all__ = ["LmEvalHarness"]

_OPTIONS: dict[str, Any] = {
    "task": None,  # the harness's name of the task; default: the suite's own name
    "num_fewshot": None,  # default: what the task says
    "tokens": None,  # of the model's context; default: what the model takes
}


class LmEvalHarness:
    """One task; `metric` is the harness's name of it (acc, acc_norm, exact_match, word_perplexity …).

    With `data`, task files (*.yaml) in that folder are known too, and paths in them are relative to it. Every example's
    own value of the metric is kept, so methods are compared in pairs; a metric that is no mean over examples is
    refused, but for perplexities.
    """

    version = 1

    def __init__(self, spec: SuiteSpec) -> None:
        self.spec = spec
        self.options = spec.options(_OPTIONS)
        self.task = self.options["task"] or spec.name
        self.asked = "acc" if spec.settings.metric == "accuracy" else spec.settings.metric
        self.metric: Metric = metric_named(f"value:{self.asked}")

    def load(self) -> int:
        """Finds the task and counts its examples."""
        with self._here():
            self.manager = TaskManager(include_path=str(self.spec.data) if self.spec.data is not None else None)
            if self.task not in self.manager.all_tasks:
                raise self.spec.error(
                    "options.task",
                    got=repr(self.task),
                    expected="a task of the harness (`lm-eval ls tasks`), or a task file in `data`",
                    next_step="mend the name",
                )
            self.loaded = self.manager.load([self.task])["tasks"][self.task]
            names = self.loaded.higher_is_better()
            if self.asked not in names:
                raise self.spec.error(
                    "metric", got=self.asked, expected=f"one of {', '.join(names)}", next_step="mend `metric`"
                )
            kind = "value" if names[self.asked] else "loss"
            self.metric = METRICS["perplexity"] if "perplexity" in self.asked else metric_named(f"{kind}:{self.asked}")
            limit = self.spec.settings.max_examples
            count = len(self.loaded.eval_docs)
        return min(count, limit) if limit is not None else count

    def data_digest(self) -> str:
        """Of the task's settings and documents, so that a task that the harness changes is scored again."""
        with self._here():
            documents = "".join(repr(document) for document in self.loaded.eval_docs)
        text = f"{self.loaded.config.to_dict()!r}{documents}"
        return hashlib.sha256(text.encode()).hexdigest()

    def predict(self, model: Model, runtime: Runtime) -> Columns:
        """Each example's value of the metric."""
        from lm_eval.models.huggingface import HFLM
        from transformers import AutoModelForCausalLM, AutoTokenizer

        module = runtime.module(AutoModelForCausalLM, Model(model.name, model.folder, model.base))
        tokenizer = AutoTokenizer.from_pretrained(model.base)
        language_model = HFLM(
            pretrained=module,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=runtime.batch_size,
            max_length=self.options["tokens"],
        )
        with self._here(), runtime.precision():
            results = lm_eval.simple_evaluate(
                language_model,
                tasks=[self.task],
                task_manager=self.manager,
                num_fewshot=self.options["num_fewshot"],
                limit=self.spec.settings.max_examples,
                bootstrap_iters=0,  # intervals are ours
                log_samples=True,
            )
        assert results is not None
        samples = results["samples"][self.task]
        first = samples[0]["filter"]
        chosen = sorted((s for s in samples if s["filter"] == first), key=lambda sample: sample["doc_id"])
        values = [sample[self.asked] for sample in chosen]
        runtime.tick(len(values))
        if self.metric.name == "perplexity":
            pairs = np.array(values, dtype=np.float64)
            return {"nll": -pairs[:, 0], "tokens": pairs[:, 1]}
        if not all(isinstance(value, bool | int | float) for value in values):
            raise self.spec.error(
                "metric",
                got=f"{self.asked}, which is no number for each example",
                expected="a metric that is a mean over examples",
                next_step="choose another metric of the task",
            )
        return {"value": np.array(values, dtype=np.float64)}

    def score(self, predictions: Columns) -> dict[str, float]:
        """The metric."""
        return {self.metric.name: self.metric(predictions)}

    @contextlib.contextmanager
    def _here(self) -> Iterator[None]:
        """Inside the data's folder, so that task files find what lies beside them."""
        with contextlib.chdir(self.spec.data) if self.spec.data is not None else contextlib.nullcontext():
            yield
