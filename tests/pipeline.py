"""A whole project in a folder of its own, as a team's checkout is: the code of this one, tiny models, git and DVC."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
import yaml
from tiny import make_base, make_full_expert, make_lora_expert, make_suite

from poemerge.project import Project

CHECKOUT = Path(__file__).parents[1]
CODE = ("poemerge", "tasks", "flows", "dvc.yaml", "prefect.yaml", ".dvcignore", ".gitignore")


PARAMS: dict[str, Any] = {
    "base": {"source": "models/base"},
    "experts": {name: {"source": f"models/{name}"} for name in ("apples", "pears", "plums")},
    "fetch": {},
    "tail": {"entries_per_matrix": 1000},
    "expert": {"family": "cauchy"},
    "merge": {"device": "cpu", "max_steps": 5},
    "evaluate": {
        "suites": {name: {"data": f"suites/{name}"} for name in ("apples", "pears", "plums")},
        "baselines": ["mean"],
        "device": "cpu",
        "bootstrap_samples": 100,
    },
    "register": {"model": "tiny"},
    "schedule": {"cron": None, "watch": {"interval_seconds": 3, "settle_seconds": 2}},
}


def make_project(root: Path) -> Project:
    """A project at `root` with a base, two full experts and a LoRA one, and a suite of each, all in local folders."""
    shutil.copytree(_template(), root, symlinks=True)
    return Project(root.resolve())


def make_finished_project(root: Path) -> Project:
    """Such a project after its first run: merged, evaluated, registered."""
    shutil.copytree(_finished(), root, symlinks=True)
    project = Project(root.resolve())
    _move_registry(project, _finished())
    return project


def _move_registry(project: Project, old: Path) -> None:
    """Let the registry, which came with the copy, name the files of the copy: MLflow's places are absolute."""
    places = {
        "experiments": ("artifact_location",),
        "runs": ("artifact_uri",),
        "logged_models": ("artifact_location",),
        "model_versions": ("source", "storage_location"),
    }
    with contextlib.closing(sqlite3.connect(project.mlflow_db)) as database, database:
        for table, columns in places.items():
            for column in columns:
                database.execute(
                    f"update {table} set {column} = replace({column}, ?, ?)",
                    (old.as_uri() + "/", project.root.as_uri() + "/"),
                )


@functools.cache
def _finished() -> Path:
    project = make_project(_scratch() / "project")
    done = poemerge(project, "run")
    assert done.returncode == 0, done.stderr
    return project.root


def _scratch() -> Path:
    folder = tempfile.mkdtemp(prefix="poemerge-project-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@functools.cache
def _template() -> Path:
    """The project that all are copies of, made once in a session."""
    root = _scratch() / "project"
    root.mkdir()
    for name in CODE:
        source = CHECKOUT / name
        if source.is_dir():
            shutil.copytree(source, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, root / name)
    models = root / "models"
    base = make_base(models / "base")
    make_full_expert(base, models / "apples", seed=1)
    make_full_expert(base, models / "pears", seed=2)
    make_lora_expert(base, models / "plums", seed=3)
    for seed, name in enumerate(("apples", "pears", "plums")):
        make_suite(root / "suites" / name, seed=seed)
    write_params(root, PARAMS)
    as_somebody = ["-c", "user.name=t", "-c", "user.email=t@localhost"]
    for command in (
        ["git", "init", "-q"],
        [sys.executable, "-m", "dvc", "init", "-q"],
        ["git", "add", "-A"],
        ["git", *as_somebody, "commit", "-qm", "A project"],
    ):
        subprocess.run(command, cwd=root, check=True, capture_output=True)
    return root


def read_params(root: Path) -> dict[str, Any]:
    return yaml.safe_load((root / "params.yaml").read_text(encoding="utf-8"))


def write_params(root: Path, params: dict[str, Any]) -> None:
    (root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")


def environment() -> dict[str, str]:
    """Ours without what names a server, and with one thread."""
    servers = ("PREFECT_", "MLFLOW_", "DVC_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(servers)}
    return env | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": ""}


def poemerge(project: Project, *arguments: str, timeout: float = 580.0) -> subprocess.CompletedProcess[str]:
    """`poemerge ARGUMENTS` in the project's folder."""
    return subprocess.run(
        [sys.executable, "-m", "poemerge", *arguments],
        cwd=project.root,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def working_in(folder: Path) -> list[psutil.Process]:
    """Every process whose working directory is `folder`: the flow, its server, DVC, the shell, the stage."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and Path(process.cwd()) == folder:
                found.append(process)
    return found
