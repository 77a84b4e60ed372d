"""`poemerge promote`: make a version champion."""

from __future__ import annotations

import argparse

__all__ = ["add_parser", "run"]

DESCRIPTION = """\
Makes a version champion: the gates of register.gates are judged against the champion there is now; with
`register.approval: required` the request then waits for `poemerge approve`; then the alias moves.

example:
  $ poemerge promote 3 --reason "reuters retrained"
  version 3 is champion in place of version 1
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "promote",
        help="make a version champion",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("version", help="a version's number, an alias (candidate), or the beginning of a digest")
    parser.add_argument("--reason", default="", help="why; kept in the log of decisions")
    parser.add_argument("--by", help="who asks (default: the MLflow user, else the user of this machine)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the flow and says what came of it."""
    from poemerge.cli.decisions import promote
    from poemerge.project import Project
    from poemerge.registry.journal import whoami
    from poemerge.registry.promotion import find

    project = Project.find()
    # By its number from here on: an alias may stand elsewhere when the answer comes.
    version = find(project, args.version).version
    result = promote(project, version, by=args.by or whoami(), reason=args.reason)
    if result is None:
        print(f"version {version} passed every gate and waits for approval: poemerge approve {version}")
    elif not result.get("moved", True):
        print(f"version {result['version']} is champion already")
    else:
        before = result.get("champion_before")
        print(f"version {result['version']} is champion{f' in place of version {before}' if before else ''}")
    return 0
