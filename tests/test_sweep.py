"""The sweep: it searches on validation alone, never ends worse than params.yaml there, and writes its winner back."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import poemerge
from poemerge.checkpoints import folder_digest
from poemerge.cli.main import main
from poemerge.errors import ParamsError
from poemerge.merging import FamilyChoice, Selection, merge
from poemerge.numerics.reuse import reusing
from poemerge.numerics.two_sided import TwoSided
from poemerge.params import Params
from poemerge.params_file import load_params
from poemerge.project import Project
from poemerge.report.surface import write_surface
from poemerge.search.space import current, settings_of, suggest
from poemerge.search.sweep import SweepSettings, sweep
from poemerge.search.write_back import write_back
from tests.tiny import make_base, make_full_expert, make_suite

CHECKOUT = Path(__file__).parents[1]
TEXT = """\
# A team's own words.
base: {source: b}
experts:
  one: {source: e}   # the first
  two: {source: e}
expert: {family: cauchy}
merge:
  side: output # one side is enough here
  scale_factor: 0.1
  prior_precision: 1.0e-2
  device: cpu
evaluate:
  dtype: float32
  suites:
    one: {data: d}
    two: {data: d}
register: {model: tiny}
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A merged project whose experts answer their own suites well: they are what a search can win back."""
    project = Project(tmp_path_factory.mktemp("project"))
    project.params_yaml.write_text(TEXT)
    (project.root / "dvc.yaml").write_text("stages: {}\n")
    make_base(project.base)
    for seed, name in enumerate(("one", "two")):
        make_full_expert(project.base, project.expert(name), seed=seed, size=0.1)
        make_suite(project.suite(name), seed=seed, examples=30)
        _fit_head(project, name)
    for folder in (project.base, *map(project.expert, ("one", "two")), *map(project.suite, ("one", "two"))):
        (folder / "source.json").write_text(
            json.dumps({"source": "s", "revision": None, "digest": folder_digest(folder)})
        )
    params = project.load_params()
    merge(project.base, project.expert_folders(), project.merged, params.merge, Selection(FamilyChoice("cauchy")))
    return project


def _fit_head(project: Project, name: str) -> None:
    """The head that separates the classes best in the expert's own embedding: the classes' mean vectors."""
    from transformers import AutoModel, AutoTokenizer

    folder = project.expert(name)
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(project.base)
    rows = [json.loads(line) for line in (project.suite(name) / "train.jsonl").read_text().splitlines()]
    with torch.no_grad():
        vectors = torch.stack(
            [model(**tokenizer(row["text"], return_tensors="pt")).last_hidden_state[0].mean(0) for row in rows]
        )
    vectors = torch.nn.functional.normalize(vectors, dim=-1)
    labels = torch.tensor([row["label"] for row in rows])
    means = torch.stack([vectors[labels == c].mean(0) for c in range(3)])
    tensors = load_file(folder / "model.safetensors")
    tensors["head.weight"] = 20 * torch.nn.functional.normalize(means - means.mean(0), dim=-1)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_search_is_seeded_keeps_scores_and_never_ends_below_params(project: Project, tmp_path: Path) -> None:
    params = project.load_params()
    told = []
    settings = SweepSettings(trials=5, methods=("poe", "task_arithmetic"), seed=3)
    found = sweep(project, params, settings, told.append)
    assert [trial.number for trial in told] == list(range(5))
    assert found.trials[0].point == {
        "method": "poe", "family": "cauchy", "side": "output", "scale_factor": 0.1, "prior_precision": 0.01,
    }  # fmt: skip
    assert found.best.score == max(trial.score for trial in found.trials) >= found.current.score
    assert len({json.dumps(dict(trial.point), sort_keys=True) for trial in found.trials}) == 5
    for trial in found.trials:
        assert set(trial.suites) == {"one", "two"}

    again = sweep(project, params, settings)
    assert [dict(trial.point) for trial in again.trials] == [dict(trial.point) for trial in found.trials]
    assert [trial.score for trial in again.trials] == [trial.score for trial in found.trials]
    assert sum(trial.seconds for trial in again.trials) < sum(trial.seconds for trial in found.trials)
    assert not project.scores.exists(), "what DVC owns is left alone"
    assert not list(project.state.glob("merge-*")), "no merge is left behind"

    page = write_surface(asdict(found), tmp_path / "index.html", "tiny").read_text()
    assert "5 trials on the split validation of 2 suites" in page
    assert page.count("<svg") >= 1
    for trial in found.trials:
        assert f'<th scope="row">{trial.number}</th>' in page


def test_merges_of_a_sweep_share_their_gram_products(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made once a matrix however many trials there are, and the merge is bit for bit what it is alone."""
    made: list[bool] = []
    products = TwoSided._products

    def counted(self: TwoSided, *arguments: torch.Tensor) -> object:
        made.append(True)
        return products(self, *arguments)

    monkeypatch.setattr(TwoSided, "_products", counted)
    deltas = torch.randn(2, 3, 8, 6, generator=torch.Generator().manual_seed(0))
    points = [{"pooling": 0.2, "expert": "gaussian"}, {"pooling": 0.9, "expert": "cauchy"}]
    alone = [poemerge.solve(deltas, side="both", **point).theta for point in points]
    assert len(made) == 4
    for limit, expected in ((1 << 20, 2), (3_000, 3), (0, 4)):
        made.clear()
        with reusing(limit):
            shared = [poemerge.solve(deltas, side="both", **point).theta for point in points]
        assert len(made) == expected, "as many matrices are kept as the limit holds"
        assert all(torch.equal(one, other) for one, other in zip(alone, shared, strict=True))

    made.clear()
    raw = yaml.safe_load(TEXT)
    raw["merge"]["side"] = "both"
    params = Params.model_validate(raw)
    sweep(project, params, SweepSettings(trials=1, max_examples=7))
    once = len(made)
    assert once > 0
    made.clear()
    sweep(project, params, SweepSettings(trials=6, max_examples=8))
    assert len(made) == once


def test_scores_are_those_of_the_validation_split(project: Project) -> None:
    """The suites' test files are taken away: the search must not miss them."""
    hidden = [project.suite(name) / "test.jsonl" for name in ("one", "two")]
    for path in hidden:
        path.rename(path.with_suffix(".away"))
    try:
        found = sweep(project, project.load_params(), SweepSettings(trials=1, max_examples=10))
    finally:
        for path in hidden:
            path.with_suffix(".away").rename(path)
    assert len(found.trials) == 1


def test_test_data_and_unknown_methods_are_refused(project: Project) -> None:
    with pytest.raises(ParamsError) as caught:
        sweep(project, project.load_params(), SweepSettings(split="test", methods=("pou",)))
    assert len(caught.value.problems) == 3
    assert "on which the pipeline scores" in str(caught.value)


def test_budget_stops_between_trials(project: Project) -> None:
    found = sweep(project, project.load_params(), SweepSettings(trials=50, minutes=1e-9, max_examples=5))
    assert len(found.trials) == 1


def test_winner_is_written_and_everything_else_stays(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(TEXT)
    point = {"method": "poe", "family": "student_t", "side": "both", "pooling": 0.25, "scale_factor": 0.314,
             "prior_precision": 0.00012, "coefficient": 0.9}  # fmt: skip
    write_back(path, point, 3.25)
    params = load_params(path)
    assert (params.merge.side, params.merge.scale_factor, params.merge.coefficient) == ("both", 0.314, 0.9)
    assert params.merge.prior_precision == 0.00012
    assert (params.expert.family, params.expert.tail_index) == ("student_t", 3.25)
    text = path.read_text()
    for kept in ("# A team's own words.", "one: {source: e}   # the first", "# one side is enough here", "device: cpu"):
        assert kept in text
    again = settings_of(point, params, 3.25)
    assert again[0] == params.merge
    assert current(params, again[1]) == point, "what was scored is what params.yaml says now"
    write_back(path, {"method": "mean"}, None)
    assert load_params(path).merge.method == "mean"


def test_file_that_would_be_wrong_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(TEXT)
    with pytest.raises(ParamsError):
        write_back(path, {"method": "poe", "family": "cauchy", "scale_factor": -1.0}, None)
    assert path.read_text() == TEXT
    assert [entry.name for entry in tmp_path.iterdir()] == ["params.yaml"]


@pytest.mark.parametrize(
    ("before", "comments"),
    [
        (
            "merge:\n  side: both # two\n  coefficient: 0.9 # long\n\n  # strong\n  prior_precision: 1.0e-2\n",
            ["# two", "# strong"],
        ),
        ("merge:\n  coefficient: 0.9\n# then\n", ["# then"]),
        ("merge: {coefficient: 0.9, side: both} # all\n", ["# all"]),
    ],
)
def test_coefficient_that_the_winner_lacks_is_removed(tmp_path: Path, before: str, comments: list[str]) -> None:
    """The line goes, and nothing else: the next key's comment stays."""
    path = tmp_path / "params.yaml"
    head, rest = "base: {source: b}\nexperts: {one: {source: e}}\n", "register: {model: m}\n"
    path.write_text(head + before + rest)
    assert load_params(path).merge.coefficient == 0.9
    point = {"method": "poe", "family": "gaussian", "side": "both", "pooling": 1.0, "prior_precision": 0.5}
    write_back(path, point, None)
    params = load_params(path)
    assert params.merge.coefficient is None
    assert (params.merge.side, params.merge.pooling, params.merge.prior_precision) == ("both", 1.0, 0.5)
    text = path.read_text()
    assert "coefficient" not in text
    assert re.findall("#.*", text) == comments
    assert settings_of(point, params, None)[0] == params.merge


def test_coefficient_is_the_points_own_or_none() -> None:
    raw = yaml.safe_load(TEXT)
    raw["merge"]["coefficient"] = 0.3
    params = Params.model_validate(raw)
    for point in ({"method": "ties"}, {"method": "poe", "family": "gaussian"}):
        assert settings_of(point, params, None)[0].coefficient is None
        assert settings_of({**point, "coefficient": 0.7}, params, None)[0].coefficient == 0.7
    assert current(params, Selection())["coefficient"] == 0.3


def test_space_has_the_automatic_length_and_pooling_where_they_belong() -> None:
    """Every branch is proposed, each with its own settings and no other's."""
    import optuna

    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    points = [suggest(study.ask(), ("poe", "mean", "ties")) for _ in range(200)]
    for point in points:
        poe = point["method"] == "poe"
        assert ("pooling" in point) == (poe and point["side"] == "both")
        assert ("scale_factor" in point) == (poe and point["family"] != "gaussian")
        assert poe or ("coefficient" in point) == (point["method"] == "ties")
        assert settings_of(point, Params.model_validate(yaml.safe_load(TEXT)), None)
    for both in (True, False):
        assert any(("coefficient" in point) == both for point in points if point["method"] == "poe")


def test_the_command_refuses_before_it_starts_a_server(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(project.root)
    monkeypatch.setattr("poemerge.cli.flows.prefect_here", lambda _: pytest.fail("a server was started"))
    assert main(["sweep", "--method", "pou", "--split", "test"]) == 2
    said = capsys.readouterr().err
    assert "pou" in said
    assert "on which the pipeline scores" in said


@pytest.mark.server
def test_command_records_nested_runs_and_writes_the_winner(project: Project) -> None:
    """The whole command: a Prefect server of its own, MLflow on SQLite, params.yaml."""
    from mlflow import MlflowClient

    if not (project.root / "flows").exists():
        for name in ("flows", "tasks"):
            (project.root / name).symlink_to(CHECKOUT / name)
    done = subprocess.run(
        [sys.executable, "-m", "poemerge", "sweep", "--trials", "3", "--examples", "12", "--write", "--json"],
        cwd=project.root,
        env=os.environ | {"PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout[done.stdout.index("{") :])
    assert found["trials"] == 3
    assert found["written"] == (found["score"] > found["current"])
    assert Path(found["page"]).is_file()
    client = MlflowClient(tracking_uri=f"sqlite:///{project.mlflow_db}")
    parent = client.get_run(found["run_id"])
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics["best"] == pytest.approx(found["score"])
    children = client.search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{found['run_id']}'", max_results=10
    )
    assert sorted(run.data.metrics["score"] for run in children)[-1] == pytest.approx(found["score"])
    assert len(children) == 3
    assert all("method" in run.data.params for run in children)
    assert {artifact.path for artifact in client.list_artifacts(found["run_id"])} == {"index.html", "sweep.json"}
    assert "# A team's own words." in project.params_yaml.read_text()
