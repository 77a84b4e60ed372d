"""What the gates look at, taken from the registry: both models' scores on the same data, weights, files, licences."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlflow
import pyarrow.parquet as pq
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from poemerge.checkpoints.checkpoint import Checkpoint
from poemerge.contenders import open_suites
from poemerge.errors import SuiteError
from poemerge.params import Params
from poemerge.project import Project
from poemerge.registry.champion import withdrawn
from poemerge.registry.gates import Evidence, Gate, Scored, judge
from poemerge.registry.journal import Journal
from poemerge.registry.lineage import run_json, weight_shares
from poemerge.registry.versions import Version, find_version
from poemerge.suites.protocol import Model
from poemerge.suites.runtime import choose_runtime
from poemerge.suites.scores import Columns

__all__ = ["gates_of", "log_evidence", "log_verdicts", "model_folder"]

log = logging.getLogger(__name__)
EVIDENCE_FILE = "evidence.json"


def gates_of(
    client: MlflowClient, project: Project, params: Params, candidate: Version, champion: str | None, journal: Journal
) -> list[Gate]:
    """Every gate's verdict on `candidate` against the version `champion` (None: there is none yet).

    A suite that the champion was not scored on, or on other data or with other settings, is scored now with the data in
    the project, where that is the candidate's; else its gate fails and says so.
    """
    facts = run_json(client, candidate.run_id, EVIDENCE_FILE)
    mine = _scored(client, candidate)
    evidence = Evidence(
        suites=mine,
        weight_shares=facts["weight_shares"],
        nonfinite=facts["nonfinite"],
        licenses=facts["licenses"],
        size=facts["size"],
        withdrawn=withdrawn(journal, candidate.version),
    )
    theirs: dict[str, Scored] | str = "it is the champion" if champion else "there is no champion yet"
    if champion is not None and champion != candidate.version:
        theirs = _on_the_same_data(
            client, project, params, candidate, mine, find_version(client, candidate.model, champion)
        )
    rules, evaluate = params.register_.gates, params.evaluate
    return judge(evidence, theirs, rules, samples=evaluate.bootstrap_samples, seed=evaluate.seed)


def log_evidence(
    client: MlflowClient, run_id: str, project: Project, params: Params, document: Mapping[str, Any]
) -> None:
    """Keeps with the run what the gates need later, from any machine: facts of the files, and each example's
    prediction.
    """
    files = [path for path in project.merged.rglob("*") if path.is_file()]
    inputs = {"base": document["base"], **document["experts"]}
    evaluation = _evaluation(project)
    suites = params.evaluate.suites
    content = {
        "weight_shares": weight_shares(project.ledger),
        "nonfinite": nonfinite(project.merged),
        "licenses": {name: origin.get("license") for name, origin in inputs.items()},
        "size": sum(path.stat().st_size for path in files),
        "settings": {name: suites[name].model_dump(mode="json") for name in evaluation["suites"] if name in suites},
    }
    client.log_dict(run_id, content, EVIDENCE_FILE)
    with tempfile.TemporaryDirectory(prefix="poemerge-") as scratch:
        for name, suite in evaluation["suites"].items():
            source = project.root / (suite.get("predictions") or {}).get("merged", "")
            if source.is_file():
                (Path(scratch) / f"{name}.parquet").symlink_to(source)
        if any(Path(scratch).iterdir()):
            client.log_artifacts(run_id, scratch, "predictions")


def log_verdicts(client: MlflowClient, version: Version, gates: Sequence[Gate], champion: str | None) -> None:
    """Each gate's verdict as a tag of the version and of its run, the figures as an artifact of the run."""
    for gate in gates:
        text = f"{gate.verdict}: {gate.reason}"[:4_900]
        client.set_tag(version.run_id, f"poemerge.gate.{gate.name}", text)
        client.set_model_version_tag(version.model, version.version, f"poemerge.gate.{gate.name}", text)
    client.log_dict(version.run_id, {"champion": champion, "gates": [asdict(gate) for gate in gates]}, "gates.json")


def nonfinite(folder: Path) -> list[str]:
    """Names of the tensors in `folder` (heads too, as heads/NAME/…) that hold NaN or infinity; one is in memory at a
    time.
    """
    found = []
    places = [
        ("", folder),
        *((f"heads/{path.stem}/", path) for path in sorted((folder / "heads").glob("*.safetensors"))),
    ]
    for prefix, place in places:
        checkpoint = Checkpoint.open(place)
        try:
            for name in checkpoint.names():
                tensor = checkpoint.read(name)
                if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                    found.append(prefix + name)
        finally:
            checkpoint.close()
    return found


def model_folder(version: Version, into: Path | None = None) -> Path:
    """The merged folder of a registered version, downloaded (into `into`) unless the store is this machine's own."""
    where = mlflow.artifacts.download_artifacts(
        artifact_uri=f"models:/{version.model}/{version.version}", dst_path=None if into is None else str(into)
    )
    return Path(where) / "artifacts" / "merged"


def _scored(client: MlflowClient, version: Version) -> dict[str, Scored]:
    """The merged model's scores on its suites as its run keeps them."""
    try:
        evaluation = run_json(client, version.run_id, "evaluation/evaluation.json")
    except MlflowException:
        return {}
    predictions = _predictions(client, version.run_id, "predictions")
    return {
        name: Scored(suite["metric"], suite["merged"], suite.get("expert"), suite["data_digest"], predictions.get(name))
        for name, suite in evaluation["suites"].items()
        if suite.get("merged") is not None
    }


def _predictions(client: MlflowClient, run_id: str, folder: str) -> dict[str, Columns]:
    found: dict[str, Columns] = {}
    with tempfile.TemporaryDirectory(prefix="poemerge-") as scratch:
        for item in client.list_artifacts(run_id, folder):
            path = Path(client.download_artifacts(run_id, item.path, scratch))
            with path.open("rb") as stream:
                table = pq.ParquetFile(stream).read()
            found[path.stem] = {name: table[name].to_numpy() for name in table.column_names}
    return found


def _on_the_same_data(
    client: MlflowClient,
    project: Project,
    params: Params,
    candidate: Version,
    mine: Mapping[str, Scored],
    champion: Version,
) -> dict[str, Scored]:
    """The champion's scores on the candidate's suites; those that cannot be had carry the digest of the data they are
    of.
    """
    theirs = _scored(client, champion)
    settings = [_settings(client, version) for version in (candidate, champion)]
    again = [
        name
        for name in mine
        if name not in theirs
        or theirs[name].data_digest != mine[name].data_digest
        or settings[0].get(name) != settings[1].get(name)
    ]
    if again:
        theirs |= _score_again(project, params, mine, champion, again, model_folder(candidate))
    return theirs


def _settings(client: MlflowClient, version: Version) -> dict[str, Any]:
    """What decides which examples are scored and how, by suite."""
    settings = run_json(client, version.run_id, EVIDENCE_FILE)["settings"]
    return {
        name: {k: v for k, v in suite.items() if k not in ("data", "expert", "head")}
        for name, suite in settings.items()
    }


def _score_again(
    project: Project,
    params: Params,
    mine: Mapping[str, Scored],
    champion: Version,
    names: Sequence[str],
    candidate: Path,
) -> dict[str, Scored]:
    """The champion scored now on the suites `names`, with its own head for the task or, where it has none, the
    candidate's.
    """
    evaluate = params.evaluate
    here = {name: evaluate.suites[name] for name in names if name in evaluate.suites}
    try:
        suites = open_suites(project, here)
    except SuiteError as error:
        log.warning("The champion cannot be scored on %s: the data is not in this project. %s", ", ".join(here), error)
        return {}
    folder = model_folder(champion)
    runtime = choose_runtime(evaluate.device, evaluate.dtype, evaluate.batch_size)
    scored: dict[str, Scored] = {}
    for suite in suites:
        if suite.data_digest != mine[suite.name].data_digest:
            continue
        log.info("Scoring the champion, version %s, on %s", champion.version, suite.name)
        own = evaluate.suites[suite.name].head or suite.expert or suite.name
        heads = [place / "heads" / f"{own}.safetensors" for place in (folder, candidate)]
        config = project.expert(suite.expert) if suite.expert is not None else folder
        model = Model(
            f"champion (version {champion.version})",
            folder,
            folder,
            next((head for head in heads if head.is_file()), None),
            config if (config / "config.json").is_file() else None,
        )
        columns = suite.suite.predict(model, runtime)
        metric = suite.suite.metric
        scored[suite.name] = Scored(metric.name, metric(columns), mine[suite.name].expert, suite.data_digest, columns)
    runtime.release()
    return scored


def _evaluation(project: Project) -> dict[str, Any]:
    if not project.evaluation_json.is_file():
        return {"suites": {}, "mean": {}}
    return dict(json.loads(project.evaluation_json.read_text(encoding="utf-8")))
