"""`poemerge merge`: a one-off merge of local checkpoints, without the pipeline."""

from __future__ import annotations

import argparse
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

if TYPE_CHECKING:
    from poemerge.checkpoints import ExpertSet
    from poemerge.merging import MergeResult, Plan, Selection
    from poemerge.params import Family, MergeParams

EXAMPLE = """\
example:
  $ poemerge merge --base base --expert sums=sums --expert prose=prose-lora --out merged
  merged: 2 experts by poe (cauchy) in 6.4 s
    13 parameters merged, 26 averaged, 0 left at the base; private: prose 1, sums 1
    mean divergence from the experts' predictions in 96 steps: 0.029 to 0.002
    digest 3a9e696bf9a5
  $ poemerge merge --base base --expert sums=sums --expert prose=prose-lora --out merged --dry-run
  …prints what would be done with every parameter, the bytes, the memory and the time, and does nothing

A merge that was interrupted goes on where it stopped when the same command is given again.
Weights are safetensors; pickles are refused. Exit status: 0 done, 1 the work failed, 2 bad usage or bad input.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `poemerge merge`."""
    from poemerge.params import Family, Method, Preset, Scale, Side

    parser = subparsers.add_parser(
        "merge",
        help="merge local checkpoints, without the pipeline",
        description="Merge fine-tuned models and LoRA adapters of one base into a Hugging Face folder.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--base", required=True, metavar="DIR", help="the model that all experts came from; or s3://…")
    parser.add_argument(
        "--expert",
        required=True,
        action="append",
        metavar="NAME=DIR",
        help="a fine-tuned model or a PEFT LoRA adapter; give one or more",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the folder that the merge becomes")
    parser.add_argument("--method", choices=get_args(Method), help="default: poe")
    parser.add_argument("--expert-family", choices=get_args(Family), help="of method poe; default: cauchy")
    parser.add_argument("--tail-index", type=float, help="degrees of freedom, for --expert-family student_t")
    parser.add_argument("--preset", choices=get_args(Preset), help="the settings of the paper's released code")
    parser.add_argument("--side", choices=get_args(Side), help="side of the residual, for method poe")
    parser.add_argument(
        "--pooling",
        type=float,
        help="0 to 1, for --side both: shrinks input Grams to their mean (default: by each task vector's rank)",
    )
    parser.add_argument("--scale", choices=get_args(Scale), help="scale of an expert's energy")
    parser.add_argument("--scale-factor", type=float)
    parser.add_argument("--prior", choices=("relative", "absolute"))
    parser.add_argument("--prior-precision", type=float)
    parser.add_argument(
        "--coefficient",
        type=float,
        help="merged weight = base + coefficient · merged delta; default of poe: by the task vectors' length",
    )
    parser.add_argument(
        "--sensitivity",
        choices=("auto", "off"),
        help="auto (default): measure what experts that can be asked mind, by random inputs; off: do not",
    )
    parser.add_argument(
        "--refinement-steps",
        type=int,
        metavar="N",
        help="once solved: steps down the divergence from all experts' predictions; default 96, 0: as solved",
    )
    parser.add_argument("--include", action="append", metavar="GLOB", help="parameters to merge; default: all")
    parser.add_argument("--exclude", action="append", metavar="GLOB", help="parameters that stay at the base")
    parser.add_argument(
        "--override",
        action="append",
        default=[],
        metavar="GLOB:KEY=VALUE",
        help="another setting for some parameters, for instance '*embed*:method=task_arithmetic'",
    )
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:1; default: auto")
    parser.add_argument(
        "--dtype", choices=("base", "float32", "float16", "bfloat16"), help="of the result; default: base"
    )
    parser.add_argument("--max-memory", metavar="BYTES", help="for tensors at work, for instance 8GB; default: 4GB")
    parser.add_argument("--max-shard-size", metavar="BYTES", help="of one file of the result; default: 5GB")
    parser.add_argument("--engine", choices=("local", "dask"))
    parser.add_argument("--dask-address", metavar="HOST:PORT", help="the scheduler, for --engine dask")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--digests", action="store_true", help="hash the inputs too, for merge.json")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, write nothing")
    parser.add_argument("--json", action="store_true", help="print the plan or the outcome as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check, plan, and merge unless it is a dry run."""
    from poemerge.checkpoints.remote import as_path

    params, selection = _params(args), _selection(args)
    base = as_path(args.base)
    experts = _experts(args.expert)
    from poemerge.merging import merge, prepare
    from poemerge.merging.staging import check_output

    check_output(args.out)
    if args.dry_run:
        _, checkpoints, plan = prepare(base, experts, params, selection)
        try:
            _show_plan(args, checkpoints, plan, params.refinement_steps)
        finally:
            checkpoints.close()
        return 0
    started = time.monotonic()
    with _progress() as told:
        result = merge(base, experts, args.out, params, selection, digests=args.digests, progress=told)
    _show_result(args, result, time.monotonic() - started)
    return 0


def _experts(given: list[str]) -> dict[str, Path]:
    """Folders by expert name; raises ParamsError for what is no NAME=DIR, and for a name given twice."""
    from poemerge.checkpoints.remote import as_path
    from poemerge.errors import ParamsError, Problem

    found: dict[str, Path] = {}
    problems = []
    for text in given:
        name, equals, folder = text.partition("=")
        if not equals or not folder or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
            expected = "NAME=DIR, the name of letters, digits, dots, dashes and underscores"
            problems.append(Problem("--expert", repr(text), expected, "for instance --expert maths=runs/maths"))
        elif name in found:
            problems.append(Problem("--expert", f"{name} twice", "each name once", "rename one of them", expert=name))
        else:
            found[name] = as_path(folder)
    if problems:
        raise ParamsError(problems)
    return found


def _params(args: argparse.Namespace) -> MergeParams:
    """The flags as merge params; raises ParamsError with everything wrong."""
    from pydantic import ValidationError

    from poemerge.errors import ParamsError, Problem
    from poemerge.params import MergeParams

    given: dict[str, Any] = {
        key: value
        for key in MergeParams.model_fields
        if key not in {"overrides"} and (value := getattr(args, key, None)) is not None
    }
    overrides: dict[str, dict[str, str]] = {}
    problems = []
    for text in args.override:
        match = re.fullmatch(r"(.+):([a-z_]+)=(.+)", text)
        if match is None:
            expected = "GLOB:KEY=VALUE"
            problems.append(Problem("--override", repr(text), expected, "for instance '*embed*:method=mean'"))
        else:
            overrides.setdefault(match[1], {})[match[2]] = match[3]
    try:
        params = MergeParams(**given, overrides=overrides)  # type: ignore[arg-type]
    except ValidationError as error:
        for detail in error.errors():
            key = str(next(iter(detail["loc"]), "")).replace("overrides", "override").replace("_", "-")
            flag = f"--{key}" if key else "the flags"
            rest = ".".join(str(step) for step in detail["loc"][1:])
            got = repr(detail["input"]) if detail["type"] != "extra_forbidden" else f"unknown key {detail['loc'][-1]!r}"
            expected = detail["msg"].removeprefix("Value error, ")
            problems.append(Problem(f"{flag} {rest}".strip(), got, expected, "see poemerge merge --help"))
    if problems:
        raise ParamsError(problems)
    return params


def _selection(args: argparse.Namespace) -> Selection:
    from poemerge.errors import ParamsError, Problem
    from poemerge.merging import FamilyChoice, Selection

    if args.preset is not None and args.expert_family not in {None, "cauchy"}:
        got = f"--expert-family {args.expert_family} beside --preset {args.preset}"
        raise ParamsError(Problem("--expert-family", got, "one of them: a preset's experts are Cauchy", "drop one"))
    family: Family = args.expert_family or ("student_t" if args.tail_index is not None else "cauchy")
    if (family == "student_t") != (args.tail_index is not None):
        got = f"--expert-family {family}, --tail-index {args.tail_index}"
        raise ParamsError(
            Problem("--tail-index", got, "a tail index with student_t, and with it alone", "add or drop it")
        )
    if args.tail_index is not None and not args.tail_index > 0:
        raise ParamsError(Problem("--tail-index", str(args.tail_index), "a number above 0", "1 is Cauchy, try 3"))
    return Selection(FamilyChoice(family, args.tail_index))


class _progress:  # noqa: N801 - used as a function
    """A progress bar on a terminal, a line every ten seconds elsewhere; both on stderr."""

    def __enter__(self) -> Any:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        console = Console(stderr=True, highlight=False)
        self._bar: Progress | None = None
        last = time.monotonic()
        if console.is_terminal:
            columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, TextColumn("[dim]{task.description}"), console=console, transient=True)
            self._bar.start()
            task = self._bar.add_task("", total=None)

        def told(done: int, total: int, name: str) -> None:
            nonlocal last
            if self._bar is not None:
                self._bar.update(task, completed=done, total=total, description=name)
            elif time.monotonic() - last >= 10:
                last = time.monotonic()
                console.print(f"{done / 1e6:.0f} of {total / 1e6:.0f} MB written ({name})", soft_wrap=True)

        return told

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def _show_result(args: argparse.Namespace, result: MergeResult, seconds: float) -> None:
    import json

    from poemerge.merging.refinement import mean_divergence

    record = result.record
    if args.json:
        print(json.dumps({"out": str(result.out), "seconds": round(seconds, 3), **record}, indent=1))
        return
    rules = record["rules"]
    selection = record["selection"]
    family = f" ({selection['model']['family']})" if selection else ""
    print(f"{args.out}: {len(record['experts'])} experts by {record['method']}{family} in {seconds:.1f} s")
    private = ", ".join(f"{name} {len(names)}" for name, names in rules["private"].items() if names) or "none"
    counts = f"{len(rules['merged'])} parameters merged, {len(rules['averaged'])} averaged"
    print(f"  {counts}, {len(rules['left_at_base'])} left at the base; private: {private}")
    if result.resumed_shards:
        print(f"  {result.resumed_shards} finished shards of an earlier run were kept")
    for name, one in record["experts"].items():
        if one["lacks"]:
            print(f"  {name} lacks {len(one['lacks'])} of the base's parameters ({', '.join(one['lacks'][:3])} …)")
    refinement = record["refinement"]
    if (multiple := refinement.get("multiple", 1)) < 1:
        print(f"  too long for its experts as it was solved: {multiple:g} of it was added")
    if refinement["steps"] or multiple < 1:
        before, after = mean_divergence(refinement)
        kept = "" if refinement["kept"] else ", not kept"
        steps = f" in {refinement['steps']} steps" if refinement["steps"] else ""
        print(f"  mean divergence from the experts' predictions{steps}: {before:.3f} to {after:.3f}{kept}")
    print(f"  digest {record['digest'][:12]}")


def _show_plan(args: argparse.Namespace, checkpoints: ExpertSet, plan: Plan, refinement_steps: int) -> None:
    import json

    from poemerge.merging.estimate import estimate
    from poemerge.merging.refinement import why_not_asked, why_not_refined

    unasked = why_not_asked(checkpoints, plan, refinement_steps, plan.not_measured)
    why = unasked or why_not_refined(checkpoints, plan)
    cost = estimate(checkpoints, plan, None if unasked else 0 if why else refinement_steps)
    rules = {action: plan.names(action) for action in ("merged", "averaged", "left_at_base")}
    document = {
        "shards": [{"file": shard.file, "bytes": shard.nbytes} for shard in plan.shards],
        "bytes_read": plan.bytes_read,
        "bytes_written": plan.bytes_written,
        "peak_memory": cost.peak_memory,
        "seconds": cost.seconds,
        "rates": cost.rates,
        "rules": {**rules, "private": {name: list(names) for name, names in plan.private.items()}},
        "sensitivity": {name: plan.not_measured.get(name, "measured") for name in sorted(checkpoints.experts)},
        "refinement": {"steps": 0, "why": why} if why else {"steps": refinement_steps},
    }
    if args.json:
        print(json.dumps(document, indent=1))
        return
    from rich.table import Table

    from poemerge.cli.console import plain_console

    table = Table(box=None, header_style="bold")
    for column in ("parameters", "becomes", "method", "experts", "example"):
        table.add_column(column, justify="right" if column == "parameters" else "left", overflow="fold")
    groups: dict[tuple[str, ...], list[str]] = {}
    for one in plan.parameters:
        method = one.settings.method if one.settings is not None else one.why
        who = f"{len(one.experts)}{' factored' if one.factored else ''}"
        groups.setdefault((one.action.replace("_", " "), method, who), []).append(one.name)
    for (action, method, who), names in groups.items():
        table.add_row(str(len(names)), action, method, who, names[0])
    for name, own in plan.private.items():
        if own:
            table.add_row(str(len(own)), f"private to {name}", "", "1", own[0])
    console = plain_console()
    console.print(table)
    minded = [name for name in sorted(checkpoints.experts) if name not in plan.not_measured]
    if minded and any(one.minded for one in plan.parameters):
        console.print(
            f"measures what the predictions of {', '.join(minded)} are sensitive to first, unless it is known"
        )
    if why is None:
        console.print(f"refines the merge by {refinement_steps} steps towards what the experts predict")
    files = f"{len(plan.shards)} files" if len(plan.shards) > 1 else "one file"
    duration = f"about {_duration(cost.seconds)}" if cost.seconds >= 1 else "less than a second"
    console.print(
        f"reads {_size(plan.bytes_read)}, writes {_size(plan.bytes_written)} in {files}; "
        f"peak memory about {_size(cost.peak_memory)}; {duration} on this machine",
        soft_wrap=True,
    )


def _size(nbytes: int) -> str:
    """Bytes as people read them, in three digits: 144 kB, 1.05 GB."""
    value, units = float(nbytes), ["bytes", "kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.3g} {units[0]}"


def _duration(seconds: float) -> str:
    """Seconds as people read them: 40 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
