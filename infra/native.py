"""Run the services of compose.yaml on this machine without containers: the same commands, health checks and secrets.

    python infra/native.py run -- COMMAND …    start them, run COMMAND with their addresses in its environment, end them
    python infra/native.py up                  start them and a worker, tell their addresses, end them at Ctrl-C

compose.yaml is read, not repeated: a service's entrypoint, command, environment, dependencies and health check are
taken from there. What differs is what a container would have given: hosts are loopback and ports free ones (variables
of compose.yaml), secrets and volumes are paths below the state folder. Needs what the images hold: initdb and postgres,
and this environment with the extra `services`.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import json
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

INFRA = Path(__file__).resolve().parent
sys.path.insert(0, str(INFRA))

from make_secrets import make_secrets  # noqa: E402

START_SECONDS = 300.0
VARIABLE = re.compile(r"\$\{([A-Z][A-Z0-9_]*)(?::-([^}]*))?\}")
PORTS = (
    *("POSTGRES_PORT", "PREFECT_PORT", "MLFLOW_PORT", "WORKER_HEALTH_PORT"),
    *("S3_PORT", "S3_MASTER_PORT", "S3_VOLUME_PORT", "S3_FILER_PORT"),
)


class ServiceError(Exception):
    """A service did not start, or ended."""


class Stack:
    """The services of compose.yaml, started in the order of their dependencies; a context manager that ends them.

    `state` keeps secrets, volumes, ports and logs: started there again, the services have what they had. `project` is
    the checkout that a worker works in.
    """

    def __init__(self, state: Path, project: Path | None = None) -> None:
        self.state = state.resolve()
        self.state.mkdir(parents=True, exist_ok=True)
        self.project = (project or INFRA.parent).resolve()
        self.compose: dict[str, Any] = yaml.safe_load((INFRA / "compose.yaml").read_text(encoding="utf-8"))
        make_secrets(self.state / "secrets")
        self.variables = self._variables()
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._done: set[str] = set()

    def up(self, names: Sequence[str]) -> None:
        """Start the services `names` and what they depend on, side by side where they may, until each is healthy.

        Raises ServiceError when one ends before it is, fails, or takes too long.
        """
        pending = [name for name in self._in_order(names) if name not in self._done]
        starting: dict[str, subprocess.Popen[bytes]] = {}
        deadline = time.monotonic() + START_SECONDS
        while pending or starting:
            for name in [name for name in pending if self._done.issuperset(self._depends_on(name))]:
                pending.remove(name)
                starting[name] = self._start(name)
            for name, process in list(starting.items()):
                if self._ready(name, process):
                    self._done.add(name)
                    del starting[name]
                    if process.poll() is not None:  # it runs once: there is nothing to end later
                        del self._running[name]
                elif time.monotonic() > deadline:
                    raise ServiceError(f"{name} is not ready:\n{self.log(name)[-4000:]}")
            time.sleep(0.2)

    def _ready(self, name: str, process: subprocess.Popen[bytes]) -> bool:
        """Whether a service is healthy, or one that runs once has succeeded."""
        serves = "test" in self.compose["services"][name].get("healthcheck", {})
        status = process.poll()
        if status is not None and (serves or status != 0):
            raise ServiceError(f"{name} ended with status {status}:\n{self.log(name)[-4000:]}")
        return self.healthy(name) if serves else status == 0

    def down(self) -> None:
        """End the services, each with its own stop signal, those first that no other needs."""
        while self._running:
            needed = {name for other in self._running for name in self._in_order([other])[:-1]}
            wave = [name for name in self._running if name not in needed]
            for name in wave:
                stop = self.compose["services"][name].get("stop_signal", "SIGTERM")
                self._running[name].send_signal(signal.Signals[stop])
            for name in wave:
                process = self._running.pop(name)
                # SeaweedFS has what it acknowledged on disk at once, and lingers.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(3 if name == "s3" else 20)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self._done.clear()

    def service(self, name: str) -> dict[str, Any]:
        """The service as compose.yaml has it, with variables and container paths replaced by this machine's."""
        service = self.compose["services"][name]
        paths = self._paths(name, service)
        return {key: _each_text(value, lambda text: self._fill(text, paths)) for key, value in service.items()}

    def environment(self, name: str = "worker") -> dict[str, str]:
        """What the service's environment comes to, secrets included, as infra/entrypoint.sh would make it."""
        found = {}
        for key, value in self.service(name).get("environment", {}).items():
            if key.endswith("_FILE"):
                found[key.removesuffix("_FILE")] = Path(value).read_text(encoding="utf-8")
            else:
                found[key] = str(value)
        return found

    def client_environment(self) -> dict[str, str]:
        """The worker's addresses and credentials, for commands on this machine."""
        ours = ("HOME", "PREFECT_WORKER_", "GIT_CONFIG_")
        return {key: value for key, value in self.environment().items() if not key.startswith(ours)}

    def secret(self, name: str) -> str:
        return (self.state / "secrets" / name).read_text(encoding="utf-8")

    def log(self, name: str) -> str:
        return (self.state / "logs" / f"{name}.log").read_text(encoding="utf-8", errors="replace")

    def healthy(self, name: str) -> bool:
        """Whether the service's own health check passes now."""
        _, *command = self.service(name)["healthcheck"]["test"]
        return subprocess.run(command, cwd=INFRA.parent, env=_path(), capture_output=True).returncode == 0

    def __enter__(self) -> Stack:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.down()

    def _variables(self) -> dict[str, str]:
        kept = self.state / "ports.json"
        if kept.is_file():
            ports: dict[str, int] = json.loads(kept.read_text(encoding="utf-8"))
        else:
            ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
            kept.write_text(json.dumps(ports), encoding="utf-8")
        hosts = ("POSTGRES_HOST", "PREFECT_HOST", "MLFLOW_HOST", "S3_HOST", "BIND_IN_CONTAINER")
        allowed = f"127.0.0.1:{ports['MLFLOW_PORT']},localhost:{ports['MLFLOW_PORT']}"
        return {
            **dict.fromkeys(hosts, "127.0.0.1"),
            **{name: str(port) for name, port in ports.items()},
            "MLFLOW_ALLOWED_HOSTS": allowed,
            "MLFLOW_WORKERS": "1",
            "S3_VOLUME_MB": "64",
            "PREFECT_PUBLIC_URL": f"http://127.0.0.1:{ports['PREFECT_PORT']}",
        }

    def _paths(self, name: str, service: Mapping[str, Any]) -> dict[str, str]:
        """Paths in the container and what they are here."""
        paths = {"/opt/poemerge/infra": str(INFRA), "/project": str(self.project)}
        for secret in service.get("secrets", ()):
            paths[f"/run/secrets/{secret}"] = str(
                self.state / "secrets" / Path(self.compose["secrets"][secret]["file"]).name
            )
        for volume in service.get("volumes", ()):
            source, target = volume.rsplit(":", 1)
            if source in self.compose["volumes"]:
                folder = self._for_postgres() if name == "postgres" else self.state / "volumes" / source
                folder.mkdir(parents=True, exist_ok=True)
                paths[target] = str(folder)
        return paths

    def _fill(self, text: str, paths: Mapping[str, str]) -> str:
        text = VARIABLE.sub(lambda match: self.variables.get(match[1], match[2] or ""), text)
        for inside, here in paths.items():
            text = re.sub(rf"(?<![\w.]){re.escape(inside)}(?![\w.-])", here, text)
        return text

    def _depends_on(self, name: str) -> list[str]:
        return list(self.compose["services"][name].get("depends_on", {}))

    def _in_order(self, names: Sequence[str]) -> list[str]:
        ordered: list[str] = []

        def visit(name: str) -> None:
            for needed in self._depends_on(name):
                visit(needed)
            if name not in ordered:
                ordered.append(name)

        for name in names:
            visit(name)
        return ordered

    def _start(self, name: str) -> subprocess.Popen[bytes]:
        service = self.service(name)
        if name == "postgres":
            self._make_cluster(service)
        log = self.state / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(service.get("working_dir", INFRA.parent))
        env = _path() | {key: str(value) for key, value in service.get("environment", {}).items()}
        as_postgres = name == "postgres" and os.getuid() == 0
        with log.open("ab") as output:
            self._running[name] = subprocess.Popen(
                [*service.get("entrypoint", ()), *service["command"]],
                cwd="/" if as_postgres else folder,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=_end_with_parent,
                user="postgres" if as_postgres else None,
                group="postgres" if as_postgres else None,
                extra_groups=[] if as_postgres else None,
            )
        return self._running[name]

    def _for_postgres(self) -> Path:
        """Its volume: PostgreSQL refuses root, and another user has to reach the folder."""
        if os.getuid() != 0:
            return self.state / "volumes" / "postgres"
        mark = hashlib.sha256(str(self.state).encode()).hexdigest()[:12]
        return Path(tempfile.gettempdir()) / f"poemerge-postgres-{mark}"

    def _make_cluster(self, service: Mapping[str, Any]) -> None:
        """What the image's entrypoint does first: initdb, where there is no cluster yet."""
        data = Path(service["environment"]["PGDATA"])
        mark = self.state / "volumes" / "postgres.made"
        if (data / "PG_VERSION").is_file() and mark.is_file():
            return
        # Left behind by a state folder that somebody removed: nobody knows its password any more.
        shutil.rmtree(data, ignore_errors=True)
        data.mkdir(parents=True, exist_ok=True)
        as_postgres = os.getuid() == 0
        if as_postgres:
            user = pwd.getpwnam("postgres")
            for folder in (data.parent, data):
                os.chown(folder, user.pw_uid, user.pw_gid)
        data.chmod(0o700)
        password = data.parent / "password"
        password.write_text(self.secret("postgres_password"), encoding="utf-8")
        password.chmod(0o600)
        if as_postgres:
            os.chown(password, user.pw_uid, user.pw_gid)
        subprocess.run(
            ["initdb", "-D", data, "--username=postgres", f"--pwfile={password}", "--auth=scram-sha-256", "--no-sync"],
            check=True,
            cwd="/",
            stdout=subprocess.DEVNULL,
            user="postgres" if as_postgres else None,
            group="postgres" if as_postgres else None,
            extra_groups=[] if as_postgres else None,
        )
        password.unlink()
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()

    def remove(self) -> None:
        """Forget everything: volumes, secrets, logs. Only after `down`."""
        shutil.rmtree(self._for_postgres(), ignore_errors=True)
        shutil.rmtree(self.state, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    """Free ports whose neighbours 10000 above are free too, for SeaweedFS speaks gRPC there."""
    found: list[int] = []
    with contextlib.ExitStack() as held:
        while len(found) < count:
            low, high = held.enter_context(socket.socket()), held.enter_context(socket.socket())
            low.bind(("127.0.0.1", 0))
            port = int(low.getsockname()[1])
            with contextlib.suppress(OSError, OverflowError):
                high.bind(("127.0.0.1", port + 10_000))
                found.append(port)
    return found


def _each_text(value: Any, change: Any) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_each_text(one, change) for one in value]
    if isinstance(value, dict):
        return {key: _each_text(one, change) for key, one in value.items()}
    return value


def _path() -> dict[str, str]:
    """Our environment, with the `python`, `prefect`, `mlflow` and `weed` of this interpreter first."""
    ours = {
        key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "MLFLOW_", "AWS_", "PG"))
    }
    return ours | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])}


def _end_with_parent() -> None:
    """Have the kernel end this child when its parent is gone, however that ended (Linux)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


@contextlib.contextmanager
def dvc_remote(project: Path, url: str = "s3://dvc") -> Iterator[None]:
    """DVC's default remote of this machine alone is `url` within this block; address and keys come from AWS_…"""
    dvc = [sys.executable, "-m", "dvc", "remote"]
    subprocess.run([*dvc, "add", "--local", "--default", "--force", "services", url], cwd=project, check=True)
    try:
        yield
    finally:
        subprocess.run([*dvc, "remove", "--local", "services"], cwd=project, check=True)


def _split(arguments: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """What stands before the first -- and what stands after it."""
    at = list(arguments).index("--") if "--" in arguments else len(arguments)
    return arguments[:at], arguments[at + 1 :]


def main(arguments: Sequence[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "up"])
    parser.add_argument("--project", type=Path, default=INFRA.parent, help="the checkout to work in")
    parser.add_argument("--state", type=Path, help="default: .poemerge/services of the project")
    own, command = _split(arguments)
    given = parser.parse_args(own)
    if (given.action == "run") != bool(command):
        parser.error("`run` takes a command after --, `up` takes none")
    with Stack(given.state or given.project / ".poemerge" / "services", given.project) as stack:
        try:
            stack.up(["prefect", "mlflow-user"])
            with dvc_remote(given.project):
                if given.action == "run":
                    return subprocess.run(command, env=_path() | stack.client_environment()).returncode
                stack.up(["install", "worker"])
                for name, value in stack.client_environment().items():
                    print(f"export {name}={value}")  # noqa: T201
                print("# Ctrl-C ends the services", flush=True)  # noqa: T201
                signal.sigwait({signal.SIGINT, signal.SIGTERM})
        except (ServiceError, KeyboardInterrupt) as error:
            print(error, file=sys.stderr)  # noqa: T201
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
