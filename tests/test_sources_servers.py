"""models:/ against a real MLflow server, s3:// against a real S3 server, and collections whose members appear."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import Fault, Hub
from tiny import make_base, make_full_expert, make_lora_expert, make_suite

from poemerge.checkpoints import folder_digest
from poemerge.errors import BadInputError, SourceError
from poemerge.project import Project
from poemerge.sources import Lock, RetryPolicy, read_source_json, resolve
from tasks.fetch import fetch
from tasks.report import StageReport

pytestmark = pytest.mark.server
BIN = Path(sys.executable).parent
ONCE = RetryPolicy(attempts=1)


def free_port() -> int:
    """A port whose neighbour 10000 above is free too: SeaweedFS uses both."""
    while True:
        with socket.socket() as low, socket.socket() as high:
            low.bind(("127.0.0.1", 0))
            port = int(low.getsockname()[1])
            if port < 50_000:
                try:
                    high.bind(("127.0.0.1", port + 10_000))
                except OSError:
                    continue
                return port


def serve(arguments: list[str], health: str, environment: dict[str, str], log: Path) -> Iterator[None]:
    with log.open("wb") as out:
        process = subprocess.Popen(
            arguments, stdout=out, stderr=out, env=os.environ | environment, start_new_session=True, cwd=log.parent
        )
        try:
            deadline = time.monotonic() + 240
            while True:
                try:
                    with urllib.request.urlopen(health, timeout=1):
                        break
                except OSError:
                    assert process.poll() is None, log.read_text()
                    assert time.monotonic() < deadline, log.read_text()
                    time.sleep(0.2)
            yield
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="module")
def mlflow_uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder, port = tmp_path_factory.mktemp("mlflow"), free_port()
    arguments = [
        *(sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "artifacts")),
    ]
    uri = f"http://127.0.0.1:{port}"
    for _ in serve(arguments, f"{uri}/health", {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}, folder / "log"):
        yield uri


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The endpoint of an S3 server with the bucket `models`."""
    folder = tmp_path_factory.mktemp("s3")
    identity = {
        "name": "team",
        "credentials": [{"accessKey": "key", "secretKey": "secret"}],
        "actions": ["Admin", "Read", "Write", "List"],
    }
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    ports = [free_port() for _ in range(4)]
    arguments = [
        *(str(BIN / "weed"), "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-volume.max=0"),
        *(f"-master.port={ports[0]}", f"-volume.port={ports[1]}", "-filer", f"-filer.port={ports[2]}", "-s3"),
        *(f"-s3.port={ports[3]}", "-s3.port.iceberg=0", "-s3.port.lance=0", f"-s3.config={folder / 's3.json'}"),
        "-master.volumeSizeLimitMB=64",
    ]
    endpoint = f"http://127.0.0.1:{ports[3]}"
    for _ in serve(arguments, f"{endpoint}/healthz", {}, folder / "log"):
        yield endpoint


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    base = make_base(root / "base")
    for name, seed in (("a", 1), ("b", 2)):
        make_full_expert(base, root / name, seed)
    make_lora_expert(base, root / "lora", 3)
    make_suite(root / "suite")
    return root


@pytest.fixture
def project(tmp_path: Path, models: Path) -> Project:
    root = tmp_path / "project"
    shutil.copytree(models, root / "models")
    (root / "dvc.yaml").touch()
    return Project(root)


def say(project: Project, experts: str = "{}", rest: str = "") -> None:
    project.params_yaml.write_text(f"base: {{source: models/base}}\nexperts: {experts}\n{rest}\n")


def resolved(project: Project, *, write: bool = True) -> Lock:
    return resolve(project, project.load_params(), write=write)


def fetched(project: Project, policy: RetryPolicy = ONCE) -> StageReport:
    return fetch(project, project.load_params(), policy)


# MLflow


@pytest.fixture
def registry(mlflow_uri: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    from mlflow import MlflowClient

    return MlflowClient(mlflow_uri, mlflow_uri)


def register(registry: Any, name: str, folder: Path, below: str = "model") -> str:
    """A new version of the model `name` whose artifacts are `folder`, as artifacts of a run."""
    run = registry.create_run("0").info.run_id
    registry.log_artifacts(run, str(folder), below)
    registry.set_terminated(run)
    from mlflow.exceptions import MlflowException

    with contextlib.suppress(MlflowException):
        registry.create_registered_model(name)
    return str(registry.create_model_version(name, f"runs:/{run}/{below.split('/')[0]}", run).version)


def test_an_alias_is_resolved_to_a_version_and_brought(project: Project, registry: Any, models: Path) -> None:
    first = register(registry, "sentiment", models / "a")
    registry.set_registered_model_alias("sentiment", "prod", first)
    say(project, '{s: {source: "models:/sentiment@prod"}}')
    lock = resolved(project)
    assert lock.experts["s"].revision == f"models:/sentiment/{first}"
    second = register(registry, "sentiment", models / "b")
    assert resolved(project).changes(lock) == []
    fetched(project)
    known = read_source_json(project.expert("s"))
    assert known is not None
    assert known["digest"] == folder_digest(models / "a")
    assert known["revision"] == f"models:/sentiment/{first}"
    registry.set_registered_model_alias("sentiment", "prod", second)
    (change,) = resolved(project).changes(lock)
    assert (change.old, change.new) == (f"models:/sentiment/{first}", f"models:/sentiment/{second}")
    fetched(project)
    assert folder_digest(project.expert("s")) == folder_digest(models / "b")
    assert sorted(p.name for p in project.expert("s").iterdir()) == sorted(
        ["source.json", *(p.name for p in (models / "b").iterdir())]
    )


def test_a_checkpoint_nested_by_a_flavour_is_found(project: Project, registry: Any, models: Path) -> None:
    version = register(registry, "nested", models / "lora", "model/artifacts/adapter")
    say(project, f'{{n: {{source: "models:/nested/{version}"}}}}')
    resolved(project)
    fetched(project)
    assert folder_digest(project.expert("n")) == folder_digest(models / "lora")


def test_two_checkpoints_in_one_version_are_refused(
    project: Project, registry: Any, models: Path, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        shutil.copytree(models / name, tmp_path / "both" / name)
    version = register(registry, "both", tmp_path / "both")
    say(project, f'{{x: {{source: "models:/both/{version}"}}}}')
    resolved(project)
    with pytest.raises(BadInputError, match="several checkpoints: a/, b/"):
        fetched(project)


def test_what_the_registry_lacks_is_told_at_once(project: Project, registry: Any, models: Path) -> None:
    register(registry, "known", models / "a")
    say(
        project,
        '{a: {source: "models:/known@nobody"}, b: {source: "models:/unknown/1"}, c: {source: "models:/known/99"}, '
        'd: {source: "models:/known"}, e: {source: "models:/known*@prod"}}',
    )
    with pytest.raises(BadInputError) as caught:
        resolved(project)
    assert [problem.expert for problem in caught.value.problems] == ["a", "b", "c", "d", "e"]
    assert "move it under `collections`" in str(caught.value)


def test_a_registry_that_is_down_is_an_error_and_a_poll_waits(
    project: Project, registry: Any, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = register(registry, "down", models / "a")
    say(project, f'{{d: {{source: "models:/down/{version}"}}, b: {{source: models/b}}}}')
    lock = resolved(project)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    with pytest.raises(SourceError, match="expert:   d\n  got:      MLflow does not answer"):
        resolved(project)
    polled = resolved(project, write=False)
    assert polled.changes(lock) == []
    assert set(polled.waiting) == {"d"}


def test_registered_models_become_experts_by_a_pattern(project: Project, registry: Any, models: Path) -> None:
    register(registry, "task-a", models / "a")
    register(registry, "other", models / "b")
    register(registry, "task-own", models / "b")
    collections = (
        'collections: {tasks: {source: "models:/task-*"}, live: {source: "models:/task-*@live"}}\n'
        "register: {model: task-own}"
    )
    say(project, "{}", collections)
    lock = resolved(project)
    assert {n: (e.source, e.collection) for n, e in lock.experts.items()} == {"task-a": ("models:/task-a/1", "tasks")}
    assert register(registry, "task-a", models / "b") == "2"
    register(registry, "task-b", models / "lora")
    assert {(c.name, c.old, c.new) for c in resolved(project).changes(lock)} == {
        ("task-a", "models:/task-a/1", "models:/task-a/2"),
        ("task-b", None, "models:/task-b/1"),
    }
    fetched(project)
    assert set(project.expert_folders()) == {"task-a", "task-b"}


# S3


@pytest.fixture
def bucket(s3: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The bucket `models`, empty."""
    for name, value in {
        "AWS_ENDPOINT_URL": s3,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    system = s3fs.S3FileSystem()
    if not system.exists("models"):
        system.mkdir("models")
    for path in system.ls("models", refresh=True):
        system.rm(path, recursive=True)
    return system


def test_a_prefix_is_a_source(project: Project, bucket: Any, models: Path) -> None:
    bucket.put(str(models / "a") + "/", "models/team/a/", recursive=True)
    bucket.put(str(models / "suite" / "test.jsonl"), "models/texts/test.jsonl")
    suites = (
        'evaluate: {suites: {a: {data: "s3://models/texts/test.jsonl"}, b: {data: "s3://models/texts", expert: a}}}'
    )
    say(project, '{a: {source: "s3://models/team/a"}}', suites)
    lock = resolved(project)
    assert lock.experts["a"].revision.startswith("listing:")
    assert resolved(project) == lock
    fetched(project)
    known = read_source_json(project.expert("a"))
    assert known is not None
    assert known["digest"] == folder_digest(models / "a")
    assert known["time"].endswith("+00:00")
    assert (project.suite("a") / "test.jsonl").read_bytes() == (models / "suite" / "test.jsonl").read_bytes()
    assert (project.suite("b") / "test.jsonl").read_bytes() == (models / "suite" / "test.jsonl").read_bytes()
    bucket.put(str(models / "b" / "model.safetensors"), "models/team/a/model.safetensors")
    (change,) = resolved(project).changes(lock)
    assert change.name == "a"
    fetched(project)
    assert folder_digest(project.expert("a")) == folder_digest(models / "b")


def test_a_prefix_that_changes_after_it_was_resolved_is_refused(project: Project, bucket: Any, models: Path) -> None:
    bucket.put(str(models / "a") + "/", "models/team/a/", recursive=True)
    say(project, '{a: {source: "s3://models/team/a"}}')
    resolved(project)
    bucket.put(str(models / "b" / "model.safetensors"), "models/team/a/model.safetensors")
    with pytest.raises(SourceError, match="changed after it was resolved"):
        fetched(project)
    assert not project.expert("a").exists()


def test_half_of_a_file_is_not_taken(project: Project, bucket: Any, models: Path) -> None:
    bucket.put(str(models / "a") + "/", "models/team/a/", recursive=True)
    bucket.pipe("models/team/a/model.safetensors", (models / "a" / "model.safetensors").read_bytes()[:5000])
    say(project, '{a: {source: "s3://models/team/a"}}')
    resolved(project)
    with pytest.raises(SourceError, match="its header says"):
        fetched(project)
    assert not project.expert("a").exists()


def test_what_a_store_lacks_is_told_at_once(project: Project, bucket: Any, models: Path) -> None:
    bucket.pipe("models/pickled/config.json", b"{}")
    bucket.pipe("models/pickled/pytorch_model.bin", b"pickle")
    say(
        project,
        '{a: {source: "s3://models/nowhere"}, b: {source: "s3://no-bucket/x"}, c: {source: "s3://models/pickled"}, '
        'd: {source: "s4://models/x"}}',
    )
    with pytest.raises(BadInputError) as caught:
        resolved(project)
    assert [problem.expert for problem in caught.value.problems] == ["a", "b", "c", "d"]


def test_a_store_that_is_down_is_an_error(project: Project, bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setattr("time.sleep", lambda _: None)
    s3fs.S3FileSystem.clear_instance_cache()
    say(project, '{a: {source: "s3://models/team/a"}}')
    with pytest.raises(SourceError, match="expert:   a\n  got:      the store cannot be reached"):
        resolved(project)
    s3fs.S3FileSystem.clear_instance_cache()


def test_prefixes_become_experts(project: Project, bucket: Any, models: Path) -> None:
    bucket.put(str(models / "a") + "/", "models/landed/a/", recursive=True)
    say(project, "{}", 'collections: {landed: {source: "s3://models/landed/*"}}')
    lock = resolved(project)
    assert set(lock.experts) == {"a"}
    bucket.put(str(models / "lora") + "/", "models/landed/lora/", recursive=True)
    assert [c.name for c in resolved(project).changes(lock)] == ["lora"]
    fetched(project)
    assert set(project.expert_folders()) == {"a", "lora"}


# A drop folder


def drop(models: Path, project: Project, name: str) -> Path:
    shutil.copytree(models / name, project.root / "drop" / name)
    return project.root / "drop" / name


def test_a_dropped_folder_becomes_an_expert_when_it_is_whole(
    project: Project, models: Path, caplog: pytest.LogCaptureFixture
) -> None:
    say(project, "{}", "collections: {dropped: {source: drop, exclude: [ignored*]}}")
    drop(models, project, "a")
    shutil.copytree(models / "b", project.root / "drop" / "ignored-b")
    lock = resolved(project)
    assert set(lock.experts) == {"a"}
    landing = project.root / "drop" / "b"
    landing.mkdir()
    for step in ("config.json", "model.safetensors"):
        content = (models / "b" / step).read_bytes()
        (landing / step).write_bytes(content[: len(content) // 2])
        polled = resolved(project, write=False)
        assert polled.changes(lock) == []
        assert set(polled.waiting) == {"b"}
        assert resolved(project).changes(lock) == []
        (landing / step).write_bytes(content)
    assert "b is not taken yet" in caplog.text
    assert [c.name for c in resolved(project).changes(lock)] == ["b"]
    shutil.rmtree(project.root / "drop" / "a")
    assert set(resolved(project).experts) == {"b"}


def test_a_member_being_replaced_stays_as_it_was_locked(project: Project, models: Path) -> None:
    say(project, "{}", "collections: {dropped: {source: drop}}")
    folder = drop(models, project, "a")
    lock = resolved(project)
    (folder / "model.safetensors").write_bytes(b"half")
    assert resolved(project) == lock


def test_a_folder_still_being_written_waits(project: Project, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    say(project, "{}", "collections: {dropped: {source: drop}}")
    drop(models, project, "a")
    lock = resolved(project)
    folder = drop(models, project, "b")
    # While it waits for the folder to be at rest, one more file comes.
    real = time.sleep

    def sleep_while_a_head_lands(seconds: float) -> None:
        shutil.copy(models / "lora" / "head.safetensors", folder)
        real(seconds)

    monkeypatch.setattr("time.sleep", sleep_while_a_head_lands)
    polled = resolved(project, write=False)
    assert polled.changes(lock) == []
    assert polled.waiting["b"] == "files are being written"
    monkeypatch.setattr("time.sleep", real)
    assert [c.name for c in resolved(project).changes(lock)] == ["b"]


def test_two_experts_of_one_name_are_refused(project: Project, models: Path) -> None:
    say(project, "{a: {source: models/b}}", "collections: {dropped: {source: drop}}")
    drop(models, project, "a")
    lock = resolved(project)
    assert lock.experts["a"].source == "models/b"
    assert "would be named a" in lock.waiting["a"]
    shutil.copy(models / "a" / "model.safetensors", project.root / "models" / "b")
    assert [c.name for c in resolved(project).changes(lock)] == ["a"]


# A hub's tag


def test_tagged_repositories_become_experts(
    project: Project, models: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr("time.sleep", lambda _: None)
    with Hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        hub.push("team/base", models / "base", tags=("merge",))
        hub.push("team/a", models / "a", tags=("merge",))
        hub.push("team/untagged", models / "b")
        hub.push("other/b", models / "b", tags=("merge",))
        text = 'base: {source: "hf://team/base"}\ncollections: {team: {source: "hf://team?tag=merge"}}\n'
        project.params_yaml.write_text(text)
        lock = resolved(project)
        assert {name: entry.source for name, entry in lock.experts.items()} == {"a": "hf://team/a"}
        sha = hub.push("team/lora", models / "lora", tags=("merge",))
        assert [(c.name, c.new) for c in resolved(project).changes(lock)] == [("lora", sha)]
        fetched(project)
        assert set(project.expert_folders()) == {"a", "lora"}
        lock = Lock.read(project.sources_lock)
        assert lock is not None
        hub.faults.append(Fault("/api/models", "status", 500))
        with pytest.raises(SourceError, match=r"collections\.team\.source"):
            resolved(project)
        polled = resolved(project, write=False)
        assert polled.changes(lock) == []
        assert set(polled.waiting) == {"team"}
        project.params_yaml.write_text(text + "fetch: {on_bad_expert: skip}\n")
        kept = resolved(project)
        assert kept.changes(lock) == []
        assert set(kept.skipped) == {"team"}
