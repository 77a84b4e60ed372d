"""`poemerge rollback`: restore the champion of before."""

from __future__ import annotations

import argparse

__all__ = ["add_parser", "run"]

DESCRIPTION = """\
Restores the version with the alias `previous` as champion, at once and without gates: it passed them when it became
champion. The version taken back counts as withdrawn: it does not become champion by itself again.

example:
  $ poemerge rollback --reason "complaints about sentiment"
  version 1 (426ba34ed8f2) is champion again in place of version 3
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "rollback",
        help="restore the champion of before",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--reason", required=True, help="why; kept in the log of decisions")
    parser.add_argument("--by", help="who asks (default: the MLflow user, else the user of this machine)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Moves the alias back, and says so."""
    from poemerge.project import Project
    from poemerge.registry.journal import whoami
    from poemerge.registry.promotion import roll_back

    done = roll_back(Project.find(), by=args.by or whoami(), reason=args.reason)
    print(f"version {done.version} ({done.digest[:12]}) is champion again in place of version {done.champion_before}")
    return 0
