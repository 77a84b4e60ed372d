"""infra/: compose.yaml says what it should, and its services, started by its own commands, carry the whole pipeline."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from pipeline import make_project, read_params, write_params

from infra.make_secrets import make_secrets
from infra.native import INFRA, VARIABLE, ServiceError, Stack, dvc_remote
from poemerge.project import STAGES, Project

COMPOSE: dict[str, Any] = yaml.safe_load((INFRA / "compose.yaml").read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
needs_postgres = pytest.mark.skipif(shutil.which("initdb") is None, reason="PostgreSQL is not installed here")
RUN_ONCE = {"databases", "buckets", "mlflow-user", "install"}


def stage_of(target: str) -> list[str]:
    """The Dockerfile's lines of one stage."""
    stages = re.split(r"^FROM ", (INFRA / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    (found,) = [stage for stage in stages if stage.splitlines()[0].endswith(f" AS {target}")]
    return found.splitlines()


def test_every_service_has_a_health_check_or_runs_once() -> None:
    assert {name for name, service in SERVICES.items() if "test" not in service.get("healthcheck", {})} == RUN_ONCE


def test_dependencies_wait_for_health_or_for_success() -> None:
    for service in SERVICES.values():
        for needed, how in service.get("depends_on", {}).items():
            once = needed in RUN_ONCE
            assert how == {"condition": "service_completed_successfully" if once else "service_healthy"}


def test_no_secret_is_written_into_compose_yaml() -> None:
    for name, service in SERVICES.items():
        for key, value in service.get("environment", {}).items():
            if re.search(r"PASSWORD|SECRET|AUTH_STRING|ACCESS_KEY", key):
                assert key.endswith("_FILE"), f"{name} {key}"
                assert str(value).removeprefix("/run/secrets/") in service["secrets"], f"{name} {key}"
        assert set(service.get("secrets", ())) <= set(COMPOSE["secrets"])


def test_what_the_secrets_script_makes_is_what_compose_yaml_names(tmp_path: Path) -> None:
    make_secrets(tmp_path / "secrets")
    made = {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()}
    assert {f"secrets/{name}" for name in made} == {secret["file"] for secret in COMPOSE["secrets"].values()}
    assert len(set(made.values())) == len(made)
    assert min(map(len, made.values())) >= 24
    assert stat.S_IMODE((tmp_path / "secrets").stat().st_mode) == 0o700
    make_secrets(tmp_path / "secrets")
    assert {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()} == made


def test_every_variable_is_explained_with_its_default() -> None:
    used = dict(VARIABLE.findall((INFRA / "compose.yaml").read_text(encoding="utf-8")))
    lines = (INFRA / ".env.example").read_text(encoding="utf-8").splitlines()
    told = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    assert told == used


def test_images_have_a_version_and_their_own_unprivileged_user() -> None:
    lines = (INFRA / "Dockerfile").read_text(encoding="utf-8").splitlines()
    outside = [line.split()[1] for line in lines if line.startswith("FROM") and ":" in line.split()[1]]
    for image in [*outside, SERVICES["postgres"]["image"]]:
        assert re.search(r":\d+(\.\d+)*", image), image
    assert "USER 10001:10001" in stage_of("runtime")
    for target in ("services", "worker"):
        stage = stage_of(target)
        assert stage[0].startswith("runtime ")
        assert not any(line.startswith("USER") for line in stage)
        assert any(line.startswith("HEALTHCHECK") for line in stage)
    installs = re.findall(r"pip install[^\n]*", (INFRA / "Dockerfile").read_text(encoding="utf-8"))
    assert len(installs) == 3
    assert all("--constraint constraints.txt" in line for line in installs)
    targets = {service["build"]["target"] for service in SERVICES.values() if "build" in service}
    assert targets == {"services", "worker"}


def test_nothing_is_published_beyond_this_machine_by_default_and_containers_may_do_little() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert set(published) == {"prefect", "mlflow", "s3"}
    assert all(port.startswith("${BIND:-127.0.0.1}:") for ports in published.values() for port in ports)
    for service in SERVICES.values():
        if "build" in service:
            assert service["read_only"]
            assert service["cap_drop"] == ["ALL"]
            assert service["security_opt"] == ["no-new-privileges:true"]


def test_the_gpu_worker_differs_only_in_its_device() -> None:
    cpu, gpu = dict(SERVICES["worker"]), dict(SERVICES["worker-gpu"])
    (device,) = gpu.pop("deploy")["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    assert gpu.pop("profiles") == ["gpu"]
    for key in ("image", "build"):
        assert cpu.pop(key) != gpu.pop(key)
    assert cpu == gpu


def test_the_entrypoint_reads_secrets_and_leaves_other_files_alone(tmp_path: Path) -> None:
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "word").write_text("a $word with `quotes`")
    done = subprocess.run(
        ["/bin/sh", INFRA / "entrypoint.sh", "env"],
        env={"PATH": os.defpath, "WORD_FILE": str(tmp_path / "secrets" / "word"), "SSL_CERT_FILE": "/etc/certificates"},
        capture_output=True,
        text=True,
        check=True,
    )
    told = dict(line.split("=", 1) for line in done.stdout.splitlines())
    assert told["WORD"] == "a $word with `quotes`"
    assert told["SSL_CERT_FILE"] == "/etc/certificates"
    assert not {"WORD_FILE", "SSL_CERT"} & set(told)


def test_the_entrypoint_ends_when_a_secret_is_missing() -> None:
    done = subprocess.run(
        ["/bin/sh", INFRA / "entrypoint.sh", "true"],
        env={"PATH": os.defpath, "WORD_FILE": "/nowhere/secrets/word"},
        capture_output=True,
    )
    assert done.returncode != 0


def test_mlflow_auth_names_no_password() -> None:
    config = configparser.ConfigParser()
    config.read(INFRA / "mlflow_auth.ini")
    assert "admin_password" not in config["mlflow"]
    assert config["mlflow"]["database_uri"] == "postgresql:///mlflow_auth"


@needs_postgres
def test_a_service_that_ends_is_told_with_its_log(tmp_path: Path) -> None:
    stack = Stack(tmp_path / "state")
    stack.compose["services"]["postgres"] |= {"command": ["postgres", "--no-such-option"]}
    try:
        with stack, pytest.raises(ServiceError, match="no-such-option"):
            stack.up(["databases"])
    finally:
        stack.remove()


# The services, started natively


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    root = tmp_path_factory.mktemp("team")
    project = make_project(root / "project")
    params = read_params(project.root)
    # One run, ours: Prefect counts intervals from 2020-01-01, so an hour's would watch, and merge, at every full hour.
    params["schedule"] = {"cron": None, "watch": {"interval_seconds": 10 * 365 * 24 * 3600}}
    write_params(project.root, params)
    with Stack(root / "state", project.root) as stack:
        try:
            stack.up(["prefect", "mlflow-user"])
            yield stack
        finally:
            stack.down()
            stack.remove()


@pytest.fixture(scope="module")
def team(stack: Stack) -> Project:
    return Project(stack.project)


def in_project(stack: Stack, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m ARGUMENTS` in the project with the worker's addresses and credentials."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "MLFLOW_", "AWS_"))}
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=stack.project,
        env=kept | stack.client_environment() | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=1100,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


@needs_postgres
@pytest.mark.server
def test_every_service_is_healthy(stack: Stack) -> None:
    assert all(stack.healthy(name) for name in ("postgres", "s3", "prefect", "mlflow"))


@needs_postgres
@pytest.mark.server
def test_nobody_gets_in_without_a_password(stack: Stack) -> None:
    env = stack.client_environment()
    mlflow, prefect = env["MLFLOW_TRACKING_URI"], env["PREFECT_API_URL"]
    search = f"{mlflow}/api/2.0/mlflow/experiments/search?max_results=1"
    user = (env["MLFLOW_TRACKING_USERNAME"], env["MLFLOW_TRACKING_PASSWORD"])
    name, _, password = env["PREFECT_API_AUTH_STRING"].partition(":")

    def status(url: str, auth: tuple[str, str] | None = None, host: str | None = None) -> int:
        return requests.get(url, auth=auth, headers={"Host": host} if host else {}, timeout=30).status_code

    assert [status(search), status(search, (user[0], "wrong")), status(search, user)] == [401, 401, 200]
    assert status(search, user, host="evil.example") == 403
    version = f"{prefect}/admin/version"
    assert [status(version), status(version, (name, "wrong")), status(version, (name, password))] == [401, 401, 200]
    assert status(f"{env['AWS_ENDPOINT_URL']}/dvc?list-type=2") == 403


@needs_postgres
@pytest.mark.server
def test_the_pipelines_user_is_no_administrator(stack: Stack) -> None:
    env = stack.client_environment()
    user = (env["MLFLOW_TRACKING_USERNAME"], env["MLFLOW_TRACKING_PASSWORD"])
    body = {"username": "another", "password": "a-long-password"}
    answer = requests.post(
        f"{env['MLFLOW_TRACKING_URI']}/api/2.0/mlflow/users/create", json=body, auth=user, timeout=30
    )
    assert answer.status_code == 403


@needs_postgres
@pytest.mark.server
def test_each_role_sees_its_own_databases_alone(stack: Stack) -> None:
    import psycopg2

    def connect(user: str, database: str) -> None:
        psycopg2.connect(
            host="127.0.0.1",
            port=stack.variables["POSTGRES_PORT"],
            user=user,
            password=stack.secret(f"{user}_db_password"),
            dbname=database,
        ).close()

    for user, database in (("prefect", "prefect"), ("mlflow", "mlflow"), ("mlflow", "mlflow_auth")):
        connect(user, database)
    for user, database in (("prefect", "mlflow"), ("mlflow", "prefect")):
        with pytest.raises(psycopg2.OperationalError, match="permission denied"):
            connect(user, database)


@needs_postgres
@pytest.mark.server
def test_what_runs_once_may_run_again(stack: Stack) -> None:
    for name in ("databases", "buckets", "mlflow-user"):
        service = stack.service(name)
        env = {**os.environ, **{key: str(value) for key, value in service["environment"].items()}}
        command = [*service["entrypoint"], *service["command"]]
        env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
        subprocess.run(command, cwd=INFRA.parent, env=env, check=True, capture_output=True)


@needs_postgres
@pytest.mark.server
@pytest.mark.timeout(1500)
def test_the_pipeline_runs_on_them(stack: Stack, team: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker takes a run of the deployment; the model is in MLflow, its bytes and DVC's are in S3."""
    with dvc_remote(team.root):
        stack.up(["install", "worker"])
        in_project(stack, "prefect", "deployment", "run", "remerge/remerge", "--watch", "--watch-timeout", "1000")
    assert all(team.stage_report(stage).is_file() for stage in STAGES)
    assert stack.healthy("worker")
    for key, value in stack.client_environment().items():
        monkeypatch.setenv(key, value)
    from mlflow import MlflowClient

    # Both named: tests before this one leave MLflow's registry of this process at that of their own project.
    uri = stack.client_environment()["MLFLOW_TRACKING_URI"]
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    version = client.get_model_version_by_alias("tiny", "candidate")
    told = [(str(each.version), each.run_id) for each in client.search_model_versions("name = 'tiny'")]
    assert told == [("1", version.run_id)]
    assert client.get_run(version.run_id).info.status == "FINISHED"
    import boto3

    s3 = boto3.client("s3")

    def keys(bucket: str) -> list[str]:
        return [item["Key"] for item in s3.list_objects_v2(Bucket=bucket).get("Contents", [])]

    assert any(key.endswith("model.safetensors") for key in keys("mlflow"))
    assert any(key.startswith("files/md5/") for key in keys("dvc"))
    with dvc_remote(team.root):
        shutil.rmtree(team.root / ".dvc" / "cache")
        shutil.rmtree(team.merged)
        in_project(stack, "dvc", "pull", "--quiet", "merge")
    assert (team.merged / "model.safetensors").is_file()
