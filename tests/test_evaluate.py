"""Evaluating: suites of text, the models that meet on them, kept scores, and what evaluation.json says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from poemerge.checkpoints import folder_digest
from poemerge.contenders import Field, open_suites
from poemerge.errors import ProjectError, SuiteError
from poemerge.params import SuiteParams
from poemerge.project import Project
from poemerge.suites.evaluation import evaluate_models
from poemerge.suites.protocol import Model, SuiteSpec, open_suite
from poemerge.suites.runtime import Runtime, choose_runtime
from poemerge.suites.store import ScoreStore
from poemerge.suites.summary import summarise
from tests.tiny import make_base, make_full_expert, make_lora_expert, make_suite

FLOAT32 = Runtime(torch.device("cpu"), torch.float32, batch_size=7)
SUITES = {"one": SuiteParams(), "two": SuiteParams(expert="adapted")}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A fetched project with a full and a LoRA expert, and a merged folder: the base moved by both, half way."""
    project = Project(tmp_path_factory.mktemp("project"))
    make_base(project.base)
    make_full_expert(project.base, project.expert("one"), seed=1, size=0.05)
    make_lora_expert(project.base, project.expert("adapted"), seed=2)
    for name, seed in (("one", 1), ("two", 2)):
        make_suite(project.suite(name), seed=seed, examples=40)
    for folder in (project.base, *map(project.expert, ("one", "adapted")), *map(project.suite, ("one", "two"))):
        (folder / "source.json").write_text(json.dumps({"digest": folder_digest(folder)}))
    (project.merged / "heads").mkdir(parents=True)
    base, one = (load_file(folder / "model.safetensors") for folder in (project.base, project.expert("one")))
    save_file({"head.weight": one.pop("head.weight")}, project.merged / "heads" / "one.safetensors")
    save_file(
        load_file(project.expert("adapted") / "head.safetensors"), project.merged / "heads" / "adapted.safetensors"
    )
    save_file({k: (base[k] + one[k]) / 2 if base[k].is_floating_point() else base[k] for k in base},
              project.merged / "model.safetensors", {"format": "pt"})  # fmt: skip
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (project.merged / file).write_bytes((project.base / file).read_bytes())
    project.merge_json.write_text(json.dumps({"digest": folder_digest(project.merged)}))
    return project


def logits_by_hand(encoder: torch.nn.Module, folder: Path, head: torch.Tensor, texts: list[str]) -> torch.Tensor:
    """One text at a time, no padding: the textbook form of the zoo's model."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = []
    for text in texts:
        states = encoder(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        pooled = states.mean(0)
        rows.append(head @ (pooled / pooled.norm()))
    return torch.stack(rows)


def nll_of(logits: torch.Tensor, labels: list[int]) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits, torch.tensor(labels), reduction="none")


def examples(project: Project, suite: str) -> tuple[list[str], list[int]]:
    lines = [json.loads(line) for line in (project.suite(suite) / "test.jsonl").read_text().splitlines()]
    return [line["text"] for line in lines], [line["label"] for line in lines]


@torch.no_grad()
def test_full_expert_predicts_as_transformers_do(project: Project) -> None:
    from transformers import AutoModel

    suite = open_suite(SuiteSpec("one", SuiteParams(), project.suite("one")))
    assert suite.load() == 40
    head = project.merged / "heads" / "one.safetensors"
    got = suite.predict(Model("expert", project.expert("one"), project.base, head), FLOAT32)
    texts, labels = examples(project, "one")
    encoder = AutoModel.from_pretrained(project.expert("one")).eval()
    logits = logits_by_hand(encoder, project.base, load_file(head)["head.weight"], texts)
    assert got["target"].tolist() == labels
    assert got["predicted"].tolist() == logits.argmax(-1).tolist()
    assert got["nll"] == pytest.approx(
        torch.nn.functional.cross_entropy(logits, torch.tensor(labels), reduction="none")
    )
    assert got["confidence"] == pytest.approx(logits.softmax(-1).max(-1).values, rel=1e-4)


@torch.no_grad()
def test_adapter_predicts_as_peft_does(project: Project) -> None:
    from peft import PeftModel
    from transformers import AutoModel

    suite = open_suite(SuiteSpec("two", SuiteParams(), project.suite("two")))
    suite.load()
    head = project.merged / "heads" / "adapted.safetensors"
    got = suite.predict(Model("expert", project.expert("adapted"), project.base, head), FLOAT32)
    texts, labels = examples(project, "two")
    encoder = PeftModel.from_pretrained(AutoModel.from_pretrained(project.base), project.expert("adapted")).eval()
    logits = logits_by_hand(encoder, project.base, load_file(head)["head.weight"], texts)
    assert got["nll"] == pytest.approx(
        torch.nn.functional.cross_entropy(logits, torch.tensor(labels), reduction="none")
    )
    plain = suite.predict(Model("base", project.base, project.base, head), FLOAT32)
    assert not np.allclose(plain["nll"], got["nll"]), "the adapter changes something"


@torch.no_grad()
def test_sequence_classifier_takes_its_private_classifier(project: Project, tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig.from_pretrained(project.base, num_labels=3)
    expert = BertForSequenceClassification.from_pretrained(project.base, config=config).eval()
    expert.save_pretrained(tmp_path / "expert")
    private = {name: value for name, value in expert.state_dict().items() if name.startswith("classifier.")}
    save_file(private, tmp_path / "head.safetensors")
    suite = open_suite(SuiteSpec("one", SuiteParams(), project.suite("one")))
    suite.load()
    # The backbone of the folder (here the base's own, unprefixed) with the expert's classifier in the expert's form.
    model = Model("merged", project.base, project.base, tmp_path / "head.safetensors", tmp_path / "expert")
    got = suite.predict(model, FLOAT32)
    texts, labels = examples(project, "one")
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(project.base)(texts, padding=True, return_tensors="pt")
    expected = nll_of(expert(**tokens).logits, labels)
    assert got["nll"] == pytest.approx(expected)
    with pytest.raises(SuiteError, match=r"classifier\.bias \(2 such\)"):
        suite.predict(Model("merged", project.base, project.base, None, tmp_path / "expert"), FLOAT32)


def evaluate(project: Project, store: ScoreStore) -> dict[str, object]:
    suites = open_suites(project, SUITES)
    field = Field.of(project)
    results = evaluate_models(suites, [field.base(), field.expert(), field.merged()], store, FLOAT32)
    return summarise(suites, results, store, project.root, samples=200, seed=0)


def test_scores_are_kept_by_what_they_depend_on(project: Project) -> None:
    first = evaluate(project, ScoreStore(project.scores))
    files = {path: path.stat().st_mtime_ns for path in project.scores.iterdir()}
    assert len(files) == 2 * 2 * 3
    assert evaluate(project, ScoreStore(project.scores)) == first
    assert {path: path.stat().st_mtime_ns for path in project.scores.iterdir()} == files, "nothing was scored again"

    merge_json = project.merge_json.read_text()
    project.merge_json.write_text(json.dumps({"digest": "another"}))
    evaluate(project, ScoreStore(project.scores))
    project.merge_json.write_text(merge_json)
    after = {path: path.stat().st_mtime_ns for path in project.scores.iterdir()}
    kept = [path for path in after if files.get(path) == after[path]]
    assert len(after) == len(files), "what is not used any more is gone"
    assert len(kept) == 2 * 2 * 2, "the base and the experts were not scored again"


def test_evaluation_says_what_the_predictions_say(project: Project) -> None:
    from sklearn.metrics import accuracy_score

    store = ScoreStore(project.scores)
    found = evaluate(project, store)
    suites = open_suites(project, SUITES)
    accuracy = {}
    for suite in suites:
        table = found["suites"][suite.name]
        assert (table["examples"], table["metric"]) == (40, "accuracy")
        for who in ("base", "expert", "merged"):
            _, columns = store.get(Path(table["predictions"][who]).stem)
            accuracy[suite.name, who] = accuracy_score(columns["target"], columns["predicted"])
            assert table[who] == accuracy[suite.name, who]
            low, high = table["intervals"][who]
            assert low <= table[who] <= high
        assert table["normalised"] == table["merged"] / table["expert"]
        lead = table["lead"]["base"]
        assert lead["difference"] == pytest.approx(table["merged"] - table["base"])
        assert lead["ours_only"] - lead["theirs_only"] == pytest.approx(40 * lead["difference"])
    mean = found["mean"]
    ratios = [accuracy[name, "merged"] / accuracy[name, "expert"] for name in SUITES]
    assert mean["normalised"] == pytest.approx(np.mean(ratios))
    merged, expert = (np.mean([accuracy[name, who] for name in SUITES]) for who in ("merged", "expert"))
    assert (mean["merged"], mean["expert"]) == (pytest.approx(merged), pytest.approx(expert))
    assert mean["normalised_ratio_of_means"] == pytest.approx(merged / expert)
    assert found["suites"]["two"]["expert_name"] == "adapted"


def test_stage_writes_evaluation_and_merges_each_baseline_once(
    project: Project, caplog: pytest.LogCaptureFixture
) -> None:
    from poemerge.params import Params
    from tasks.evaluate import evaluate as stage

    params = Params.model_validate(
        {
            "base": {"source": "base"},
            "experts": {"one": {"source": "one"}, "adapted": {"source": "adapted"}},
            "evaluate": {"suites": SUITES, "baselines": ["mean", "ties"], "dtype": "float32", "bootstrap_samples": 200},
        }
    )
    caplog.set_level("INFO")
    report = stage(project, params)
    assert [r.getMessage() for r in caplog.records if r.getMessage().startswith("merging")] == [
        "merging mean, to be scored",
        "merging ties, to be scored",
    ]
    first = json.loads(project.evaluation_json.read_text())
    caplog.clear()
    stage(project, params)
    assert not [r for r in caplog.records if r.getMessage().startswith("merging")], "kept scores are taken again"
    again = json.loads(project.evaluation_json.read_text())
    assert again | {"seconds": 0} == first | {"seconds": 0}
    assert set(first["suites"]["one"]["baselines"]) == {"mean", "ties"} == set(first["mean"]["baselines"])
    assert report.headline.startswith(f"merged {first['mean']['merged']:.4f}")
    assert [row["task"] for row in report.table] == ["one", "two", "mean"]
    assert (project.root / str(report.figure)).read_bytes().startswith(b"\x89PNG")
    assert not list(project.state.glob("merge-*")), "no merge is left behind"

    # The mean by hand: every float weight of the base plus the mean of the two deltas.
    base, one = (load_file(folder / "model.safetensors") for folder in (project.base, project.expert("one")))
    from peft import PeftModel
    from transformers import AutoModel

    plain = AutoModel.from_pretrained(project.base)
    adapted = PeftModel.from_pretrained(AutoModel.from_pretrained(project.base), project.expert("adapted"))
    merged = adapted.merge_and_unload().state_dict()
    state = {name: value + (one[name] - base[name] + merged[name] - value) / 2 for name, value in
             plain.state_dict().items() if value.is_floating_point()}  # fmt: skip
    plain.load_state_dict(state, strict=False)
    texts, labels = examples(project, "one")
    with torch.no_grad():
        logits = logits_by_hand(plain.eval(), project.base, one["head.weight"], texts)
    right = (logits.argmax(-1) == torch.tensor(labels)).float().mean()
    assert first["suites"]["one"]["baselines"]["mean"] == pytest.approx(float(right), abs=1 / 40)


def test_nothing_merged_is_said(tmp_path: Path) -> None:
    with pytest.raises(ProjectError, match="poemerge run"):
        Field.of(Project(tmp_path))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kind": "text-clasification"}, "text-classification"),
        ({"split": "dev"}, "test.jsonl, train.jsonl, validation.jsonl"),
        ({"metric": "acuracy"}, "accuracy, macro_f1"),
        ({"options": {"max_token": 3}}, "did you mean 'max_tokens'"),
        ({"options": {"pooling": "max"}}, "mean or cls"),
        ({"options": {"text": "body"}}, "columns text, label"),
        ({"head": "nowhere.safetensors"}, "neither in the suite's data"),
    ],
)
def test_what_is_wrong_with_a_suite_is_said(project: Project, settings: dict[str, object], said: str) -> None:
    def score_the_base() -> None:
        suites = open_suites(project, {"one": SuiteParams.model_validate(settings)})
        evaluate_models(suites, [Field.of(project).base()], ScoreStore(project.scores), FLOAT32, keep_others=True)

    with pytest.raises(SuiteError) as caught:
        score_the_base()
    assert said in str(caught.value)


def test_labels_beyond_the_head_are_refused(project: Project, tmp_path: Path) -> None:
    make_suite(tmp_path / "five", classes=5)
    suite = open_suite(SuiteSpec("five", SuiteParams(), tmp_path / "five"))
    suite.load()
    head = project.merged / "heads" / "one.safetensors"
    with pytest.raises(SuiteError, match="3 classes"):
        suite.predict(Model("base", project.base, project.base, head), FLOAT32)


def test_max_examples_draws_the_same_ones_from_a_sorted_file(tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_text("text,label\n" + "".join(f"t{i},{int(i >= 50)}\n" for i in range(100)))
    drawn = []
    for _ in range(2):
        suite = open_suite(SuiteSpec("s", SuiteParams(max_examples=20), tmp_path))
        assert suite.load() == 20
        drawn.append(suite.texts)
        assert 0 < suite.target.sum() < 20
    assert drawn[0] == drawn[1]


def test_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(SuiteError, match=r"evaluate\.device"):
        choose_runtime("cuda:99", "auto", 8)
    assert choose_runtime("cpu", "float32", 8).dtype == torch.float32


def test_command_scores_without_touching_what_the_pipeline_owns(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from poemerge.cli.main import main

    project.params_yaml.write_text(
        "base: {source: b}\nexperts: {one: {source: o}, adapted: {source: a}}\n"
        "evaluate: {dtype: float32, bootstrap_samples: 100, suites: {one: {}, two: {expert: adapted}}}\n"
    )
    (project.root / "dvc.yaml").write_text("stages: {}\n")
    monkeypatch.chdir(project.root)

    def owned() -> dict[Path, bytes]:
        files = [path for folder in (project.scores, project.root / "metrics") for path in folder.rglob("*.*")]
        return {path: path.read_bytes() for path in files}

    before = owned()
    assert main(["evaluate", "--suite", "two", "--split", "validation", "--baseline", "mean", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["suites"]) == {"two"}
    assert set(found["mean"]["baselines"]) == {"mean"}
    assert owned() == before

    assert main(["evaluate", str(project.base), "--suite", "one"]) == 0
    printed = capsys.readouterr().out
    assert "normalised" in printed
    assert "calibration error" in printed
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line.startswith(("one", "base"))}
    assert rows["one"][0] == rows["one"][1], "the base, given as the model, scores as the base does"

    assert main(["evaluate", "--suite", "three"]) == 2
    assert "one of one, two" in capsys.readouterr().err


def test_command_refuses_a_split_that_is_not_there_before_anything_is_scored(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from poemerge.cli.main import main

    project.params_yaml.write_text(
        "base: {source: b}\nexperts: {one: {source: o}}\nevaluate: {dtype: float32, suites: {one: {}, two: {}}}\n"
    )
    (project.root / "dvc.yaml").write_text("stages: {}\n")
    monkeypatch.chdir(project.root)
    monkeypatch.setattr("poemerge.suites.evaluation.evaluate_models", lambda *_, **__: pytest.fail("it was scored"))

    assert main(["evaluate", "--split", "dev"]) == 2
    told = capsys.readouterr().err
    for suite in ("one", "two"):
        assert f"suite {suite} (text-classification): split 'dev'\n  got:      test.jsonl, train.jsonl" in told
    assert "  expected: dev.jsonl, dev.csv or dev.parquet\n  next:     name a split that is there" in told

    (project.suite("two") / "validation.jsonl").rename(project.root / "two's validation.jsonl")
    try:
        assert main(["evaluate", "--posterior-samples", "2"]) == 2, "the temperature is chosen on that split"
    finally:
        (project.root / "two's validation.jsonl").rename(project.suite("two") / "validation.jsonl")
    assert "suite two (text-classification): split 'validation'" in capsys.readouterr().err
