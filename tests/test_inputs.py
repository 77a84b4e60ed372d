"""Random inputs: words as frequent as Zipf says, special tokens in their places, leaves for images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, BertTokenizerFast

from poemerge.merging.inputs import RandomInputs, tokens_of
from tests.tiny import make_base

LENGTH = 32
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def _words(count: int) -> list[str]:
    letters = "abcdefghijklmnopqrstuvwxyz"
    return [letters[i // 26] + letters[i % 26] for i in range(count)]


def _folder(path: Path, vocabulary: list[str]) -> Path:
    path.mkdir()
    (path / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    BertTokenizerFast(vocab=str(path / "vocab.txt")).save_pretrained(path)
    return path


def _config(size: int, **more: object) -> object:
    return AutoConfig.for_model("bert", vocab_size=size, **more)


def _drawn(folder: Path, config: object, count: int, seed: int = 0, moved: torch.Tensor | None = None) -> torch.Tensor:
    drawn = RandomInputs(folder, config, moved).draw(count, LENGTH, torch.Generator().manual_seed(seed))
    assert bool(drawn["attention_mask"].eq(1).all())
    assert drawn["attention_mask"].shape == drawn["input_ids"].shape
    return drawn["input_ids"]


def test_words_come_by_zipfs_law_and_nothing_else_comes(tmp_path: Path) -> None:
    odd = ["[unused0]", "x", "!", "##s", "7"]
    words = [*_words(40), "##ing", "##ed"]
    vocabulary = [*SPECIAL, *odd, *words]
    tokens = _drawn(_folder(tmp_path / "t", vocabulary), _config(len(vocabulary)), 4000)
    assert tokens.shape == (4000, LENGTH)
    assert bool((tokens[:, 0] == 2).all())
    assert bool((tokens[:, -1] == 3).all())
    inner = tokens[:, 1:-1]
    assert int(inner.min()) >= len(SPECIAL) + len(odd)
    seen = torch.bincount(inner.flatten(), minlength=len(vocabulary))[len(SPECIAL) + len(odd) :].double()
    expected = 1 / (torch.arange(len(words)).double() + 6)
    torch.testing.assert_close(seen / seen.sum(), expected / expected.sum(), rtol=0.1, atol=0)


def test_what_an_expert_did_to_its_embeddings_says_what_it_met(tmp_path: Path) -> None:
    vocabulary = [*SPECIAL, "!", *_words(40)]
    moved = torch.zeros(len(vocabulary))
    moved[[2, 5, 6, 20, 40]] = torch.tensor([9.0, 2.0, 2.0, 1.0, 3.0])  # [CLS], "!", and words of ranks 0, 14 and 34
    folder, config = _folder(tmp_path / "t", vocabulary), _config(len(vocabulary))
    inner = _drawn(folder, config, 4000, moved=moved)[:, 1:-1]
    seen = torch.bincount(inner.flatten(), minlength=len(vocabulary)).double()
    assert set(inner.unique().tolist()) == {5, 6, 20, 40}
    expected = torch.tensor([4 / 6**0.5, 4 / 6**0.5, 1 / 20**0.5, 9 / 40**0.5]).double()
    torch.testing.assert_close(seen[[5, 6, 20, 40]] / seen.sum(), expected / expected.sum(), rtol=0.05, atol=0)
    still = torch.zeros(len(vocabulary))
    assert torch.equal(_drawn(folder, config, 5, moved=still), _drawn(folder, config, 5))


def test_a_vocabulary_of_few_words_is_drawn_evenly(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")  # its words are w00 to w89
    tokens = _drawn(base, AutoConfig.from_pretrained(base), 3000)[:, 1:-1]
    seen = torch.bincount(tokens.flatten(), minlength=95).double()
    assert seen[:5].sum() == 0
    torch.testing.assert_close(seen[5:] / seen.sum(), torch.full((90,), 1 / 90).double(), rtol=0.15, atol=0)


def test_without_a_tokenizer_all_but_the_padding_is_drawn(tmp_path: Path) -> None:
    tokens = _drawn(tmp_path, _config(50, pad_token_id=7, max_position_embeddings=20), 500)
    assert tokens.shape == (500, 20)
    assert set(tokens.unique().tolist()) == set(range(50)) - {7}


@pytest.mark.parametrize("size", [32, (32, 24)])
def test_images_are_heaps_of_leaves(tmp_path: Path, size: int | tuple[int, int]) -> None:
    config = AutoConfig.for_model("vit", image_size=size, num_channels=2)
    pixels = RandomInputs(tmp_path, config).draw(600, LENGTH, torch.Generator().manual_seed(0))["pixel_values"]
    assert pixels.shape == (600, 2, 32, 32 if size == 32 else 24)
    assert float(pixels.mean()) == pytest.approx(0, abs=0.05)
    assert float(pixels.std()) == pytest.approx(1, abs=0.05)
    # Neighbours are mostly of one leaf, the ends of an image of two; channels share most of their variance.
    assert float((pixels[..., 1:] == pixels[..., :-1]).float().mean()) > 0.5
    assert float((pixels[..., 0] == pixels[..., -1]).float().mean()) < 0.1
    assert float(torch.corrcoef(pixels.transpose(0, 1).flatten(1))[0, 1]) == pytest.approx(0.8, abs=0.05)


def test_the_seed_decides(tmp_path: Path) -> None:
    one, again, other = (_drawn(tmp_path, _config(50), 4, seed) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(("image", "patch"), [(16, 8), ([32, 16], [8, 4])])
def test_an_image_counts_as_its_patches(image: int | list[int], patch: int | list[int]) -> None:
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = ViTConfig(image_size=image, patch_size=patch, **sizes)
    seen = ViTModel(config, add_pooling_layer=False).embeddings.patch_embeddings.num_patches
    assert tokens_of(config.to_dict(), 32) == tokens_of({"vision_config": config.to_dict()}, 32) == seen
    assert tokens_of({"vocab_size": 9, "max_position_embeddings": 20}, 32) == 20
    assert tokens_of({"vocab_size": 9}, 32) == 32
