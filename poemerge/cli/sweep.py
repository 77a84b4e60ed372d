"""`poemerge sweep`: search for better settings of the merge, on validation data."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

__all__ = ["add_parser", "run"]

DESCRIPTION = """\
Search for settings of the merge (expert family, side, pooling, scale factor, prior precision, automatic length or
coefficient, and with --method the method) that score best on the suites' validation split. Test data takes no part.
The first trial is what params.yaml has now; each trial is a run in MLflow, nested in the sweep's.

Example:
  $ poemerge sweep --trials 20 --minutes 22 --examples 100 --write --report
  18 trials, best 0.9866 (params.yaml had 0.9781):
    method poe, family cauchy, side output, scale_factor 1.87, prior_precision 0.00046, automatic length
  Written into params.yaml: `poemerge run` merges by it.
  Report: .poemerge/sweep/index.html
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command `sweep`."""
    parser = subparsers.add_parser(
        "sweep",
        help="search for better settings, on validation data",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--trials", type=int, default=20, help="merges at most (default: %(default)s)")
    parser.add_argument("--minutes", type=float, help="start no trial after this time (default: no limit)")
    parser.add_argument(
        "--method", action="append", metavar="METHOD", help="a method to choose from; may be repeated (default: poe)"
    )
    parser.add_argument("--split", default="validation", help="split to score on (default: %(default)s)")
    parser.add_argument("--examples", type=int, metavar="N", help="examples of each suite (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the proposals (default: %(default)s)")
    parser.add_argument("--write", action="store_true", help="put the winner into params.yaml, if it is better")
    parser.add_argument("--report", action="store_true", help="say where the page with the response surface is")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run flows/sweep.py here."""
    from poemerge.cli.flows import load, prefect_here
    from poemerge.errors import ParamsError, Problem
    from poemerge.project import Project
    from poemerge.search.sweep import SweepSettings, check_settings

    for flag, value in (("--trials", args.trials), ("--minutes", args.minutes), ("--examples", args.examples)):
        if value is not None and value <= 0:
            raise ParamsError(Problem(flag, str(value), "a positive number", "give one"))
    project = Project.find()
    settings = SweepSettings(
        trials=args.trials,
        minutes=args.minutes,
        methods=tuple(args.method or ["poe"]),
        split=args.split,
        max_examples=args.examples,
        seed=args.seed,
    )
    check_settings(project.load_params(), settings)
    with prefect_here(project):
        module = load(project, "flows.sweep")
        found = module.sweep(module.Sweep(**asdict(settings), write=args.write))
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    print(f"{found['trials']} trials, best {found['score']:.4f} (params.yaml had {found['current']:.4f}):")
    words = [f"{name} {value}" for name, value in found["best"].items()]
    if found["best"]["method"] == "poe" and "coefficient" not in found["best"]:
        words.append("automatic length")
    print("  " + ", ".join(words))
    if found["written"]:
        print("Written into params.yaml: `poemerge run` merges by it.")
    elif args.write:
        print("Nothing better was found: params.yaml stays as it is.")
    if args.report:
        print(f"Report: {found['page']}")
    return 0
