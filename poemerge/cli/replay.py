"""`poemerge replay`: make a registered version again, and say whether it is the same."""

from __future__ import annotations

import argparse
import contextlib
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from poemerge.project import Project
    from poemerge.registry.replay import Comparison, Recipe

__all__ = ["add_parser", "run"]

DESCRIPTION = """\
Makes a registered version again from what the registry and the DVC remote keep: the code at its commit (with the
changes that it had), its params and its inputs, and the merge alone. Says whether the digest is identical, or how far
it is off. Works in a fresh clone whose DVC remote is set up; nothing in the checkout changes.

example:
  $ poemerge replay champion
  version 2: code 47c8641f01b2, 7 experts, device cpu
  inputs fetched from the DVC remote, merging …
  identical: digest 91d0c2a47be1…

Exit status 0 when it is identical (or within 1e-4 where the device or a library differs), 1 when it is not.
"""

INPUTS = ("data/base", "data/experts", "artifacts/tail", "artifacts/expert.json")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "replay",
        help="make a registered version again and compare",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("version", help="a version's number, an alias, or the beginning of a digest")
    parser.add_argument("--out", help="keep the merged folder here")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Replays and compares."""
    import json
    import shutil
    import sys
    import tempfile
    from dataclasses import asdict

    from poemerge.project import Project
    from poemerge.registry.replay import compare, recipe

    project = Project.find()
    project.state.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="replay-", dir=project.state) as scratch:
        made = recipe(project, args.version, Path(scratch) / "recipe")
        document = made.document
        code = document["git"]["commit"]
        print(
            f"version {made.version.version}: code {(code or 'unknown')[:12]}, {len(document['experts'])} experts, "
            f"device {document['device']}",
            file=sys.stderr,
        )
        tree = Path(scratch) / "tree"
        with _worktree(project.root, tree, code):
            again = _prepare(project, made, tree)
            print("inputs fetched from the DVC remote, merging …", file=sys.stderr)
            _call([sys.executable, "-m", "tasks", "merge"], tree, "the merge stage")
            outcome = compare(project, made, again.merged)
            if args.out is not None:
                shutil.copytree(again.merged, Path(args.out), copy_function=shutil.copyfile)
    if args.json:
        content = {**asdict(outcome), "identical": outcome.identical, "version": int(made.version.version)}
        print(json.dumps(content, indent=2))
    else:
        print(_verdict(outcome))
    return 0 if outcome.reproduced else 1


def _verdict(outcome: Comparison) -> str:
    changed = ", ".join(f"{name} {then} → {now}" for name, (then, now) in outcome.changed.items())
    if outcome.identical:
        return f"identical: digest {outcome.registered}"
    explained = f" (changed since: {changed})" if changed else " with the same device and libraries"
    return (
        f"not identical: registered {outcome.registered[:12]}, replayed {outcome.replayed[:12]}; largest relative "
        f"difference {outcome.relative:.3g} in {outcome.tensor}{explained}"
    )


@contextlib.contextmanager
def _worktree(root: Path, tree: Path, commit: str | None) -> Iterator[None]:
    """The code at `commit` in the new folder `tree`, which leaves git's list when the block ends."""
    from poemerge.errors import ProjectError

    git = ["git", "-C", str(root)]
    if commit is None:
        raise ProjectError(
            "This version cannot be replayed.\n  got:      no git commit in its lineage\n"
            "  expected: a version registered from a git checkout\n  next:     replay one that was"
        )
    known = subprocess.run([*git, "cat-file", "-e", f"{commit}^{{commit}}"], check=False, capture_output=True)
    if known.returncode != 0:
        raise ProjectError(
            f"The code of this version is not in this clone.\n  got:      no commit {commit}\n"
            "  expected: a clone that has it\n  next:     git fetch --all, or clone without --depth"
        )
    _call([*git, "worktree", "add", "--quiet", "--detach", str(tree), commit], root, "git worktree")
    try:
        yield
    finally:
        subprocess.run([*git, "worktree", "remove", "--force", str(tree)], check=False, capture_output=True)


def _prepare(project: Project, made: Recipe, tree: Path) -> Project:
    """The tree as the project was: code changes, params, locks; and the merge's inputs from the DVC remote."""
    import shutil
    import sys

    from poemerge.project import Project as ProjectClass

    patch = made.files / "code.patch"
    if patch.is_file():
        _call(["git", "apply", "--whitespace=nowarn", str(patch)], tree, "git apply of the code's changes")
    for name in ("params.yaml", "dvc.yaml", "dvc.lock", "sources.lock"):
        if (made.files / name).is_file():
            shutil.copyfile(made.files / name, tree / name)
    # The remote may be set up, and its credentials kept, in this clone only.
    for name in ("config", "config.local"):
        if (project.root / ".dvc" / name).is_file():
            (tree / ".dvc").mkdir(exist_ok=True)
            shutil.copyfile(project.root / ".dvc" / name, tree / ".dvc" / name)
    cache = project.root / ".dvc" / "cache"
    dvc = [sys.executable, "-m", "dvc"]
    _call([*dvc, "cache", "dir", "--local", str(cache)], tree, "dvc cache dir")
    known = (tree / "dvc.lock").read_text(encoding="utf-8")
    inputs = [path for path in INPUTS if f"path: {path}\n" in known]
    _call([*dvc, "pull", *inputs], tree, "dvc pull of the merge's inputs")
    return ProjectClass(tree)


def _call(command: Sequence[str], cwd: Path, what: str) -> None:
    """Runs it in `cwd`; raises StageError with the last lines it wrote when it fails."""
    import os

    from poemerge.errors import StageError

    env = {**os.environ, "DVC_NO_ANALYTICS": "1", "PYTHONPATH": str(cwd)}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()][-4:]
        raise StageError(
            f"{what} failed.\n  got:      {' / '.join(last)[:800]}\n  expected: status 0, got {done.returncode}\n"
            "  next:     check that this clone has the DVC remote (`dvc remote list`) and the version's commit"
        )
