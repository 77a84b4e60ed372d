"""The zoo's model: a sentence encoder with a frozen zero-shot head, logits = head · normalise(mean of token states)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from poemerge.numerics.precision import autocast
from poemerge.zoo.tasks import Example

__all__ = [
    "HEAD_SCALE",
    "Batch",
    "accuracy",
    "batches",
    "embed",
    "encode_texts",
    "load_encoder",
    "zero_shot_head",
]

HEAD_SCALE = 20.0
"""Temperature of the zero-shot head: a cosine in [-1, 1] times this is a logit."""

Batch = tuple[Tensor, Tensor, Tensor]
"""Token ids `[batch, tokens]`, attention mask `[batch, tokens]`, labels `[batch]`."""


def load_encoder(folder: Path) -> tuple[Any, Any]:
    """Model (eager float32, training off) and tokenizer of a Hugging Face folder."""
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()

    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def embed(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Unit vectors `[batch, hidden]`: the mean of the last hidden states over the tokens that are not padding."""
    states = model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
    keep = mask.unsqueeze(-1).to(states.dtype)
    return torch.nn.functional.normalize((states * keep).sum(1) / keep.sum(1), dim=-1)


@torch.no_grad()
def zero_shot_head(model: Any, tokenizer: Any, descriptions: Sequence[str]) -> Tensor:
    """`head.weight [classes, hidden]` in float32: 20 times the embedding of each class's description under `model`."""
    tokens = tokenizer(list(descriptions), padding=True, return_tensors="pt")
    return HEAD_SCALE * embed(model, tokens["input_ids"], tokens["attention_mask"])


def encode_texts(tokenizer: Any, examples: Sequence[Example], max_tokens: int) -> list[tuple[list[int], int]]:
    """Token ids and label of each example, cut at `max_tokens`."""
    if not examples:
        return []
    tokens = tokenizer([text for text, _ in examples], truncation=True, max_length=max_tokens)["input_ids"]
    return [(ids, label) for ids, (_, label) in zip(tokens, examples, strict=True)]


def batches(
    encoded: Sequence[tuple[list[int], int]], size: int, pad: int, order: Sequence[int] | None = None
) -> Iterator[Batch]:
    """Batches of `size` padded to their own longest text, in `order` (by length where it is None, which pads least)."""
    if order is None:
        order = sorted(range(len(encoded)), key=lambda index: len(encoded[index][0]))
    for start in range(0, len(order), size):
        rows = [encoded[index] for index in order[start : start + size]]
        longest = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([row + [pad] * (longest - len(row)) for row, _ in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row, _ in rows])
        yield ids, mask, torch.tensor([label for _, label in rows])


@torch.no_grad()
def accuracy(model: Any, head: Tensor, encoded: Sequence[tuple[list[int], int]], pad: int, size: int = 64) -> float:
    """Share of examples whose largest logit is their label's."""
    was_training = model.training
    model.eval()
    right = 0
    for ids, mask, labels in batches(encoded, size, pad):
        with autocast():
            vectors = embed(model, ids, mask)
        right += int(((vectors @ head.T).argmax(-1) == labels).sum())
    model.train(was_training)
    return right / max(len(encoded), 1)
