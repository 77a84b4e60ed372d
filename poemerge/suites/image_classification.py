"""Kind `image-classification`: CLIP with a zero-shot head, an encoder with a linear head, or an image classifier."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
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
    from poemerge.suites.runtime import Runtime

__all__ = ["ImageClassification"]

_OPTIONS: dict[str, Any] = {
    "image": "image",  # the column: bytes, the hub's {bytes, path}, or a path inside the data's folder
    "label": "label",
    "classes": None,  # each class in words; default: labels.json's `descriptions`, else its labels
    "templates": ["a photo of a {}."],
    "pooling": "cls",  # of an encoder with a linear head: cls or mean
    "normalize": False,  # whether its embedding has unit length
    "workers": None,  # processes that decode images; default: none on a CPU, up to 8 beside a GPU
}


class ImageClassification:
    """Images with one label each. Where the task's private parameters hold `head.weight`, logits = head · embedding.

    Without one, a CLIP model is scored zero-shot: the class vectors are the base's text tower's unit embeddings of the
    class in each template, averaged and of unit length again, and logits = exp(logit scale) · cosine (Radford et al.,
    https://arxiv.org/abs/2103.00020, section 3.1.4). Another model is the image classifier that the expert's
    config.json names, with the private parameters put in.
    """

    version = 1

    def __init__(self, spec: SuiteSpec) -> None:
        self.spec = spec
        self.options = spec.options(_OPTIONS)
        self.metric = metric_named(spec.settings.metric)

    def load(self) -> int:
        """Reads the split and its labels; images stay encoded until they are needed."""
        about = description(self.spec)
        rows = read_split(self.spec, (self.options["image"], self.options["label"]))
        self.images = [self._encoded(value) for value in rows[self.options["image"]]]
        labels = about.get("labels", [])
        self.classes = self.options["classes"] or about.get("descriptions") or labels
        self.target = class_indices(self.spec, rows[self.options["label"]].tolist(), labels)
        self._text_head: tuple[Path, Head] | None = None
        return len(self.images)

    def predict(self, model: Model, runtime: Runtime) -> Columns:
        """Target, predicted class, confidence and nll of every image."""
        return columns_of(self.logits(model, runtime), self.target)

    def logits(self, model: Model, runtime: Runtime) -> Tensor:
        """`[example, class]`."""
        from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification

        private = private_tensors(model)
        head = Head.among(private)
        config = AutoConfig.from_pretrained(model.base)
        clip = config.model_type in {"clip", "clip_vision_model"}
        if clip:
            from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

            # The base's architecture: a bare vision tower does not know the width of the projection.
            tower = Model(model.name, model.folder, model.base, config=model.base)
            width = {"projection_dim": config.projection_dim}
            module = runtime.module(CLIPVisionModelWithProjection, tower, config_class=CLIPVisionConfig, **width)
            head = head or self._zero_shot(model.base)
        elif head is not None:
            module = runtime.module(AutoModel, Model(model.name, model.folder, model.base))
        else:
            module = runtime.module(AutoModelForImageClassification, model, private, **classes_of(private))
        check_head(self.spec, module.config.num_labels if head is None else len(head.weight), self.target)
        head = None if head is None else head.to(runtime.device)
        pixels = _Pixels(self.images, AutoImageProcessor.from_pretrained(model.base))
        workers = self.options["workers"]
        if workers is None:
            workers = min(8, torch.multiprocessing.cpu_count() - 1) if runtime.device.type == "cuda" else 0
        batches = torch.utils.data.DataLoader(pixels, runtime.batch_size, num_workers=workers)
        found = []
        with torch.inference_mode():
            for batch in batches:
                with runtime.precision():
                    out = module(pixel_values=batch.to(runtime.device, module.dtype))
                logits = out.logits if head is None else head(self._embedding(out, clip))
                found.append(logits.float().cpu())
                runtime.tick(len(logits))
        return torch.cat(found)

    def score(self, predictions: Columns) -> dict[str, float]:
        """accuracy, macro_f1, nll, ece."""
        return scores_of(predictions)

    def _encoded(self, value: Any) -> bytes | Path:
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return value
        assert self.spec.data is not None
        path = self.spec.data / str(value)
        if not path.is_file():
            raise self.spec.error(
                "images",
                got=f"{value!r}, which is no file in {self.spec.data}",
                expected="encoded bytes, or paths inside the data's folder",
                next_step="name the column in options.image",
            )
        return path

    def _embedding(self, out: Any, clip: bool) -> Tensor:
        if clip:
            return torch.nn.functional.normalize(out.image_embeds.float(), dim=-1)
        states = out.last_hidden_state.float()
        pooled = states[:, 0] if self.options["pooling"] == "cls" else states.mean(1)
        return torch.nn.functional.normalize(pooled, dim=-1) if self.options["normalize"] else pooled

    def _zero_shot(self, base: Path) -> Head:
        """Class vectors of the base's text tower, made once for all models."""
        if self._text_head is None or self._text_head[0] != base:
            if not self.classes:
                raise self.spec.error(
                    "classes",
                    got="no class names",
                    expected="labels.json with `labels`, or options.classes",
                    next_step="write labels.json into the suite's data",
                )
            self._text_head = (base, Head(_text_vectors(base, self.classes, self.options["templates"])))
        return self._text_head[1]


@torch.inference_mode()
def _text_vectors(base: Path, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
    """exp(logit scale) times the unit class vectors `[class, dim]`, float32."""
    from transformers import AutoTokenizer, CLIPModel

    model = CLIPModel.from_pretrained(base, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = []
    for name in classes:
        tokens = tokenizer([template.format(name) for template in templates], padding=True, return_tensors="pt")
        states = model.text_model(**tokens).pooler_output
        vectors = torch.nn.functional.normalize(model.text_projection(states), dim=-1)
        rows.append(torch.nn.functional.normalize(vectors.mean(0), dim=-1))
    head: Tensor = torch.stack(rows) * model.logit_scale.exp()
    return head.clone()  # no inference tensor: it is used outside


class _Pixels(torch.utils.data.Dataset[Tensor]):
    """Decoded images as the base's image processor makes them."""

    def __init__(self, images: Sequence[bytes | Path], processor: Any) -> None:
        self.images = images
        self.processor = processor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        from PIL import Image

        source = self.images[index]
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            pixels: Tensor = self.processor(image.convert("RGB"), return_tensors="pt")["pixel_values"][0]
        return pixels
