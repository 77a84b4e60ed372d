"""`poemerge gc`: remove old candidates and what only they need."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

__all__ = ["add_parser", "cache_files", "lost_folders", "run"]

DESCRIPTION = """\
Removes old candidates: registered versions beyond the newest --keep, with their runs and artifacts, and the entries of
the local DVC cache that only they refer to. Never a version that has an alias, was ever champion or waits for approval;
never a cache entry that the workspace or a version that stays needs, so every version that stays can be replayed. The
DVC remote is left alone. Where the local cache lacks the list of files of a folder that a version which stays needs,
every cache file stays. What a removed version was made of stays known: `poemerge lineage --recall` finds it.

example:
  $ poemerge gc --keep 10 --dry-run
  would remove 2 versions: 4 (b27c1f9e0a55), 3 (5d10c77fe812)
  would remove 6 cache files, 45.9 MB
"""

MD5 = re.compile(r"^\s*-?\s*md5: ([0-9a-f]{32}(?:\.dir)?)\s*$", re.MULTILINE)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "gc",
        help="remove old candidates and what only they need",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--keep", type=int, default=10, help="how many of the newest versions stay (default: 10)")
    parser.add_argument("--dry-run", action="store_true", help="list, remove nothing")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Plans, says, removes."""
    from poemerge.errors import BadInputError, Problem
    from poemerge.filelock import exclusive
    from poemerge.project import Project
    from poemerge.registry.gc import plan, remove

    if args.keep < 1:
        raise BadInputError(Problem("--keep", got=str(args.keep), expected="1 or more", next_step="keep at least one"))
    project = Project.find()
    # Neither a re-merge nor a DVC command of ours may run while entries of the cache go.
    with exclusive(project.run_lock), exclusive(project.dvc_guard):
        what = plan(project, args.keep)
        cache = project.root / ".dvc" / "cache" / "files" / "md5"
        here = [path.read_text(encoding="utf-8") for path in _locks_here(project.root)]
        needed = cache_files(cache, [*here, *(what.locks[version.version] for version in what.kept)])
        unknown = {version.version: lost_folders(cache, what.locks[version.version]) for version in what.kept}
        unknown = {version: folders for version, folders in unknown.items() if folders}
        # Any file may be one that a folder without its list holds.
        gone = [] if unknown else [what.locks[version.version] for version in what.gone]
        old = cache_files(cache, gone) - needed
        present = sorted(path for path in old if path.is_file())
        size = sum(path.stat().st_size for path in present)
        verb = "would remove" if args.dry_run else "removed"
        if not args.dry_run:
            remove(project, what)
            for path in present:
                path.unlink()
    names = ", ".join(f"{version.version} ({version.digest[:12]})" for version in what.gone)
    print(f"{verb} {_count(len(what.gone), 'version')}{': ' if names else ''}{names}")
    if what.runs:
        print(f"{verb} {_count(len(what.runs), 'run')} that registrations left behind")
    print(f"{verb} {_count(len(present), 'cache file')}, {size / 1e6:.1f} MB")
    if unknown:
        print("every cache file stays: the DVC cache lacks the list of files of folders that these versions need")
        for version, folders in unknown.items():
            print(f"  version {version}: {', '.join(folders)}")
        print("  next: `dvc fetch --all-commits` brings the lists from the DVC remote, before old versions go")
    return 0


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def cache_files(cache: Path, locks: Iterable[str]) -> set[Path]:
    """The files of the DVC `cache` (…/files/md5) that dvc.lock texts refer to: each entry, and what a folder's entry
    lists.

    A folder whose own entry is not in the cache any more, or cannot be read, adds only itself.
    """
    found: set[Path] = set()
    for text in locks:
        for digest in MD5.findall(text):
            path = cache / digest[:2] / digest[2:]
            if path in found:
                continue
            found.add(path)
            if digest.endswith(".dir"):
                found |= {cache / member[:2] / member[2:] for member in _members(path) or ()}
    return found


def lost_folders(cache: Path, lock: str) -> list[str]:
    """The outputs of the stages in the text `lock` of a dvc.lock that are folders of whose files nothing is known, for
    the DVC `cache` has no entry of theirs that can be read.
    """
    stages: dict[str, dict[str, Any]] = (yaml.safe_load(lock) or {}).get("stages") or {}
    # Not what stages depend on: our own code is no output, so it is never in the cache.
    outs = [out for stage in stages.values() for out in stage.get("outs", ())]
    return [
        out["path"]
        for out in outs
        if (digest := out.get("md5", "")).endswith(".dir") and _members(cache / digest[:2] / digest[2:]) is None
    ]


def _members(entry: Path) -> list[str] | None:
    """The digests of the files that the `entry` of a folder lists; None where it is not there or cannot be read."""
    try:
        return [member["md5"] for member in json.loads(entry.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _locks_here(root: Path) -> list[Path]:
    """Every dvc.lock and .dvc file of the workspace."""
    skip = {".venv", ".git", ".poemerge", "node_modules"}
    found = []
    for path in (root, *(p for p in root.iterdir() if p.is_dir() and p.name not in skip and p.name != ".dvc")):
        files = path.iterdir() if path == root else path.rglob("*")
        found += [f for f in files if f.is_file() and (f.name == "dvc.lock" or f.suffix == ".dvc")]
    return found
