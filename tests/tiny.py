"""Tiny real models for tests: a BERT base with its tokenizer, full and LoRA experts of it, and a suite's data.

Everything is seeded. A full expert holds the encoder and its private `head.weight` [classes, hidden]; a LoRA expert is
a PEFT folder with head.safetensors beside it. Heads score the mean-pooled hidden states, as the zoo's do.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

HIDDEN = 32
WORDS = [f"w{i:02d}" for i in range(90)]


def make_base(path: Path, seed: int = 0, layers: int = 2, dtype: torch.dtype = torch.float32) -> Path:
    """A BertModel folder (hidden 32, 2 layers) with config, tokenizer and model.safetensors."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    path.mkdir(parents=True, exist_ok=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BertModel(
            BertConfig(
                vocab_size=len(vocabulary),
                hidden_size=HIDDEN,
                num_hidden_layers=layers,
                num_attention_heads=2,
                intermediate_size=2 * HIDDEN,
                max_position_embeddings=64,
                initializer_range=0.2,
            )
        )
    model.to(dtype).save_pretrained(path)
    (path / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    BertTokenizerFast(vocab=str(path / "vocab.txt"), model_max_length=64).save_pretrained(path)
    return path


def make_full_expert(base: Path, path: Path, seed: int, classes: int = 3, size: float = 0.02) -> Path:
    """A fully fine-tuned expert of `base`: every float weight moved by noise of `size`, and a head."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, value in load_file(base / "model.safetensors").items():
        noise = torch.randn(value.shape, generator=generator) * size
        tensors[name] = (value + noise.to(value.dtype)) if value.is_floating_point() else value
    tensors["head.weight"] = torch.randn(classes, HIDDEN, generator=generator)
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    for file in base.iterdir():
        if file.suffix in {".json", ".txt"} and "safetensors" not in file.name:
            (path / file.name).write_bytes(file.read_bytes())
    return path


def make_lora_expert(base: Path, path: Path, seed: int, rank: int = 2, classes: int = 3, size: float = 0.05) -> Path:
    """A PEFT LoRA adapter on query and value of every layer, saved by PEFT, with head.safetensors beside it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel

    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(
            AutoModel.from_pretrained(base), LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["query", "value"])
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
    model.save_pretrained(path)
    save_file({"head.weight": torch.randn(classes, HIDDEN, generator=generator)}, path / "head.safetensors")
    return path


def make_suite(path: Path, classes: int = 3, seed: int = 0, examples: int = 24) -> Path:
    """train, validation and test.jsonl (text, label) with labels.json: each class prefers words of its own."""
    rng = random.Random(seed)
    path.mkdir(parents=True, exist_ok=True)
    (path / "labels.json").write_text(json.dumps([f"class{i}" for i in range(classes)]), encoding="utf-8")
    share = len(WORDS) // classes
    for split in ("train", "validation", "test"):
        lines = []
        for i in range(examples):
            label = i % classes
            own = WORDS[label * share : (label + 1) * share]
            words = [rng.choice(own if rng.random() < 0.7 else WORDS) for _ in range(8)]
            lines.append(json.dumps({"text": " ".join(words), "label": label}))
        (path / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
