"""A project as the evaluate stage leaves it, made in a second: tiny real models, scored by the real suites."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from mlflow import MlflowClient
from safetensors.torch import load_file, save_file

from poemerge.checkpoints.digest import file_digest, folder_digest
from poemerge.params import SuiteParams
from poemerge.project import Project
from poemerge.suites.protocol import Model, SuiteSpec, open_suite
from poemerge.suites.runtime import choose_runtime
from poemerge.suites.store import Scored, ScoreStore, score_key
from tests.tiny import HIDDEN, make_base, make_full_expert, make_suite

CLASSES = 3


def make_project(root: Path, experts: Mapping[str, int], *, git: bool = False, register: Any = None) -> Project:
    """A project with tiny `experts` {name: seed}, merged by the mean and scored."""
    project = Project(root)
    root.mkdir(parents=True, exist_ok=True)
    make_base(project.base)
    put_source(project.base, "base")
    write_params(project, experts, register)
    (root / "dvc.yaml").write_text("stages: {}\n", encoding="utf-8")
    (root / "dvc.lock").write_text("schema: '2.0'\n", encoding="utf-8")
    for name, seed in experts.items():
        land(project, name, seed)
    merge_and_score(project)
    if git:
        (root / ".gitignore").write_text("/data/\n/artifacts/\n/metrics/\n/.poemerge/\n", encoding="utf-8")
        for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "start"]):
            subprocess.run(
                ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", *arguments], cwd=root, check=True
            )
    return project


def write_params(project: Project, experts: Mapping[str, int], register: Any = None) -> None:
    """params.yaml that names the experts, a suite each, and the given register section."""
    content = {
        "base": {"source": "elsewhere/base"},
        "experts": {name: {"source": f"elsewhere/{name}"} for name in experts},
        "merge": {"method": "mean"},
        "evaluate": {
            "suites": {name: {"data": f"elsewhere/{name}"} for name in experts},
            "device": "cpu",
            "dtype": "float32",
        },
        "register": {"model": "tiny", **(register or {})},
    }
    project.params_yaml.write_text(yaml.safe_dump(content), encoding="utf-8")


def land(project: Project, name: str, seed: int, size: float = 0.02) -> None:
    """Expert `name` and its suite, as fetch would bring them; its head separates the classes of its suite a little."""
    shutil.rmtree(project.expert(name), ignore_errors=True)
    make_full_expert(project.base, project.expert(name), seed, CLASSES, size)
    if not project.suite(name).is_dir():
        make_suite(project.suite(name), CLASSES, seed, examples=60)
        put_source(project.suite(name), f"suite-{name}")
    tensors = load_file(project.expert(name) / "model.safetensors")
    tensors["head.weight"] = class_means(project, name)
    rewrite(project.expert(name) / "model.safetensors", tensors)
    put_source(project.expert(name), f"{name}-{seed}")


def class_means(project: Project, name: str) -> torch.Tensor:
    """`head.weight [class, hidden]`: 20 × the mean embedding of each class's training texts under the base."""
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(project.base).eval(), AutoTokenizer.from_pretrained(project.base)
    rows = [json.loads(line) for line in (project.suite(name) / "train.jsonl").read_text().splitlines()]
    with torch.no_grad():
        tokens = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
        keep = tokens["attention_mask"].unsqueeze(-1)
        vectors = (model(**tokens).last_hidden_state * keep).sum(1) / keep.sum(1)
    labels = torch.tensor([row["label"] for row in rows])
    centred = torch.nn.functional.normalize(vectors, dim=-1)
    centred = centred - centred.mean(0)
    means = torch.stack([centred[labels == label].mean(0) for label in range(CLASSES)])
    assert means.shape == (CLASSES, HIDDEN)
    return 20 * means


def put_source(folder: Path, revision: str) -> None:
    """source.json as fetch writes it."""
    (folder / "source.json").unlink(missing_ok=True)
    content = {"source": f"elsewhere/{folder.name}", "revision": revision, "digest": folder_digest(folder)}
    (folder / "source.json").write_text(json.dumps(content), encoding="utf-8")


def rewrite(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    save_file(dict(tensors), path.with_name(path.name + ".partial"), metadata={"format": "pt"})
    path.with_name(path.name + ".partial").replace(path)


def merge_and_score(project: Project, noise: float = 0.0, seed: int = 0) -> None:
    """artifacts/merged (the mean, with Gaussian `noise` on every weight) and metrics/evaluation.json."""
    shutil.rmtree(project.merged, ignore_errors=True)
    (project.merged / "heads").mkdir(parents=True)
    for file in project.base.iterdir():
        if file.suffix in {".json", ".txt"} and file.name != "source.json":
            shutil.copy(file, project.merged)
    parts = {name: load_file(folder / "model.safetensors") for name, folder in project.expert_folders().items()}
    generator = torch.Generator().manual_seed(seed)
    merged = {}
    for name, value in load_file(project.base / "model.safetensors").items():
        mean = torch.stack([part[name].float() for part in parts.values()]).mean(0)
        merged[name] = (mean + noise * torch.randn(mean.shape, generator=generator)).to(value.dtype)
    rewrite(project.merged / "model.safetensors", merged)
    for name, part in parts.items():
        rewrite(project.merged / "heads" / f"{name}.safetensors", {"head.weight": part["head.weight"]})
    write_merge_json(project, sorted(parts))
    score(project)


def write_merge_json(project: Project, experts: list[str]) -> None:
    sources = {name: json.loads((project.expert(name) / "source.json").read_text()) for name in experts}
    content = {
        "method": "mean",
        "settings": {"coefficient": 1.0},
        "base": json.loads((project.base / "source.json").read_text()),
        "experts": {name: {**s, "kind": "full"} for name, s in sources.items()},
        "rules": {"merged": ["encoder"], "averaged": [], "left_at_base": [], "private": {}},
        "digest": file_digest(project.merged / "model.safetensors"),
        "device": "cpu",
        "dtype": "float32",
    }
    project.merge_json.write_text(json.dumps(content), encoding="utf-8")
    line = {"name": "encoder.layer.0.w", "rule": "matrix", "weights": dict.fromkeys(experts, 1 / len(experts))}
    project.ledger.write_text(json.dumps(line) + "\n", encoding="utf-8")


def score(project: Project) -> None:
    """metrics/evaluation.json as the evaluate stage writes it, for the merged model and each task's expert."""
    params = project.load_params()
    runtime, store = choose_runtime("cpu", "float32", 64), ScoreStore(project.scores)
    suites: dict[str, Any] = {}
    for name in project.expert_folders():
        settings = params.evaluate.suites.get(name, SuiteParams())
        suite = open_suite(SuiteSpec(name, settings, project.suite(name)))
        examples = suite.load()
        head = project.merged / "heads" / f"{name}.safetensors"
        row: dict[str, float] = {}
        files: dict[str, str] = {}
        for who, folder in (("base", project.base), ("expert", project.expert(name)), ("merged", project.merged)):
            columns = suite.predict(Model(who, folder, project.base, head), runtime)
            key = score_key(who=who, name=name, digest=folder_digest(folder))
            store.put(Scored(key, suite.score(columns), examples, 0.0), columns, {"model": who, "suite": name})
            row[who] = suite.score(columns)["accuracy"]
            files[who] = store.parquet(key).relative_to(project.root).as_posix()
            runtime.release()
        suites[name] = {
            "kind": "text-classification",
            "metric": "accuracy",
            "examples": examples,
            "data_digest": folder_digest(project.suite(name)),
            "expert_name": name,
            **row,
            "normalised": row["merged"] / row["expert"],
            "baselines": {"mean": row["merged"]},
            "predictions": files,
        }
    mean = {
        key: sum(s[key] for s in suites.values()) / len(suites) for key in ("base", "expert", "merged", "normalised")
    }
    project.evaluation_json.parent.mkdir(exist_ok=True)
    project.evaluation_json.write_text(json.dumps({"suites": suites, "mean": mean}), encoding="utf-8")


_migrated: list[bytes] = []


def fresh_registry(project: Project) -> None:
    """An empty MLflow store in the project; the tables are made once a session, which takes seconds, and copied."""
    if not _migrated:
        with tempfile.TemporaryDirectory() as scratch:
            MlflowClient(f"sqlite:///{scratch}/empty.db").search_experiments()
            _migrated.append((Path(scratch) / "empty.db").read_bytes())
    project.mlflow_db.parent.mkdir(parents=True, exist_ok=True)
    project.mlflow_db.write_bytes(_migrated[0])


@functools.cache
def template() -> Path:
    """A project with the experts a and b under git, made once a session; copy it with `copied`."""
    root = Path(tempfile.mkdtemp(prefix="poemerge-test-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return make_project(root / "project", {"a": 1, "b": 2}, git=True).root


def copied(root: Path, register: Any = None) -> Project:
    """A copy of the template at `root` with an empty registry, and with the given register section."""
    shutil.copytree(template(), root, symlinks=True)
    project = Project(root)
    fresh_registry(project)
    if register is not None:
        write_params(project, {"a": 1, "b": 2}, register)
    return project
