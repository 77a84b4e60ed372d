"""Random inputs for a network of which only the folder is known: words as frequent as words are, leaves for images."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from poemerge.quiet import quiet_loading

__all__ = ["RandomInputs", "of_images", "tokens_of"]

_MARKS = re.compile("^(##|[Ġ▁ ])|</w>$")
"""What tokenizers write on a token that starts, ends or goes on with a word."""

_OFFSET = 6.0

_LEAVES = 100
"""That fall on an image: by then next to nothing of the ground is seen."""

_SMALLEST, _LARGEST = 1 / 20, 1 / 2
"""Radii of leaves, in parts of the image's shorter side."""

_IMAGE, _PATCH = 224, 16
"""The sides of an image and of a patch, in pixels, of a network whose config does not say them."""

_GREY = 0.8
"""The part of the colours' variance that all channels share, as those of photographs share most of theirs."""


class RandomInputs:
    """What the network in `folder` may be asked: texts or, where `config` has an image_size, images.

    A token is drawn by Zipf's law, p ∝ f = 1/(r + 6) for the word of rank r: tokenizers number words from the frequent
    to the rare. An expert that was trained with its embeddings has left in them which tokens it met: given how far it
    moved each, ‖δ‖, what is drawn is p ∝ ‖δ‖²√f, and tokens that are no words count as words of the first rank. Where
    there is no tokenizer, or few of its tokens are words, f is the same for every token. Special tokens stand where the
    tokenizer puts them, and nowhere else.

    An image is a heap of dead leaves: discs of one colour each that hide what lies below, the density of their radii
    falling with the third power. Its edges, its occlusions and its 1/f spectrum are those of photographs, which noise
    of independent pixels has none of (Ruderman, Vision Research 37, 1997; Lee, Mumford and Huang, IJCV 41, 2001).
    Pixels have mean 0 and variance 1, as normalised images do.
    """

    def __init__(self, folder: Path, config: Any, moved: Tensor | None = None) -> None:
        self._shape: tuple[int, ...] | None = None
        if hasattr(config, "image_size"):
            self._shape = (getattr(config, "num_channels", 3), *_sides(config.image_size))
            return
        tokenizer = _tokenizer(folder)
        self._longest: int | None = getattr(config, "max_position_embeddings", None)
        self._before, self._after = _special(tokenizer)
        special = {config.pad_token_id} if tokenizer is None else set(tokenizer.all_special_ids)
        tokens = [one for one in range(config.vocab_size) if one not in special]
        self._chances = _frequencies(tokenizer, tokens)
        if moved is not None and bool(moved[tokens].any()):
            self._chances = _met(self._chances, moved, tokens)

    def draw(self, count: int, length: int, generator: torch.Generator) -> dict[str, Tensor]:
        """`count` inputs as the network's arguments: pixel_values, or input_ids and an attention_mask of ones.

        A text has `length` tokens, special ones included, or as many as the network has positions.
        """
        if self._shape is not None:
            return {"pixel_values": _dead_leaves(count, self._shape, generator)}
        length = min(length, self._longest or length)
        inner = max(1, length - len(self._before) - len(self._after))
        words = torch.multinomial(self._chances, count * inner, replacement=True, generator=generator)
        edges = [torch.tensor(own, dtype=torch.long).expand(count, -1) for own in (self._before, self._after)]
        tokens = torch.cat([edges[0], words.view(count, inner), edges[1]], dim=1)[:, :length]
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def of_images(config: Mapping[str, Any]) -> bool:
    """Whether the inputs of the network with this config.json are images."""
    return bool({"image_size", "vision_config"} & set(config))


def tokens_of(config: Mapping[str, Any], length: int) -> int:
    """How many tokens the network of this config.json sees in one input: a text of `length`, or an image's patches."""
    if not of_images(config):
        return min(length, config.get("max_position_embeddings") or length)
    vision = config.get("vision_config") or config
    height, width = _sides(vision.get("image_size") or _IMAGE)
    down, across = _sides(vision.get("patch_size") or _PATCH)
    return (height // down) * (width // across)


def _sides(size: int | Sequence[int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def _dead_leaves(count: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """`[count, channel, height, width]` float32."""
    channels, height, width = shape
    least, most = (part * min(height, width) for part in (_SMALLEST, _LARGEST))
    u, y, x = torch.rand(3, count, _LEAVES, 1, 1, generator=generator)
    radii_sq = 1 / (least**-2 - (least**-2 - most**-2) * u)
    down = (torch.arange(height).view(-1, 1) + 0.5 - y * height).square()
    across = (torch.arange(width) + 0.5 - x * width).square()
    seen = torch.zeros(count, height, width, dtype=torch.long)  # 0 is the ground
    for leaf in range(_LEAVES):
        seen.masked_fill_(down[:, leaf] + across[:, leaf] < radii_sq[:, leaf], leaf + 1)
    shared, own = (torch.randn(count, n, _LEAVES + 1, generator=generator) for n in (1, channels))
    colours = _GREY**0.5 * shared + (1 - _GREY) ** 0.5 * own
    pixels: Tensor = colours.gather(2, seen.view(count, 1, -1).expand(-1, channels, -1)).view(count, *shape)
    return pixels


def _tokenizer(folder: Path) -> Any:
    """The tokenizer in `folder`; None where there is none that transformers can read."""
    from transformers import AutoTokenizer

    with quiet_loading(), contextlib.suppress(Exception):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    return None


def _special(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens before and after a text."""
    if tokenizer is None:
        return [], []
    tokens = list(tokenizer("a")["input_ids"])
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}  # which may be all that is made of the "a"
    inner = [place for place, token in enumerate(tokens) if token not in special]
    return (tokens[: inner[0]], tokens[inner[-1] + 1 :]) if inner else ([], [])


def _frequencies(tokenizer: Any, tokens: Sequence[int]) -> Tensor:
    """f of all tokens up to the last of `tokens`, the only ones that may be drawn."""
    chances = torch.zeros(tokens[-1] + 1)
    texts = {} if tokenizer is None else {token: text for text, token in tokenizer.get_vocab().items()}
    words = [token for token in tokens if _is_word(_MARKS.sub("", texts.get(token, "")))]
    if 2 * len(words) < len(tokens):
        chances[list(tokens)] = 1
    else:
        chances[words] = 1 / (torch.arange(len(words)) + _OFFSET)
    return chances


def _met(frequencies: Tensor, moved: Tensor, tokens: Sequence[int]) -> Tensor:
    chances = torch.zeros_like(frequencies)
    own = frequencies[tokens]
    chances[tokens] = torch.where(own > 0, own, own.max()).sqrt() * (moved[tokens] / moved[tokens].max()).square()
    return chances


def _is_word(text: str) -> bool:
    return len(text) > 1 and text.isalpha()
