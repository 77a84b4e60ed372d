"""Local sources and the lock: what is taken, what is refused, and that an unchanged folder is not read again."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tiny import make_base, make_full_expert, make_lora_expert, make_suite

from poemerge.checkpoints import folder_digest
from poemerge.errors import BadInputError, ProjectError
from poemerge.project import Project
from poemerge.sources import Entry, Lock, find_problems, resolve
from poemerge.sources.contents import license_of, needed
from poemerge.sources.digests import DigestCache
from poemerge.sources.refusal import Refusal, RetryPolicy, retrying


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, full, lora and suite; tests copy what they change."""
    root = tmp_path_factory.mktemp("models")
    base = make_base(root / "base")
    make_full_expert(base, root / "full", 1)
    make_lora_expert(base, root / "lora", 2)
    make_suite(root / "suite")
    return root


@pytest.fixture
def project(tmp_path: Path, models: Path) -> Project:
    root = tmp_path / "project"
    root.mkdir()
    (root / "dvc.yaml").touch()
    (root / "models").mkdir()
    for folder in models.iterdir():
        (root / "models" / folder.name).mkdir()
        for file in folder.iterdir():
            (root / "models" / folder.name / file.name).write_bytes(file.read_bytes())
    say(root, "base: {source: models/base}\nexperts: {full: {source: models/full}, lora: {source: models/lora}}\n")
    return Project(root)


def say(root: Path, text: str) -> None:
    (root / "params.yaml").write_text(text, encoding="utf-8")


def resolved(project: Project) -> Lock:
    return resolve(project, project.load_params())


def refused(project: Project) -> list[str]:
    with pytest.raises(BadInputError) as caught:
        resolved(project)
    assert caught.value.exit_status == 2
    return [str(problem) for problem in caught.value.problems]


def test_a_folder_is_named_by_the_digest_of_what_it_holds(project: Project) -> None:
    lock = resolved(project)
    full = lock.experts["full"]
    assert full.digest == folder_digest(project.root / "models" / "full")
    assert full.revision == f"sha256:{full.digest}"
    assert Lock.read(project.sources_lock) == lock
    (project.root / "models" / "full" / "training_args.bin").write_bytes(b"pickle")
    (project.root / "models" / "full" / "checkpoint-5").mkdir()
    (project.root / "models" / "full" / "checkpoint-5" / "model.safetensors").write_bytes(b"x")
    assert resolved(project).experts["full"] == full


def test_changed_weights_change_one_revision(project: Project) -> None:
    before = resolved(project)
    weights = project.root / "models" / "full" / "model.safetensors"
    save_file({name: value + 1 for name, value in load_file(weights).items()}, weights)
    after = resolved(project)
    assert [(c.what, c.name, c.old, c.new) for c in after.changes(before)] == [
        ("expert", "full", before.experts["full"].revision, after.experts["full"].revision)
    ]
    assert len(after.changes(None)) == 3


def test_the_lock_is_written_only_on_change(project: Project) -> None:
    resolved(project)
    inode = project.sources_lock.stat().st_ino
    resolved(project)
    assert project.sources_lock.stat().st_ino == inode
    weights = project.root / "models" / "full" / "model.safetensors"
    save_file(load_file(weights) | {"head.bias": load_file(weights)["head.weight"][:, 0].clone()}, weights)
    polled = resolve(project, project.load_params(), write=False)
    assert project.sources_lock.stat().st_ino == inode
    resolved(project)
    assert project.sources_lock.stat().st_ino != inode
    assert Lock.read(project.sources_lock) == polled


def test_an_unchanged_file_is_not_read_again(project: Project, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"old")
    os.utime(file, ns=(1_000, 1_000))
    cache = DigestCache(tmp_path / "state" / "digests.json")
    old = cache.sha256(file)
    cache.save()
    # The same size, time and inode: only one who reads the bytes would notice.
    with file.open("r+b") as handle:
        handle.write(b"new")
    os.utime(file, ns=(1_000, 1_000))
    assert DigestCache(tmp_path / "state" / "digests.json").sha256(file) == old
    os.utime(file, ns=(2_000, 2_000))
    assert DigestCache(tmp_path / "state" / "digests.json").sha256(file) != old


def test_a_file_written_just_now_is_not_remembered(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"old")
    cache = DigestCache(tmp_path / "digests.json")
    old, stamp = cache.sha256(file), file.stat().st_mtime_ns
    with file.open("r+b") as handle:
        handle.write(b"new")
    os.utime(file, ns=(stamp, stamp))
    assert cache.sha256(file) != old


def test_all_problems_are_told_at_once(project: Project) -> None:
    models = project.root / "models"
    (models / "empty").mkdir()
    (models / "pickled").mkdir()
    (models / "pickled" / "config.json").write_text("{}")
    (models / "pickled" / "pytorch_model.bin").write_bytes(b"pickle")
    (models / "notes").mkdir()
    (models / "notes" / "weights.safetensors").write_bytes((models / "full" / "model.safetensors").read_bytes())
    say(
        project.root,
        """
base: {source: models/nowhere}
experts:
  empty: {source: models/empty}
  pickled: {source: models/pickled}
  notes: {source: models/notes}
  pinned: {source: models/full, revision: v1}
  query: {source: "hf://owner?tag=x"}
  scheme: {source: "hf:/owner/name"}
  full: {source: models/full}
evaluate: {suites: {full: {data: models/no-data}}}
""",
    )
    told = refused(project)
    assert len(told) == 8
    text = "\n".join(told)
    for words in (
        "params.yaml base.source\n  got:      no folder",
        "expert:   empty\n  got:      no files",
        "only pickled weights: pytorch_model.bin",
        "neither config.json nor adapter_config.json; there is weights.safetensors",
        "revision 'v1' with models/full",
        "a query names a collection",
        "params.yaml evaluate.suites.full.data",
    ):
        assert words in text
    assert not project.sources_lock.exists()


def test_problems_are_found_without_a_whole_params_yaml(project: Project) -> None:
    params = project.load_params()
    moved = {"full": params.experts["full"].model_copy(update={"source": "models/gone"})}
    problems = find_problems(project.root, None, moved, {})
    assert [problem.expert for problem in problems] == ["full"]


def truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])


def preallocate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(bytes(weights.stat().st_size))


def lose_a_shard(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model-00001-of-00002.safetensors")
    index = {
        "weight_map": dict.fromkeys(tensors, "model-00001-of-00002.safetensors")
        | {"x": "model-00002-of-00002.safetensors"}
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def leave_a_temporary_name(folder: Path) -> None:
    (folder / ".model.safetensors.aB3dE6").write_bytes(b"rsync")


def cut_the_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"hidden_size": 32, ')


@pytest.mark.parametrize("harm", [truncate, preallocate, lose_a_shard, leave_a_temporary_name, cut_the_config])
def test_a_half_copied_folder_is_refused(project: Project, harm) -> None:  # type: ignore[no-untyped-def]
    harm(project.root / "models" / "full")
    (told,) = refused(project)
    assert "a whole checkpoint" in told
    assert "expert:   full" in told


def test_skip_keeps_the_locked_revision_and_says_so(project: Project) -> None:
    before = resolved(project)
    truncate(project.root / "models" / "full")
    text = project.params_yaml.read_text()
    say(project.root, text + "fetch: {on_bad_expert: skip}\n")
    lock = resolved(project)
    assert lock.experts["full"] == before.experts["full"]
    assert "its header says" in lock.skipped["full"]
    assert Lock.read(project.sources_lock) == lock
    project.sources_lock.unlink()
    lock = resolved(project)
    assert set(lock.experts) == {"lora"}
    assert "full" in lock.skipped


def test_skip_never_means_the_base(project: Project) -> None:
    truncate(project.root / "models" / "base")
    say(project.root, project.params_yaml.read_text() + "fetch: {on_bad_expert: skip}\n")
    (told,) = refused(project)
    assert "base.source" in told


def test_a_suite_is_a_folder_or_a_file(project: Project) -> None:
    file = project.root / "models" / "suite" / "test.jsonl"
    text = project.params_yaml.read_text()
    say(
        project.root,
        text + "evaluate: {suites: {full: {data: models/suite}, lora: {data: models/suite/test.jsonl}, x: {}}}\n",
    )
    lock = resolved(project)
    assert set(lock.suites) == {"full", "lora"}
    assert lock.suites["full"].digest == folder_digest(file.parent)


def test_a_lock_of_another_format_is_an_error_that_says_what_to_do(project: Project) -> None:
    resolved(project)
    for text in ('{"format": 99}', "not json", "[]"):
        project.sources_lock.write_text(text)
        with pytest.raises(ProjectError, match="delete it"):
            resolved(project)


def test_changes_name_what_came_and_went() -> None:
    entry = Entry("src", "r1")
    before = Lock(entry, {"a": entry, "b": entry})
    after = Lock(entry, {"b": replace(entry, revision="r2"), "c": entry})
    found = {(c.name, c.old, c.new) for c in after.changes(before)}
    assert found == {("a", "r1", None), ("b", "r1", "r2"), ("c", None, "r1")}


def test_what_is_said_of_a_source_is_no_landing_and_is_told() -> None:
    entry = Entry("src", "r1")
    before = Lock(entry, {"a": entry, "b": entry})
    after = Lock(replace(entry, license="mit"), {"a": entry, "b": replace(entry, source="other", revision="r2")})
    assert after.restated(before) == ["base base"]
    assert after.restated(None) == []


@pytest.mark.parametrize(
    ("base", "folder"),
    [
        ("models/base", "./models"),
        ("./models/base", "models"),
        ("{root}/models/base", "models/"),
        ("models/base/", "{root}/models"),
        ("file://{root}/models/base", "models/*"),
    ],
)
def test_the_base_is_no_member_however_it_is_spelt(project: Project, base: str, folder: str) -> None:
    (project.root / "models" / "suite").rename(project.root / "suite")
    base, folder = (text.format(root=project.root) for text in (base, folder))
    full = "experts: {full: {source: ./models/full}}"
    say(project.root, f"base: {{source: '{base}'}}\n{full}\ncollections: {{all: {{source: '{folder}'}}}}\n")
    assert set(resolved(project).experts) == {"full", "lora"}


def test_weights_are_taken_once() -> None:
    listing = [
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json",
        "consolidated.safetensors", "config.json", "tokenizer.model", "README.md", "head.safetensors",
        "pytorch_model.bin", "onnx/model.onnx", ".gitattributes", "training_args.bin", "run.py", "source.json",
    ]  # fmt: skip
    assert needed(listing, "checkpoint") == [
        "README.md", "config.json", "head.safetensors", "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.model",
    ]  # fmt: skip
    assert needed(["weights.safetensors", "head.safetensors", "config.json"], "checkpoint") == [
        "config.json",
        "head.safetensors",
        "weights.safetensors",
    ]
    assert needed(["data/test.parquet", "load.py", "cache.pkl", "labels.json"], "data") == [
        "data/test.parquet",
        "labels.json",
    ]


@pytest.mark.parametrize(
    ("card", "license_"),
    [
        ("---\nlicense: apache-2.0\n---\n# Model", "apache-2.0"),
        ("---\nlicense: other\nlicense_name: llama3\n---\n", "llama3"),
        ("---\nlicense: [mit, gpl-3.0]\n---\n", "mit, gpl-3.0"),
        ("# No front matter\n---\nlicense: mit\n---\n", None),
        ("---\nlicense: [\n---\n", None),
    ],
)
def test_the_licence_is_read_from_the_model_card(tmp_path: Path, card: str, license_: str | None) -> None:
    (tmp_path / "README.md").write_text(card)
    assert license_of(tmp_path) == license_


def test_retries_end_with_the_count_and_never_repeat_what_is_final(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    tried: list[bool] = []

    def fail(transient: bool) -> None:
        tried.append(transient)
        raise Refusal("down", "up", "wait", transient=transient)

    with pytest.raises(Refusal, match="tried 4 times"):
        retrying(lambda: fail(True), "it", RetryPolicy(attempts=4, first_wait=1.0, longest_wait=3.0))
    assert len(tried) == 4
    for wait, whole in zip(waits, [1.0, 2.0, 3.0], strict=True):
        assert whole / 2 <= wait <= whole
    tried.clear()
    with pytest.raises(Refusal, match="down"):
        retrying(lambda: fail(False), "it", RetryPolicy())
    assert len(tried) == 1
