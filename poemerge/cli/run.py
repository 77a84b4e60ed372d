"""`poemerge run`: one re-merge now, with what it does shown live."""

from __future__ import annotations

import argparse

__all__ = ["add_parser", "run"]

DESCRIPTION = """\
Bring the project around the working directory up to date: resolve every source, then run the stages that have work.

$ poemerge run
fetch         unchanged      0.4 s  3 experts, 3 suites: 7 fetched, 0 already there
task_vectors  unchanged      0.1 s  3 task vectors, norms 0.446 to 3.07, cosines -0.003 to 0.013
tail          unchanged      0.2 s  residuals of 3 experts, side both: student_t fits best; Student-t has ν = 6.59
expert        unchanged      0.2 s  student_t with ν = 6.59: best held-out log-likelihood of 3 families …
merge         ran           17.7 s  3 experts by poe: 13 parameters merged, 26 averaged, 0 left at the base, in 1.5 s
evaluate      ran           25.8 s  merged 0.3333, 96.3% of the experts' (0.3472)
register      ran           28.1 s  tiny version 2 became champion in place of version 1
...

What changed since the last run is done again, nothing else: `poemerge plan` says it beforehand. A value set back is
taken from DVC's run cache. Ctrl-C ends the stage at work; the next run takes it up again. Exit status: 0 done, 1 a
stage failed, 2 params.yaml or a checkpoint is wrong (all problems are told, and nothing was started).
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
    summary = run_remerge(project, reason=args.reason, verbose=args.verbose)
    say_verdict(project, approval=summary["approval"])
    return 0
