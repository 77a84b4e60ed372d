"""`python -m tasks NAME`: run one stage of the project around here, as dvc.yaml's commands do."""

from __future__ import annotations

import importlib
import json
import logging
import os
import resource
import sys
import traceback
from collections.abc import Sequence

# Before torch is imported by a stage: threads that spin while they wait slow every other job on the machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from poemerge import lifeline
from poemerge.errors import PoemergeError
from poemerge.project import STAGES, Project
from poemerge.wholefile import write_whole
from tasks.report import StageReport

__all__ = ["main"]


def main(argv: Sequence[str]) -> int:
    """Run the stage argv[0] and write its report; returns the exit status. A failure is also written to the project."""
    if len(argv) != 1 or argv[0] not in STAGES:
        print(f"usage: python -m tasks {{{','.join(STAGES)}}}", file=sys.stderr)  # noqa: T201
        return 2
    name = argv[0]
    lifeline.hold()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    try:
        project = Project.find()
    except PoemergeError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return error.exit_status
    failure = project.stage_failure(name)
    failure.unlink(missing_ok=True)
    try:
        stage = getattr(importlib.import_module(f"tasks.{name}"), name)
        report: StageReport = stage(project, project.load_params())
        report.write(project.stage_report(name))
        _remember_memory(project, name)
    except PoemergeError as error:
        _write_failure(project, name, str(error), error.exit_status)
        print(error, file=sys.stderr)  # noqa: T201
        return error.exit_status
    except Exception as error:
        # The traceback goes to the log; the person who reads the failure first needs its one line.
        _write_failure(project, name, f"{type(error).__name__}: {error}", 1)
        traceback.print_exc()
        return 1
    return 0


def _remember_memory(project: Project, name: str) -> None:
    """Keep the peak of this process, which is the stage's: ru_maxrss, in KiB on Linux."""
    path = project.stage_memory
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    known[name] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(known, indent=2) + "\n")


def _write_failure(project: Project, name: str, message: str, exit_status: int) -> None:
    path = project.stage_failure(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps({"message": message, "exit_status": exit_status}) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
