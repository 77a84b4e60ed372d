"""`poemerge evaluate`: a model on the project's suites, beside the base and the experts, outside the pipeline."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

__all__ = ["add_parser", "run"]

DESCRIPTION = """\
Score a merged model on the project's suites, beside the base and each suite's expert.

Without MODEL it is the project's own, artifacts/merged; MODEL is another folder of the same architecture, for instance
one that `poemerge merge` wrote. Scores made before with the same bytes are taken again. metrics/evaluation.json belongs
to the pipeline and is not touched: `poemerge run` writes it.

Example:
  $ poemerge evaluate --split validation --suite reuters
  task      base  merged  expert  normalised
  reuters  0.820   0.977   0.983       99.3%
  mean     0.820   0.977   0.983       99.3%
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command `evaluate`."""
    parser = subparsers.add_parser(
        "evaluate",
        help="score a model on the project's suites",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", nargs="?", type=Path, metavar="MODEL", help="folder of a model (default: the merged one)"
    )
    parser.add_argument("--suite", action="append", metavar="NAME", help="this suite only; may be given several times")
    parser.add_argument("--split", help="split of every suite, for instance validation (default: each suite's own)")
    parser.add_argument(
        "--baseline", action="append", default=[], metavar="METHOD", help="merge by this method too, and score that"
    )
    parser.add_argument(
        "--posterior-samples", type=int, default=0, metavar="N", help="score an ensemble of N draws of the merge too"
    )
    parser.add_argument(
        "--temperature", type=float, help="width of the draws (default: the best of several on the validation split)"
    )
    parser.add_argument("--json", action="store_true", help="everything that is known, as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Score and print."""
    import logging

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    evaluation = _evaluate(args)
    if args.json:
        print(json.dumps(evaluation, indent=2, ensure_ascii=False))
        return 0
    _print(evaluation)
    return 0


def _evaluate(args: argparse.Namespace) -> dict[str, Any]:
    from poemerge.contenders import Field, open_suites
    from poemerge.errors import ParamsError, Problem
    from poemerge.project import Project
    from poemerge.suites.evaluation import evaluate_models
    from poemerge.suites.runtime import choose_runtime
    from poemerge.suites.store import ScoreStore
    from poemerge.suites.summary import summarise

    project = Project.find()
    params = project.load_params()
    settings = params.evaluate
    wanted = args.suite or list(settings.suites)
    unknown = [name for name in wanted if name not in settings.suites]
    if unknown:
        raise ParamsError(
            Problem("--suite", unknown[0], f"one of {', '.join(settings.suites)}", "name a suite of params.yaml")
        )
    if args.model is not None and not (args.model / "config.json").is_file():
        raise ParamsError(
            Problem("MODEL", str(args.model), "a folder with config.json and *.safetensors", "check the path")
        )
    chosen = {name: settings.suites[name] for name in wanted}
    suites = open_suites(project, chosen, args.split)
    drawing = args.posterior_samples > 0
    validation = open_suites(project, chosen, "validation") if drawing and args.temperature is None else []
    field = Field.of(project)
    contenders = [field.base(), field.merged("merged", args.model), field.expert()]
    contenders[1:1] = [field.baseline(_method(name), params.merge) for name in args.baseline]
    runtime = choose_runtime(settings.device, settings.dtype, settings.batch_size)
    store = ScoreStore(project.state / "scores", project.scores)  # the pipeline's own are DVC's: read only
    results = {
        name: dict(row) for name, row in evaluate_models(suites, contenders, store, runtime, keep_others=True).items()
    }
    if drawing:
        from poemerge.ensemble import score_ensemble

        drawn, temperature = score_ensemble(
            field, suites, validation, store, runtime, count=args.posterior_samples, seed=settings.seed,
            temperature=args.temperature, merged=args.model,
        )  # fmt: skip
        for name, one in drawn.items():
            results[name][f"ensemble (T={temperature:g})"] = one
    return summarise(suites, results, store, project.root, samples=settings.bootstrap_samples, seed=settings.seed)


def _method(name: str) -> Any:
    from typing import get_args

    from poemerge.errors import ParamsError, Problem
    from poemerge.params import BaselineName

    if name not in get_args(BaselineName):
        raise ParamsError(Problem("--baseline", name, f"one of {', '.join(get_args(BaselineName))}", "choose one"))
    return name


def _print(evaluation: dict[str, Any]) -> None:

    from rich.table import Table

    from poemerge.cli.console import plain_console
    from poemerge.suites.summary import table_of

    rows = table_of(evaluation)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for place, heading in enumerate(rows[0]):
        table.add_column(heading, justify="left" if place == 0 else "right")
    for row in rows:
        cells = [
            "–" if value is None else f"{value:.1%}" if key == "normalised" else f"{value:.3f}"
            for key, value in row.items()
            if key != "task"
        ]
        table.add_row(row["task"], *cells)
    console = plain_console()
    console.print(table)
    calibration = Table(box=None, pad_edge=False, header_style="bold")
    for place, heading in enumerate(("model", "calibration error", "nll, nats")):
        calibration.add_column(heading, justify="left" if place == 0 else "right")
    for name in dict.fromkeys(who for suite in evaluation["suites"].values() for who in suite["scores"]):
        own = [
            suite["scores"][name] for suite in evaluation["suites"].values() if "ece" in suite["scores"].get(name, {})
        ]
        if own:
            ece, nll = (sum(one[key] for one in own) / len(own) for key in ("ece", "nll"))
            calibration.add_row(name, f"{ece:.3f}", f"{nll:.3f}")
    if calibration.row_count:
        console.print(calibration)
