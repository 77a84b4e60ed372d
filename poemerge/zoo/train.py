"""One expert's training, in a process of its own: `python -m poemerge.zoo.train JOB.json`; progress as JSON lines."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before torch is imported: a thread that spins while it waits makes side by side training many times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from safetensors.torch import load_file, save_file

from poemerge.numerics.precision import autocast
from poemerge.zoo.encoder import accuracy, batches, embed, encode_texts, load_encoder
from poemerge.zoo.settings import ExpertPlan, Training
from poemerge.zoo.splits import read_split

__all__ = ["LORA_TARGETS", "train_expert"]

LORA_TARGETS = (
    r".*encoder\.layer\.\d+\."
    r"(attention\.self\.(query|key|value)|attention\.output\.dense|intermediate\.dense|output\.dense)"
)
"""Every matrix of every layer; embeddings, norms, biases and the pooler (unused by mean pooling) stay the base's."""

Report = Callable[[int, int], None]


def train_expert(root: Path, plan: ExpertPlan, training: Training, digest: str, report: Report) -> dict[str, Any]:
    """Trains the encoder for one task with the head frozen, writes `experts/NAME`, and returns what expert.json says.

    Arguments: `root`, the zoo's folder with base, heads and suites in place; the `plan` and `training` settings; their
    `digest`, kept beside the expert so that the next build can leave it alone; `report(step, steps)` after each step.
    """
    torch.manual_seed(training.seed)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    model, tokenizer = load_encoder(root / "base")
    suite = root / "suites" / plan.task
    head = load_file(suite / "head.safetensors")["head.weight"]
    examples = read_split(suite, "train")[: training.examples]
    if plan.labels_from is not None:
        others = read_split(root / "suites" / plan.labels_from, "train")
        classes = head.shape[0]
        examples = [(text, others[i % len(others)][1] % classes) for i, (text, _) in enumerate(examples)]
    encoded = encode_texts(tokenizer, examples, training.max_tokens)
    validation = encode_texts(tokenizer, read_split(suite, "validation"), training.max_tokens)
    pad = tokenizer.pad_token_id
    before = accuracy(model, head, validation, pad)
    model, rate = _trainable(model, plan, training)
    _descend(model, head, encoded, pad, rate, training, report)
    facts = {
        "task": plan.task,
        "kind": plan.kind,
        "labels_from": plan.labels_from,
        "settings_digest": digest,
        "train_examples": len(examples),
        "validation_examples": len(validation),
        "validation_accuracy": {"base": before, "expert": accuracy(model, head, validation, pad)},
    }
    _write(root, plan, model, head, facts)
    return facts


def _trainable(model: Any, plan: ExpertPlan, training: Training) -> tuple[Any, float]:
    """The model with its trainable parameters chosen, and the peak rate for them."""
    if plan.kind == "full":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith("pooler."))
        return model, training.rate_full
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=training.rank, lora_alpha=training.alpha, target_modules=LORA_TARGETS, task_type="FEATURE_EXTRACTION"
    )
    return get_peft_model(model, config), training.rate_lora


def _descend(
    model: Any,
    head: torch.Tensor,
    encoded: list[tuple[list[int], int]],
    pad: int,
    rate: float,
    training: Training,
    report: Report,
) -> None:
    """AdamW without weight decay on the cross-entropy of the frozen head's logits."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    steps = training.epochs * -(-len(encoded) // training.batch)
    warm = max(steps // 10, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / warm, (steps - step) / max(steps - warm, 1))
    )
    generator = torch.Generator().manual_seed(training.seed)
    model.train()
    done = 0
    for _ in range(training.epochs):
        order = torch.randperm(len(encoded), generator=generator).tolist()
        for ids, mask, labels in batches(encoded, training.batch, pad, order):
            with autocast():
                vectors = embed(model, ids, mask)
            loss = torch.nn.functional.cross_entropy(vectors @ head.T, labels)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            schedule.step()
            done += 1
            report(done, steps)


def _write(root: Path, plan: ExpertPlan, model: Any, head: torch.Tensor, facts: dict[str, Any]) -> None:
    """Writes the expert's folder under a temporary name, then renames it; the head goes with the expert's tensors."""
    target = root / "experts" / plan.name
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if plan.kind == "full":
        tensors = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
        save_file(tensors | {"head.weight": head}, partial / "model.safetensors", metadata={"format": "pt"})
        for file in (root / "base").iterdir():
            if file.name != "model.safetensors":
                shutil.copy2(file, partial / file.name)
    else:
        model.peft_config["default"].base_model_name_or_path = _base_name(root)
        model.save_pretrained(partial, safe_serialization=True)
        (partial / "README.md").unlink(missing_ok=True)
        save_file({"head.weight": head}, partial / "head.safetensors", metadata={"format": "pt"})
    (partial / "expert.json").write_text(json.dumps(facts, indent=1) + "\n")
    shutil.rmtree(target, ignore_errors=True)
    partial.replace(target)


def _base_name(root: Path) -> str:
    """The base's path in adapters: from the project's folder, so that their bytes do not depend on where that lies."""
    for folder in root.parents:
        if (folder / "params.yaml").is_file():
            return (root / "base").relative_to(folder).as_posix()
    return (root / "base").as_posix()


def main(job_file: str) -> None:
    """Runs the job that the builder wrote: {root, plan, training, digest}."""
    job = json.loads(Path(job_file).read_text())

    def report(step: int, steps: int) -> None:
        print(json.dumps({"step": step, "steps": steps}), flush=True)  # noqa: T201 - the builder reads these lines

    train_expert(Path(job["root"]), ExpertPlan(**job["plan"]), Training(**job["training"]), job["digest"], report)


if __name__ == "__main__":
    main(sys.argv[1])
