"""`poemerge approve`: let a version that waits become champion."""

from __future__ import annotations

import argparse

__all__ = ["add_parser", "answer", "run"]

DESCRIPTION = """\
Approves the promotion of a version that waits for it. The gates are judged again, against the champion there is now,
and the alias moves. With `register.two_person: true` somebody else than who asked must approve.

example:
  $ poemerge approve 3 --reason "checked by hand on ten tickets"
  version 3 is champion in place of version 1
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "approve",
        help="approve a promotion that waits",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("version", help="the version that waits: its number, an alias, or the beginning of its digest")
    parser.add_argument("--reason", default="", help="why; kept in the log of decisions")
    parser.add_argument("--by", help="who approves (default: the MLflow user, else the user of this machine)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Answers, and says what came of it."""
    return answer(args, approve=True)


def answer(args: argparse.Namespace, *, approve: bool) -> int:
    """What approve and reject share."""
    from poemerge.cli import decisions
    from poemerge.project import Project
    from poemerge.registry.journal import whoami
    from poemerge.registry.promotion import find_request

    project = Project.find()
    request = find_request(project, args.version)
    result = decisions.answer(project, request.ticket, approve=approve, by=args.by or whoami(), reason=args.reason)
    if not approve:
        print(f"version {request.version} is rejected; the champion stays")
        return 0
    before = (result or {}).get("champion_before")
    print(f"version {request.version} is champion{f' in place of version {before}' if before else ''}")
    return 0
