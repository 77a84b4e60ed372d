"""A merge as one MLflow run and one registered version; the same merged bytes are the same version."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

from poemerge.errors import RegistryError
from poemerge.params import Params
from poemerge.project import Project
from poemerge.provenance import code_patch
from poemerge.registry import lineage
from poemerge.registry.evidence import log_evidence
from poemerge.registry.journal import Journal
from poemerge.registry.skipped import skipped_tags, tell_skipped
from poemerge.registry.tracking import experiment_id
from poemerge.registry.versions import CANDIDATE, Version, find_version, list_versions, with_identity

__all__ = ["record"]

MODEL_CODE = Path(__file__).with_name("model.py")
REQUIREMENTS = ("mlflow", "pandas", "torch", "transformers", "safetensors")
LONGEST_PARAM, LONGEST_TAG = 5_900, 4_900
BATCH = 100  # MLflow's own limit of params and tags a call


@dataclass(frozen=True)
class _Merge:
    """What is recorded: the project, its params, its lineage document and its scores."""

    project: Project
    params: Params
    document: dict[str, Any]
    evaluation: dict[str, Any]


def record(client: MlflowClient, project: Project, params: Params) -> tuple[Version, bool]:
    """The registered version of what lies in artifacts/merged, with the alias `candidate` on it, and whether it is
    new.

    A version with the same weights and heads is taken again: its scores are brought up to date and the alias moves
    back to it. A new one is created only after everything that it consists of has been stored, so that a version is
    complete or not there.
    Raises RegistryError when the merged folder is not complete.
    """
    check_complete(project)
    merge = _Merge(project, params, lineage.describe(project, params), _read(project.evaluation_json))
    model = params.register_.model
    Journal.open(client, project, model)
    version = with_identity(client, model, merge.document["identity"])
    created = version is None
    if version is None:
        version = _create(client, merge)
    else:
        _log_scores(client, version.run_id, merge)
        for key, value in _score_tags(merge).items():
            client.set_model_version_tag(model, version.version, key, value)
        tell_skipped(client, version, merge.document["skipped"])
    client.set_registered_model_alias(model, CANDIDATE, version.version)
    return find_version(client, model, version.version), created


def check_complete(project: Project) -> None:
    """Raises RegistryError unless artifacts/merged holds a whole model: config, weights, merge.json, ledger, no half
    file.
    """
    folder = project.merged
    missing = [name for name in ("config.json", "merge.json", "ledger.jsonl") if not (folder / name).is_file()]
    if not list(folder.glob("*.safetensors")):
        missing.append("*.safetensors")
    half = [path.name for path in folder.rglob("*.partial")]
    if missing or half:
        got = f"no {', '.join(missing)}" if missing else f"unfinished files: {', '.join(half)}"
        raise RegistryError(
            f"{folder} is not a whole model.\n  got:      {got}\n  expected: what the merge stage writes\n"
            "  next:     run `poemerge run`, which merges again"
        )


def _create(client: MlflowClient, merge: _Merge) -> Version:
    """A new run and its version."""
    params, document = merge.params, merge.document
    model = params.register_.model
    run = client.create_run(
        experiment_id(client, merge.project),
        run_name=f"{model} {document['digest'][:12]}",
        tags={"poemerge.kind": "merge", "poemerge.digest": document["digest"], "poemerge.model": model},
    )
    run_id = run.info.run_id
    try:
        _log_params(client, run_id, params)
        _log_tags(client, run_id, document)
        _log_files(client, run_id, merge)
        _log_scores(client, run_id, merge)
        info = _log_model(merge, run_id)
        client.create_model_version(
            model,
            source=info.model_uri,
            run_id=run_id,
            model_id=info.model_id,
            tags={**_version_tags(document), **_score_tags(merge)},
            description=_headline(merge),
        )
        client.set_terminated(run_id)
    except BaseException:
        client.set_terminated(run_id, "FAILED")
        raise
    return _first_of(client, model, document["identity"], run_id)


def _first_of(client: MlflowClient, model: str, identity: str, run_id: str) -> Version:
    """The first version of this identity, which alone stays of those that the run `run_id` made.

    Another process may have registered the same bytes at the same time; and one call of ours may have made several
    versions, for MLflow's client sends a request again whose answer was lost on the way.
    """
    *others, first = list_versions(client, model, f"tags.`poemerge.identity` = '{identity}'")
    for other in others:
        if other.run_id == run_id:
            client.delete_model_version(model, other.version)
    if first.run_id != run_id:
        client.delete_run(run_id)
    return first


def _log_params(client: MlflowClient, run_id: str, params: Params) -> None:
    """Section by section as `section.key`; what lies deeper is one JSON text."""
    content = params.model_dump(mode="json", by_alias=True, exclude_none=True)
    flat = {
        f"{section}.{key}": value if isinstance(value, str) else json.dumps(value)
        for section, values in content.items()
        for key, value in values.items()
    }
    items = [Param(key, value[:LONGEST_PARAM]) for key, value in flat.items()]
    for start in range(0, len(items), BATCH):
        client.log_batch(run_id, params=items[start : start + BATCH])


def _log_tags(client: MlflowClient, run_id: str, document: Mapping[str, Any]) -> None:
    git, selected = document["git"], document["selected"]
    tags = {
        "mlflow.source.git.commit": git["commit"],
        "poemerge.git.commit": git["commit"],
        "poemerge.git.dirty": str(git["dirty"]).lower(),
        "poemerge.dvc_lock.digest": document["dvc_lock_digest"],
        "poemerge.params.digest": document["params_digest"],
        "poemerge.method": document["method"],
        "poemerge.device": document["device"],
        "poemerge.dtype": document["dtype"],
        "poemerge.selected.family": selected.get("family"),
        "poemerge.selected.reason": selected.get("reason"),
        **{f"poemerge.library.{name}": version for name, version in document["versions"].items()},
        **{f"poemerge.suite.{name}.data_digest": suite["data_digest"] for name, suite in document["suites"].items()},
    }
    for name, origin in [("base", document["base"]), *((f"expert.{n}", o) for n, o in document["experts"].items())]:
        tags |= {f"poemerge.{name}.{key}": origin.get(key) for key in ("source", "revision", "digest", "license")}
    items = [RunTag(key, str(value)[:LONGEST_TAG]) for key, value in tags.items() if value is not None]
    for start in range(0, len(items), BATCH):
        client.log_batch(run_id, tags=items[start : start + BATCH])


def _log_files(client: MlflowClient, run_id: str, merge: _Merge) -> None:
    """Everything small that a replay or a question needs: params, locks, code changes, tail fit, ledger, figures."""
    project = merge.project
    client.log_dict(run_id, merge.document, lineage.LINEAGE_FILE)
    for path in (project.params_yaml, project.dvc_yaml, project.dvc_lock, project.sources_lock):
        if path.is_file():
            client.log_artifact(run_id, str(path), "project")
    patch = code_patch(project.root)
    if patch:
        client.log_text(run_id, patch, "project/code.patch")
    for path in (project.expert_json, project.merge_json, project.ledger):
        if path.is_file():
            client.log_artifact(run_id, str(path), "merge")
    if project.tail.is_dir():
        client.log_artifacts(run_id, str(project.tail), "tail")


def _log_scores(client: MlflowClient, run_id: str, merge: _Merge) -> None:
    """Means and suites as metrics, the suites' data as dataset inputs, a nested run a suite and a baseline."""
    evaluation = merge.evaluation
    now = int(time.time() * 1000)
    suites, mean = evaluation.get("suites", {}), evaluation.get("mean", {})
    metrics = {f"mean.{key}": value for key, value in mean.items()}
    metrics |= {f"{name}.{key}": value for name, suite in suites.items() for key, value in suite.items()}
    _log_metrics(client, run_id, metrics, now)
    if merge.project.evaluation_json.is_file():
        client.log_artifact(run_id, str(merge.project.evaluation_json), "evaluation")
    children = {f"suite {name}": dict(suite) for name, suite in suites.items()}
    for method in sorted({name for suite in suites.values() for name in suite.get("baselines", {})}):
        own = mean.get("baselines", {}).get(method, {})
        scores = {name: suite["baselines"].get(method) for name, suite in suites.items() if "baselines" in suite}
        children[f"baseline {method}"] = {**(own if isinstance(own, dict) else {"accuracy": own}), **scores}
    _log_children(client, run_id, children, now)
    inputs = [
        DatasetInput(
            Dataset(
                name,
                str(suite.get("data_digest") or "")[:36],
                "local",
                json.dumps({"uri": merge.document["suites"].get(name, {}).get("source") or name}),
                profile=json.dumps({"examples": suite.get("examples")}),
            ),
            [InputTag("mlflow.data.context", "evaluation")],
        )
        for name, suite in suites.items()
    ]
    if inputs:
        client.log_inputs(run_id, inputs)
    log_evidence(client, run_id, merge.project, merge.params, merge.document)


def _log_children(client: MlflowClient, run_id: str, children: Mapping[str, dict[str, Any]], now: int) -> None:
    experiment = client.get_run(run_id).info.experiment_id
    known = {
        run.data.tags.get("mlflow.runName"): run.info.run_id
        for run in client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{run_id}'", max_results=1000)
    }
    for name, scores in children.items():
        child = known.get(name)
        if child is None:
            tags = {"mlflow.parentRunId": run_id, "poemerge.kind": name.split(" ")[0]}
            child = client.create_run(experiment, run_name=name, tags=tags).info.run_id
        _log_metrics(client, child, scores, now)
        client.set_terminated(child)


def _log_metrics(client: MlflowClient, run_id: str, values: Mapping[str, Any], now: int) -> None:
    items = [
        Metric(key, float(value), now, 0)
        for key, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]
    for start in range(0, len(items), 1000):
        client.log_batch(run_id, metrics=items[start : start + 1000])


def _log_model(merge: _Merge, run_id: str) -> Any:
    """The pyfunc: code, the merged folder as it is, and what is known of each task. Only files are copied."""
    with tempfile.TemporaryDirectory(prefix="poemerge-") as scratch, _run(run_id):
        tasks = Path(scratch) / "tasks.json"
        tasks.write_text(json.dumps(_tasks(merge), ensure_ascii=False, indent=1), encoding="utf-8")
        # Copied beside it: models from code are logged from a file that is not part of an imported package.
        code = Path(shutil.copy(MODEL_CODE, scratch))
        with warnings.catch_warnings():
            # It asks for an input example, which it would run through the whole model.
            warnings.simplefilter("ignore")
            return mlflow.pyfunc.log_model(
                name="model",
                python_model=str(code),
                artifacts={"merged": str(merge.project.merged), "tasks": str(tasks)},
                pip_requirements=list(REQUIREMENTS),
                signature=ModelSignature(
                    outputs=Schema([ColSpec("string", "label"), ColSpec("double", "score")]),
                    params=ParamSchema([ParamSpec("task", "string", "")]),
                ),
                metadata={"poemerge_digest": merge.document["digest"]},
            )


@contextmanager
def _run(run_id: str) -> Iterator[None]:
    """The run made active, and left as it was: whether it finished is not for this block to say."""
    mlflow.start_run(run_id=run_id)
    try:
        yield
    finally:
        mlflow.end_run("RUNNING")


def _tasks(merge: _Merge) -> dict[str, dict[str, Any]]:
    """By task: class names, pooling, length and, for a classifier of its own architecture, that architecture's
    config.
    """
    project, suites = merge.project, merge.params.evaluate.suites
    heads = {path.stem for path in (project.merged / "heads").glob("*.safetensors")}
    tasks: dict[str, dict[str, Any]] = {}
    for task in sorted(heads | set(suites)):
        suite = suites.get(task)
        expert = suite.expert or task if suite else task
        labels = _read_any(project.suite(task) / "labels.json")
        about = {"labels": labels} if isinstance(labels, list) else dict(labels or {})
        for key in ("pooling", "normalize", "max_tokens"):
            if suite is not None and suite.options.get(key) is not None:
                about[key] = suite.options[key]
        about["head"] = suite.head or expert if suite else task
        config = _read_any(project.expert(expert) / "config.json")
        if isinstance(config, dict) and any("Classification" in name for name in config.get("architectures") or ()):
            about["config"] = config
        tasks[task] = about
    return tasks


def _version_tags(document: Mapping[str, Any]) -> dict[str, str]:
    origins = {"poemerge.base": document["base"]}
    origins |= {f"poemerge.expert.{name}": origin for name, origin in document["experts"].items()}
    return {
        "poemerge.digest": document["digest"],
        "poemerge.identity": document["identity"],
        "poemerge.method": str(document["method"]),
        "poemerge.git.commit": str(document["git"]["commit"]),
        **{key: json.dumps(origin, ensure_ascii=False)[:LONGEST_TAG] for key, origin in origins.items()},
        **skipped_tags(document["skipped"]),
    }


def _score_tags(merge: _Merge) -> dict[str, str]:
    mean = merge.evaluation.get("mean", {})
    kept = {key: mean[key] for key in ("base", "expert", "merged", "normalised") if key in mean}
    return {"poemerge.mean": json.dumps(kept)}


def _headline(merge: _Merge) -> str:
    mean = merge.evaluation.get("mean", {})
    experts = ", ".join(merge.document["experts"])
    score = f", mean {mean['merged']:.4f} ({mean['normalised']:.4f} of the experts)" if "merged" in mean else ""
    return f"{merge.document['method']} of {experts}{score}"


def _read(path: Path) -> dict[str, Any]:
    content = _read_any(path)
    return content if isinstance(content, dict) else {}


def _read_any(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
