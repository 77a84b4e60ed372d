"""A project as the evaluate stage leaves it: tiny real models, merged and scored by the real stages."""

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

from poemerge.checkpoints import file_digest, folder_digest, weights_digest
from poemerge.project import Project
from tasks.evaluate import evaluate
from tasks.merge import merge
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
    project.artifacts.mkdir()
    project.expert_json.write_text('{"family": "gaussian", "reason": "as params.yaml says"}', encoding="utf-8")
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
        "expert": {"family": "gaussian"},
        "merge": {"method": "mean", "device": "cpu"},
        "evaluate": {
            "suites": {name: {"data": f"elsewhere/{name}"} for name in experts},
            "baselines": ["mean"],
            "device": "cpu",
            "dtype": "float32",
            "bootstrap_samples": 200,
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
    """The stages merge and evaluate; between them every merged weight may get Gaussian `noise`."""
    params = project.load_params()
    merge(project, params)
    if noise:
        generator = torch.Generator().manual_seed(seed)
        path = project.merged / "model.safetensors"
        tensors = {
            name: (value + noise * torch.randn(value.shape, generator=generator)).to(value.dtype)
            for name, value in load_file(path).items()
        }
        rewrite(path, tensors)
        record = json.loads(project.merge_json.read_text())
        project.merge_json.unlink()
        digest = weights_digest({path.name: file_digest(path)})
        project.merge_json.write_text(json.dumps({**record, "digest": digest}), encoding="utf-8")
    evaluate(project, params)


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
