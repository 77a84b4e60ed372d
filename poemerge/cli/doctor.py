"""`poemerge doctor`: is everything here that a run needs, and in a version that works."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from poemerge.project import Project

__all__ = ["add_parser", "run"]

DESCRIPTION = """\
Check the environment: versions that are known to break, git, DVC, disk, memory, device, servers, params.yaml.

$ poemerge doctor
ok    python     3.11.7
ok    fastapi    0.150.2
warn  device     no GPU: merges run on the CPU
"""

BROKEN = {
    "fastapi": ("0.151", "Prefect's server dies at start with it"),
    "sqlalchemy": ("2.1", "Prefect's server looks healthy with it, and schedules never make a run"),
    "prefect": ("4", "the flows are written for Prefect 3"),
    "mlflow": ("4", "the registry is written for MLflow 3"),
    "dvc": ("4", "dvc.yaml is written for DVC 3"),
}
"""Packages, the first version that does not work, and why: pip's own check passes on the broken sets."""

NEEDED = ("torch", "transformers", "safetensors", "huggingface_hub", "pydantic")


@dataclass(frozen=True)
class Check:
    """One thing looked at: ok, warn (a run works, less well) or bad (it does not)."""

    verdict: Literal["ok", "warn", "bad"]
    what: str
    found: str
    next_step: str = ""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `doctor` to the command line."""
    parser = subparsers.add_parser(
        "doctor",
        help="check the environment",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print the checks as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print every check; 1 when something is bad."""
    import json

    from poemerge.errors import ProjectError
    from poemerge.project import Project

    checks = [*_versions(), *_machine()]
    try:
        project = Project.find()
    except ProjectError as error:
        checks.append(Check("bad", "project", str(error).splitlines()[0], "change into a checkout of poemerge"))
    else:
        checks += [check for look in (_repository, _disk, _params, _servers) for check in look(project)]
    if args.json:
        print(json.dumps([asdict(check) for check in checks], indent=2, ensure_ascii=False))
    else:
        for check in checks:
            hint = f"  → {check.next_step}" if check.next_step else ""
            print(f"{check.verdict:<5} {check.what:<16} {check.found}{hint}")
    return int(any(check.verdict == "bad" for check in checks))


def _versions() -> Iterator[Check]:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    from packaging.version import Version

    yield Check("ok", "python", platform.python_version())
    for name in (*BROKEN, *NEEDED):
        try:
            found = version(name)
        except PackageNotFoundError:
            yield Check("bad", name, "not installed", f"pip install --constraint constraints.txt {name}")
            continue
        limit, why = BROKEN.get(name, (None, ""))
        if limit is not None and Version(found) >= Version(limit):
            yield Check("bad", name, f"{found}: {why}", f"pip install '{name}<{limit}'")
        else:
            yield Check("ok", name, found)


def _machine() -> Iterator[Check]:
    import os

    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        name = torch.cuda.get_device_name()
        yield Check("ok", "device", f"{name}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free")
    elif torch.backends.mps.is_available():
        yield Check("ok", "device", "Apple GPU")
    else:
        yield Check("ok", "device", f"no GPU; {os.cpu_count()} CPU cores")
    spinning = os.environ.get("OMP_WAIT_POLICY", "PASSIVE").upper() == "ACTIVE"
    if spinning:
        yield Check("warn", "threads", "OMP_WAIT_POLICY=ACTIVE: threads spin while they wait", "unset it")


def _repository(project: Project) -> Iterator[Check]:
    import shutil
    import subprocess

    if shutil.which("git") is None:
        yield Check("warn", "git", "not found: runs are not tied to a commit", "install git")
    else:
        asked = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=project.root, capture_output=True, text=True, check=False
        )
        if asked.returncode == 0:
            yield Check("ok", "git", f"commit {asked.stdout.strip()}")
        elif any((folder / ".git").exists() for folder in (project.root, *project.root.parents)):
            yield Check("warn", "git", "no commit here: runs are not tied to one", "git commit")
        else:
            yield Check("bad", "git", "no repository here, and DVC works within one", "git init; git commit")
    if not (project.root / ".dvc").is_dir():
        yield Check("bad", "dvc repository", "no .dvc folder", "dvc init")
        return
    from dvc.config import Config

    remote = Config(str(project.root / ".dvc"))["core"].get("remote")
    if remote is None:
        yield Check("warn", "dvc remote", "none: versions' bytes stay on this machine", "dvc remote add --default …")
    else:
        yield Check("ok", "dvc remote", remote)


def _disk(project: Project) -> Iterator[Check]:
    import shutil

    free = shutil.disk_usage(project.root).free
    held = sum(path.stat().st_size for path in project.experts.rglob("*") if path.is_file())
    # A run writes the experts once more (fetch), and the merge; what DVC keeps is linked where the disk can.
    wanted = max(2 * held, 10**9)
    enough = free >= wanted
    yield Check(
        "ok" if enough else "warn",
        "disk",
        f"{free / 1e9:.1f} GB free, {wanted / 1e9:.1f} GB wanted",
        "" if enough else "`poemerge gc` or another disk",
    )


def _params(project: Project) -> Iterator[Check]:
    from poemerge.errors import BadInputError
    from poemerge.preflight import preflight

    try:
        params = preflight(project)
    except BadInputError as error:
        for problem in error.problems:
            yield Check("bad", "params.yaml", f"{problem.where}: {problem.got}", problem.next_step)
    else:
        yield Check("ok", "params.yaml", f"{len(params.experts)} experts, {len(params.collections)} collections")


def _servers(project: Project) -> Iterator[Check]:
    import os

    from poemerge.servers import answers, published

    configured: dict[str, tuple[str | None, Callable[[str], str]]] = {
        "prefect": (os.environ.get("PREFECT_API_URL"), lambda url: f"{url}/health"),
        "mlflow": (os.environ.get("MLFLOW_TRACKING_URI"), lambda url: f"{url}/health"),
    }
    running = published(project)
    for name, (url, health) in configured.items():
        if url is None or not url.startswith("http"):
            yield Check("ok", name + " server", running.get(name, url or "our own, when needed"))
        elif answers(health(url), seconds=10.0):
            yield Check("ok", name + " server", url)
        else:
            yield Check("bad", name + " server", f"{url} does not answer", "start it, or unset the variable")
