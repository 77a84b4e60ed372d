"""hf:// against a real hub server on loopback: pinning, what is downloaded, and every way in which a hub can fail."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import LFS_FROM, Fault, Hub
from tiny import make_base, make_full_expert, make_suite

from poemerge.checkpoints import folder_digest
from poemerge.errors import BadInputError, SourceError
from poemerge.project import Project
from poemerge.sources import Lock, RetryPolicy, read_source_json, resolve
from tasks.fetch import fetch
from tasks.report import StageReport

TWICE = RetryPolicy(attempts=2)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    base = make_base(root / "base")
    for name, seed in (("a", 1), ("a2", 2), ("b", 3)):
        make_full_expert(base, root / name, seed)
    make_suite(root / "suite")
    assert (root / "a" / "model.safetensors").stat().st_size > LFS_FROM > (root / "a" / "config.json").stat().st_size
    return root


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    monkeypatch.setattr("time.sleep", lambda _: None)  # the client and we wait between attempts
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with Hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        yield hub


@pytest.fixture
def project(tmp_path: Path, models: Path, hub: Hub) -> Project:
    root = tmp_path / "project"
    root.mkdir()
    (root / "dvc.yaml").touch()
    hub.push("team/base", models / "base")
    hub.push("team/a", models / "a")
    say(root, 'base: {source: "hf://team/base"}\nexperts: {a: {source: "hf://team/a"}}\n')
    return Project(root)


def say(root: Path, text: str) -> None:
    (root / "params.yaml").write_text(text, encoding="utf-8")


def resolved(project: Project) -> Lock:
    return resolve(project, project.load_params())


def fetched(project: Project, policy: RetryPolicy = TWICE) -> StageReport:
    return fetch(project, project.load_params(), policy)


def test_a_branch_is_resolved_before_anything_is_downloaded(project: Project, hub: Hub, models: Path) -> None:
    lock = resolved(project)
    sha = hub.repositories["models", "team/a"].refs["main"]
    assert (lock.experts["a"].revision, lock.experts["a"].digest) == (sha, None)
    assert all(path.startswith("/api/") for _, path in hub.requests)
    new = hub.push("team/a", models / "a2")
    fetched(project)
    known = read_source_json(project.expert("a"))
    assert known is not None
    assert (known["revision"], known["source"]) == (sha, "hf://team/a")
    assert known["digest"] == folder_digest(project.expert("a")) == folder_digest(models / "a")
    assert not [path for _, path in hub.requests if new in path]
    after = resolved(project)
    assert [(c.name, c.old, c.new) for c in after.changes(lock)] == [("a", sha, new)]
    fetched(project)
    assert folder_digest(project.expert("a")) == folder_digest(models / "a2")


def test_a_full_commit_is_resolved_without_asking(project: Project, hub: Hub) -> None:
    sha = hub.repositories["models", "team/a"].refs["main"]
    pinned = f'base: {{source: "hf://team/base@main"}}\nexperts: {{a: {{source: "hf://team/a", revision: {sha}}}}}\n'
    say(project.root, pinned)
    assert resolved(project).experts["a"].revision == sha
    assert [path for _, path in hub.requests if "team/a" in path] == []
    fetched(project)
    known = read_source_json(project.expert("a"))
    assert known is not None
    assert known["source"] == f"hf://team/a@{sha}"


def test_only_needed_files_are_downloaded(project: Project, hub: Hub, models: Path) -> None:
    files = {p.name: p.read_bytes() for p in (models / "a").iterdir()}
    card = b"---\nlicense: mit\n---\n"
    hub.push("team/a", files | {"README.md": card, "pytorch_model.bin": b"pickle", "onnx/model.onnx": b"onnx"})
    resolved(project)
    report = fetched(project)
    got = {path.rsplit("/", 1)[1] for method, path in hub.requests if "/team/a/resolve/" in path}
    assert got == {*files, "README.md"}
    assert {row["name"]: row["license"] for row in report.table} == {"base": None, "a": "mit"}


def test_a_sub_folder_and_a_dataset(project: Project, hub: Hub, models: Path) -> None:
    hub.push("team/many", {f"tuned/b/{p.name}": p.read_bytes() for p in (models / "b").iterdir()})
    hub.push("team/texts", models / "suite", kind="datasets")
    say(
        project.root,
        'base: {source: "hf://team/base"}\nexperts: {b: {source: "hf://team/many/tuned/b"}}\n'
        'evaluate: {suites: {b: {data: "hf://datasets/team/texts"}}}\n',
    )
    resolved(project)
    fetched(project)
    assert folder_digest(project.expert("b")) == folder_digest(models / "b")
    assert folder_digest(project.suite("b")) == folder_digest(models / "suite")


def test_a_hub_that_is_down_never_gives_what_the_cache_last_saw(
    project: Project, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved(project)
    fetched(project)
    before = project.sources_lock.read_bytes()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(SourceError, match=r"127\.0\.0\.1:1 cannot be reached.*(?s:.)*the cache last saw is not taken"):
        resolved(project)
    assert project.sources_lock.read_bytes() == before
    # What is locked and there needs no hub.
    assert {row["state"] for row in fetched(project).table} == {"kept"}


def test_offline_takes_pinned_commits_from_the_cache_and_nothing_else(
    project: Project, hub: Hub, monkeypatch: pytest.MonkeyPatch, models: Path
) -> None:
    lock = resolved(project)
    fetched(project)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(BadInputError, match="only the hub knows"):
        resolved(project)
    requests = len(hub.requests)
    base, a = lock.base.revision, lock.experts["a"].revision
    say(project.root, f'base: {{source: "hf://team/base@{base}"}}\nexperts: {{a: {{source: "hf://team/a@{a}"}}}}\n')
    resolved(project)
    fetched(project)
    assert len(hub.requests) == requests
    assert folder_digest(project.expert("a")) == folder_digest(models / "a")
    say(
        project.root,
        f'base: {{source: "hf://team/base@{base}"}}\nexperts: {{a: {{source: "hf://team/a@{"0" * 40}"}}}}\n',
    )
    resolved(project)
    with pytest.raises(BadInputError, match="is not in"):
        fetched(project)


def test_what_is_wrong_with_a_repository_is_told_at_once(project: Project, hub: Hub, models: Path) -> None:
    hub.push("team/pickled", {"config.json": b"{}", "pytorch_model.bin": b"pickle"})
    say(
        project.root,
        """
base: {source: "hf://team/base"}
experts:
  gone: {source: "hf://team/gone"}
  old: {source: "hf://team/a@v9"}
  pickled: {source: "hf://team/pickled"}
""",
    )
    with pytest.raises(BadInputError) as caught:
        resolved(project)
    assert [(p.expert, p.got.replace(hub.endpoint, "HUB")) for p in caught.value.problems] == [
        ("gone", "HUB has no such repository (or hides it)"),
        ("old", "no such revision"),
        ("pickled", "only pickled weights: pytorch_model.bin"),
    ]


def test_a_gated_repository_says_what_to_do(project: Project, hub: Hub) -> None:
    resolved(project)
    hub.repositories["models", "team/a"].gated = True
    with pytest.raises(BadInputError, match="accept its terms"):
        fetched(project)


@pytest.mark.parametrize(
    "fault",
    [
        Fault("/api/models/team/a/*", "status", 429, times=2),
        Fault("/api/models/team/a/*", "status", 500, times=1),
    ],
)
def test_a_busy_hub_is_asked_again(project: Project, hub: Hub, fault: Fault) -> None:
    hub.faults.append(fault)
    resolved(project)
    assert hub.faults == []


@pytest.mark.parametrize(
    "fault",
    [
        Fault("*/team/a/resolve/*/model.safetensors", "status", 429, times=2, method="GET"),
        Fault("*/team/a/resolve/*/model.safetensors", "status", 503, times=1, method="GET"),
        Fault("*/team/a/resolve/*", "status", 500, times=1, method="HEAD"),
        Fault("*/team/a/tree/*", "status", 502, times=1),
        Fault("*/team/a/resolve/*/model.safetensors", "truncated", times=3),
        Fault("*/team/a/resolve/*/model.safetensors", "wrong_bytes", times=2),
        Fault("*/team/a/resolve/*/config.json", "wrong_bytes", times=2),
        Fault("*/team/a/resolve/*/model.safetensors", "hang", seconds=0.6, times=1, method="GET"),
    ],
    ids=lambda fault: f"{fault.method}-{fault.kind}-{fault.status}-{fault.path.rsplit('/')[-1]}",
)
def test_a_fault_that_passes_is_overcome(
    project: Project, hub: Hub, models: Path, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    resolved(project)
    hub.faults.append(fault)
    fetched(project)
    assert hub.faults == []
    assert folder_digest(project.expert("a")) == folder_digest(models / "a")


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (Fault("*/team/a/resolve/*/model.safetensors", "status", 429), "answered 429"),
        (Fault("*/team/a/resolve/*", "status", 500), "answered 500"),
        (Fault("*/team/a/tree/*", "status", 500), "answered 500"),
        (Fault("*/team/a/resolve/*/model.safetensors", "truncated"), "broke off"),
        (Fault("*/team/a/resolve/*/model.safetensors", "wrong_bytes"), "as the hub lists it"),
        (Fault("*/team/a/resolve/*/config.json", "wrong_bytes"), "as the hub lists it"),
        (Fault("*/team/a/resolve/*/model.safetensors", "hang", seconds=0.6), "broke off"),
    ],
    ids=lambda value: value.kind if isinstance(value, Fault) else "",
)
def test_a_fault_that_stays_ends_naming_the_expert_with_nothing_half_fetched(
    project: Project, hub: Hub, models: Path, fault: Fault, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    monkeypatch.setattr("poemerge.sources.hub.TIMEOUT", 0.2)
    resolved(project)
    hub.faults.append(fault)
    with pytest.raises(SourceError) as caught:
        fetched(project)
    assert "expert:   a" in str(caught.value)
    assert told in str(caught.value)
    assert "tried 2 times" in str(caught.value)
    assert not project.expert("a").exists()
    assert folder_digest(project.base) == folder_digest(models / "base")
    hub.faults.clear()
    fetched(project)
    assert folder_digest(project.expert("a")) == folder_digest(models / "a")


def test_a_hundred_repositories_cost_a_hundred_requests_and_write_nothing(
    project: Project, hub: Hub, models: Path
) -> None:
    for i in range(100):
        hub.push(f"team/e{i}", models / "a")
    experts = ", ".join(f'e{i}: {{source: "hf://team/e{i}"}}' for i in range(100))
    say(project.root, f'base: {{source: "hf://team/base"}}\nexperts: {{{experts}}}\n')
    lock = resolved(project)
    inode = project.sources_lock.stat().st_ino
    hub.requests.clear()
    assert resolved(project).changes(lock) == []
    assert len(hub.requests) == 101
    assert project.sources_lock.stat().st_ino == inode


def test_a_download_that_broke_off_goes_on_where_it_was(
    project: Project, hub: Hub, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)  # our models are small
    resolved(project)
    hub.faults.append(Fault("*/team/a/resolve/*/model.safetensors", "truncated", times=1, method="GET"))
    fetched(project)
    assert hub.resumed == ["model.safetensors"]
    assert folder_digest(project.expert("a")) == folder_digest(models / "a")


def test_the_next_run_downloads_only_the_files_that_failed(project: Project, hub: Hub, models: Path) -> None:
    resolved(project)
    hub.faults.append(Fault("*/team/a/resolve/*/vocab.txt", "status", 500))
    with pytest.raises(SourceError):
        fetched(project, RetryPolicy(attempts=1))
    hub.faults.clear()
    hub.requests.clear()
    fetched(project)
    assert [path.rsplit("/")[-1] for method, path in hub.requests if method == "GET" and "/resolve/" in path] == [
        "vocab.txt"
    ]


def test_skip_after_a_network_fault_tries_again_in_the_next_run(project: Project, hub: Hub, models: Path) -> None:
    say(project.root, project.params_yaml.read_text() + "fetch: {on_bad_expert: skip}\n")
    hub.push("team/b", models / "b")
    say(
        project.root,
        project.params_yaml.read_text().replace('"hf://team/a"}', '"hf://team/a"}, b: {source: "hf://team/b"}'),
    )
    lock = resolved(project)
    hub.faults.append(Fault("*/team/b/*", "status", 500))
    report = fetched(project)
    assert [w for w in report.warnings if w.startswith("expert b skipped (left out")]
    assert set(project.expert_folders()) == {"a"}
    hub.faults.clear()
    polled = resolve(project, project.load_params(), write=False)
    assert polled.changes(lock) == []
    assert resolved(project).experts["b"].attempt == 1
    assert resolved(project).experts["b"].attempt == 1
    report = fetched(project)
    assert report.warnings == []
    assert set(project.expert_folders()) == {"a", "b"}
