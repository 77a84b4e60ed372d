"""The served model: merged backbone and one head a task, read by mlflow from the registered version.

This file travels with the version (models from code). It needs mlflow, pandas, torch, transformers and safetensors,
and nothing of poemerge, so that whoever consumes the model does not install what made it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import torch
from mlflow.pyfunc import PythonModel
from safetensors.torch import load_file

BATCH = 32


class MergedModel(PythonModel):  # type: ignore[misc]
    """Answers for the task that `params={"task": NAME}` names.

    A head is either `head.weight [class, hidden]` (and `head.bias`) over the mean of the token states, of unit
    length, or the classifier of the architecture's own sequence classification model.
    """

    def load_context(self, context: Any) -> None:
        """Reads what tasks there are; the backbone is loaded at the first question."""
        self.folder = Path(context.artifacts["merged"])
        tasks = json.loads(Path(context.artifacts["tasks"]).read_text(encoding="utf-8"))
        self.tasks: dict[str, dict[str, Any]] = tasks
        self.device = os.environ.get("POEMERGE_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
        self.loaded: dict[str, Any] = {}

    def predict(
        self,
        context: Any,  # noqa: ARG002 - mlflow finds it by this name
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,
    ) -> pd.DataFrame:
        """A row a text: `label` (its name, or the class number as text) and `score`, the softmax of the largest
        logit.

        Arguments: `model_input`, a list of texts, or a DataFrame with a column `text` (or with one column);
        `params`, {"task": NAME}, which may be left out where there is one task.
        Raises ValueError naming the tasks there are.
        """
        task = self._task((params or {}).get("task") or "")
        texts = self._texts(model_input)
        rows: list[tuple[str, float]] = [("", 0.0)] * len(texts)
        labels = self.tasks[task].get("labels")
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            scores, classes = self._logits(task, [texts[i] for i in chosen]).float().softmax(-1).max(-1)
            for index, score, label in zip(chosen, scores.tolist(), classes.tolist(), strict=True):
                rows[index] = (labels[label] if labels else str(label), score)
        return pd.DataFrame(rows, columns=["label", "score"])

    def _task(self, name: str) -> str:
        if not name and len(self.tasks) == 1:
            return next(iter(self.tasks))
        if name not in self.tasks:
            raise ValueError(f'params={{"task": NAME}} got {name!r}; this model has: {", ".join(sorted(self.tasks))}')
        return name

    @staticmethod
    def _texts(model_input: Any) -> list[str]:
        if isinstance(model_input, pd.DataFrame):
            column = "text" if "text" in model_input.columns else model_input.columns[0]
            model_input = model_input[column].tolist()
        return [str(text) for text in ([model_input] if isinstance(model_input, str) else model_input)]

    @torch.inference_mode()
    def _logits(self, task: str, texts: list[str]) -> torch.Tensor:
        """`[text, class]`"""
        about = self.tasks[task]
        tokenizer = self._once("tokenizer", self._tokenizer)
        module, head = self._once(f"module of {task}", lambda: self._module(task))
        places = getattr(module.config, "max_position_embeddings", None) or tokenizer.model_max_length
        limit = about.get("max_tokens") or min(places, tokenizer.model_max_length)
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=int(limit), return_tensors="pt").to(
            self.device
        )
        out = module(**tokens)
        if not head:
            logits: torch.Tensor = out.logits
            return logits
        states = out.last_hidden_state.float()
        if about.get("pooling", "mean") == "cls":
            vectors = states[:, 0]
        else:
            keep = tokens["attention_mask"].unsqueeze(-1).to(states.dtype)
            vectors = (states * keep).sum(1) / keep.sum(1)
        if about.get("normalize", True):
            vectors = torch.nn.functional.normalize(vectors, dim=-1)
        return torch.nn.functional.linear(vectors, head["head.weight"], head.get("head.bias"))

    def _once(self, name: str, make: Any) -> Any:
        if name not in self.loaded:
            self.loaded[name] = make()
        return self.loaded[name]

    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder)

    def _module(self, task: str) -> tuple[Any, dict[str, torch.Tensor]]:
        """The network that answers for `task`, and its head: {} where the head is part of the network."""
        file = self.folder / "heads" / f"{self.tasks[task].get('head') or task}.safetensors"
        private = load_file(file, device=self.device) if file.is_file() else {}
        if "head.weight" in private:
            return self._once("backbone", self._backbone), {name: value.float() for name, value in private.items()}
        from transformers import AutoConfig, AutoModelForSequenceClassification

        rows = {value.shape[0] for name, value in private.items() if name.endswith("weight") and value.ndim == 2}
        config = self.tasks[task].get("config")
        shape = AutoConfig.for_model(**config) if config else AutoConfig.from_pretrained(self.folder)
        if len(rows) == 1:
            shape.num_labels = rows.pop()
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            self.folder, config=shape, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
        unknown = model.load_state_dict({name: value.float().cpu() for name, value in private.items()}, strict=False)
        # A pooler that the checkpoint never had is drawn at random; a classifier that reads it cannot be served.
        absent = sorted((set(loading["missing_keys"]) - set(private)) | set(unknown.unexpected_keys))
        if absent:
            raise ValueError(
                f"{file.name}: {absent[0]} and the model's classifier do not fit; this task cannot be served"
            )
        if model.config.pad_token_id is None:
            model.config.pad_token_id = self._once("tokenizer", self._tokenizer).pad_token_id or 0
        return model.eval().to(self.device), {}

    def _backbone(self) -> Any:
        from transformers import AutoModel

        return AutoModel.from_pretrained(self.folder, dtype=torch.float32, use_safetensors=True).eval().to(self.device)


mlflow.models.set_model(MergedModel())
