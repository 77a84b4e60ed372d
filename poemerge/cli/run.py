"""`poemerge run`: one re-merge now, with what it does shown live."""

from __future__ import annotations

import argparse

__all__ = ["add_parser", "run"]

DESCRIPTION = """\
Bring the project around the working directory up to date: resolve every source, then run the stages that have work.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `run` to the command line."""
    parser = subparsers.add_parser(
        "run",
        help="bring the merge up to date, now",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--reason", default="by hand", help="kept with the run, for people (default: %(default)s)")
    parser.add_argument("--verbose", action="store_true", help="show every line of every stage on a terminal too")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check the input, run the flow in this process, and print what came of it."""
    from poemerge.cli.flows import run_remerge
    from poemerge.cli.verdict import say_verdict
    from poemerge.preflight import preflight
    from poemerge.project import Project

    project = Project.find()
    preflight(project)
    run_remerge(project, reason=args.reason, verbose=args.verbose)
    say_verdict(project)
    return 0
