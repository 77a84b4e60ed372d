"""The paths of a project, spelt here and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from poemerge.errors import ProjectError
from poemerge.params import Params
from poemerge.params_file import load_params

__all__ = ["STAGES", "Project"]

STAGES = ("fetch", "task_vectors", "tail", "expert", "merge", "evaluate", "register")
"""The stages in their order; dvc.yaml has one of each name."""


@dataclass(frozen=True)
class Project:
    """A folder with params.yaml and dvc.yaml, and what the stages make in it. `root` is absolute."""

    root: Path

    @staticmethod
    def find(start: Path | None = None) -> Project:
        """The project that `start` (default: the working directory) lies in, found by walking up to params.yaml.

        Raises ProjectError when there is none.
        """
        here = (start or Path.cwd()).resolve()
        for folder in (here, *here.parents):
            if (folder / "params.yaml").is_file() and (folder / "dvc.yaml").is_file():
                return Project(folder)
        raise ProjectError(
            f"No project here.\n  got:      {here}, with no params.yaml and dvc.yaml in it or in a folder above\n"
            "  expected: a checkout of poemerge (a team's own copy)\n"
            "  next:     change into it, or clone one"
        )

    def load_params(self) -> Params:
        """Params of this project; raises ParamsError with every problem of the file."""
        return load_params(self.params_yaml)

    # What the team writes.
    @property
    def params_yaml(self) -> Path:
        return self.root / "params.yaml"

    @property
    def dvc_yaml(self) -> Path:
        return self.root / "dvc.yaml"

    @property
    def dvc_lock(self) -> Path:
        return self.root / "dvc.lock"

    @property
    def sources_lock(self) -> Path:
        """The revision and digest that every source had when it was last resolved; what fetch brings."""
        return self.root / "sources.lock"

    # What fetch brings.
    @property
    def base(self) -> Path:
        return self.root / "data" / "base"

    @property
    def experts(self) -> Path:
        return self.root / "data" / "experts"

    def expert(self, name: str) -> Path:
        return self.experts / name

    @property
    def suites(self) -> Path:
        return self.root / "data" / "suites"

    def suite(self, name: str) -> Path:
        """The data that fetch brought for the suite `name`."""
        return self.suites / name

    def expert_folders(self) -> dict[str, Path]:
        """The fetched experts by name, in order of name."""
        return {path.name: path for path in sorted(self.experts.iterdir()) if (path / "source.json").is_file()}

    # What the stages make.
    @property
    def artifacts(self) -> Path:
        return self.root / "artifacts"

    def stage_report(self, stage: str) -> Path:
        return self.artifacts / "stages" / f"{stage}.json"

    @property
    def task_vectors(self) -> Path:
        return self.artifacts / "task_vectors"

    @property
    def task_vectors_manifest(self) -> Path:
        return self.task_vectors / "manifest.json"

    @property
    def tail(self) -> Path:
        return self.artifacts / "tail"

    @property
    def tail_json(self) -> Path:
        return self.tail / "tail.json"

    @property
    def residuals_png(self) -> Path:
        return self.tail / "residuals.png"

    @property
    def expert_json(self) -> Path:
        return self.artifacts / "expert.json"

    @property
    def merged(self) -> Path:
        return self.artifacts / "merged"

    @property
    def merge_json(self) -> Path:
        return self.merged / "merge.json"

    @property
    def ledger(self) -> Path:
        return self.merged / "ledger.jsonl"

    @property
    def scores(self) -> Path:
        """Scores and per-example predictions by digest of model and data, kept between runs."""
        return self.artifacts / "scores"

    @property
    def report_html(self) -> Path:
        return self.artifacts / "report" / "index.html"

    @property
    def evaluation_json(self) -> Path:
        return self.root / "metrics" / "evaluation.json"

    @property
    def registration_json(self) -> Path:
        return self.root / "metrics" / "registration.json"

    # What servers and caches keep; never versioned.
    @property
    def state(self) -> Path:
        return self.root / ".poemerge"

    @property
    def mlflow_db(self) -> Path:
        return self.state / "mlflow" / "mlflow.db"

    @property
    def mlflow_artifacts(self) -> Path:
        return self.state / "mlflow" / "artifacts"

    @property
    def prefect_home(self) -> Path:
        return self.state / "prefect"

    @property
    def run_lock(self) -> Path:
        """Held while one re-merge is at work, so that a second one waits."""
        return self.state / "run.lock"

    @property
    def serve_lock(self) -> Path:
        """Held by `poemerge serve` while it runs: the runs it started end when it does."""
        return self.state / "serve.lock"

    @property
    def dvc_guard(self) -> Path:
        """Held around every DVC command of ours: DVC's own lock does not cover threads of one process."""
        return self.state / "dvc.lock"

    def stage_failure(self, stage: str) -> Path:
        """What the last run of the stage failed with; absent when it did not fail."""
        return self.state / "failures" / f"{stage}.json"

    @property
    def stage_seconds(self) -> Path:
        """How long each stage took when it last ran, from which the next run's estimates come."""
        return self.state / "stage_seconds.json"

    @property
    def stage_memory(self) -> Path:
        """The most memory, in bytes, that each stage's process held when it last ran."""
        return self.state / "stage_memory.json"
