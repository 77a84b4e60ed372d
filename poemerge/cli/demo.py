"""`poemerge demo`: the offline zoo, the whole pipeline, and what came of it."""

from __future__ import annotations

import argparse

__all__ = ["add_parser", "run"]

DESCRIPTION = """\
Build the offline zoo (once), run the pipeline on it, print what came of it: what `make demo` does.

$ poemerge demo

Scores are of the test splits; the report and the pages hold the rest. Run again, it finds nothing to do.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `demo` to the command line."""
    parser = subparsers.add_parser(
        "demo",
        help="real task models, made offline and merged",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)


def run(_args: argparse.Namespace) -> int:
    """Build what is missing of the zoo, then run as `poemerge run` does."""
    import subprocess
    import sys

    from poemerge.cli.flows import run_remerge
    from poemerge.cli.verdict import say_verdict
    from poemerge.errors import StageError
    from poemerge.preflight import preflight
    from poemerge.project import Project

    project = Project.find()
    project.load_params()
    if (
        subprocess.run([sys.executable, "-m", "poemerge", "zoo", "build"], cwd=project.root, check=False).returncode
        != 0
    ):
        raise StageError("The zoo was not built.\n  next:     see above; `poemerge zoo build` alone tries again")
    preflight(project)
    run_remerge(project, reason="demo")
    say_verdict(project)
    return 0
