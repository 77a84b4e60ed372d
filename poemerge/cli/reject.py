"""`poemerge reject`: refuse the promotion of a version that waits."""

from __future__ import annotations

import argparse

__all__ = ["add_parser", "run"]

DESCRIPTION = """\
Refuses the promotion of a version that waits for approval; the champion stays.

example:
  $ poemerge reject 3 --reason "worse on long texts"
  version 3 is rejected; the champion stays
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "reject",
        help="refuse a promotion that waits",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("version", help="the version that waits")
    parser.add_argument("--reason", required=True, help="why; kept in the log of decisions")
    parser.add_argument("--by", help="who rejects (default: the MLflow user, else the user of this machine)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Answers, and says what came of it."""
    from poemerge.cli.approve import answer

    return answer(args, approve=False)
