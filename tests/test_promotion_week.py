"""A scripted week: ten landings, good, worse, poisoned and malformed; and promotions while a re-merge registers."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from poemerge.cli.main import main
from poemerge.errors import BadInputError
from poemerge.project import Project
from poemerge.registry.evidence import model_folder
from poemerge.registry.lineage import recall
from poemerge.registry.promotion import carry_out, roll_back
from poemerge.registry.tracking import connect
from poemerge.registry.versions import CHAMPION, alias_version, find_version, list_versions
from tasks.register import register
from tests.registry_project import (
    CLASSES,
    class_means,
    copied,
    fresh_registry,
    merge_and_score,
    put_source,
    rewrite,
    write_params,
)
from tests.tiny import make_base, make_suite

SEEDS = {"a": 1, "b": 2, "c": 3}


class Team:
    """A project whose experts are really trained: more steps make a better one."""

    def __init__(self, root: Path) -> None:
        self.project = Project(root)
        make_base(self.project.base)
        put_source(self.project.base, "base")
        self.project.artifacts.mkdir()
        self.project.expert_json.write_text('{"family": "gaussian", "reason": "as params.yaml says"}')
        (root / "dvc.yaml").write_text("stages: {}\n")
        (root / "dvc.lock").write_text("schema: '2.0'\n")
        for name, seed in SEEDS.items():
            make_suite(self.project.suite(name), CLASSES, seed, examples=120)
            put_source(self.project.suite(name), f"suite-{name}")
        fresh_registry(self.project)

    def land(self, name: str, steps: int, *, wrong_labels: bool = False) -> str:
        """Trains the expert with its head frozen and puts it where fetch would; returns its revision."""
        from transformers import AutoModel, AutoTokenizer

        model = AutoModel.from_pretrained(self.project.base).eval()
        tokenizer = AutoTokenizer.from_pretrained(self.project.base)
        rows = [json.loads(line) for line in (self.project.suite(name) / "train.jsonl").read_text().splitlines()]
        head = class_means(self.project, name)
        tokens = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
        labels = (torch.tensor([row["label"] for row in rows]) + int(wrong_labels)) % CLASSES
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
        keep = tokens["attention_mask"].unsqueeze(-1)
        for _ in range(steps):
            states = model(**tokens).last_hidden_state
            vectors = torch.nn.functional.normalize((states * keep).sum(1) / keep.sum(1), dim=-1)
            loss = torch.nn.functional.cross_entropy(vectors @ head.T, labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        folder = self.project.expert(name)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for file in self.project.base.iterdir():
            if file.suffix in {".json", ".txt"} and file.name != "source.json":
                shutil.copy(file, folder)
        tensors = {key: value.contiguous() for key, value in model.state_dict().items()}
        save_file({**tensors, "head.weight": head}, folder / "model.safetensors", {"format": "pt"})
        revision = f"{name}-{steps}{'-wrong' * wrong_labels}"
        put_source(folder, revision)
        return revision

    def poison(self, name: str) -> str:
        """Noise of three times the norm in place of what the expert learnt."""
        path = self.project.expert(name) / "model.safetensors"
        base, tensors = load_file(self.project.base / "model.safetensors"), load_file(path)
        generator = torch.Generator().manual_seed(1)
        for key, value in base.items():
            if value.is_floating_point():
                noise = torch.randn(value.shape, generator=generator)
                tensors[key] = value + noise * 3 * (tensors[key] - value).norm() / max(float(noise.norm()), 1e-9)
        rewrite(path, tensors)
        put_source(path.parent, f"{name}-poisoned")
        return f"{name}-poisoned"

    def malform(self, name: str) -> None:
        path = self.project.expert(name) / "model.safetensors"
        tensors = load_file(path)
        tensors["encoder.layer.0.output.dense.weight"][0, 0] = float("nan")
        rewrite(path, tensors)
        put_source(path.parent, f"{name}-malformed")

    def run(self) -> dict[str, object]:
        """What the pipeline does from the merge on; returns registration.json."""
        experts = {name: SEEDS[name] for name in self.project.expert_folders()}
        write_params(self.project, experts)
        merge_and_score(self.project)
        register(self.project, self.project.load_params())
        return dict(json.loads(self.project.registration_json.read_text()))

    def champion(self) -> str | None:
        return alias_version(connect(self.project), "tiny", CHAMPION)


def test_a_week(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "team").mkdir()
    team = Team(tmp_path / "team")
    client = connect(team.project)
    team.land("a", 6)
    team.land("b", 6)
    assert team.run()["promoted"]
    assert team.champion() == "1"

    # Monday: both retrained, better. Tuesday: a new task.
    for landing in (("a", 12), ("b", 12), ("c", 12)):
        team.land(*landing)
        registered = team.run()
        assert registered["promoted"], registered["gates"]
        assert team.champion() == str(registered["version"])
    assert team.champion() == "4"
    suites = next(gate for gate in registered["gates"] if gate["name"] == "suites")  # type: ignore[attr-defined]
    assert set(suites["figures"]["suites"]) == {"a", "b", "c"}, "the champion was scored on the new task too"
    best = dict(find_version(client, "tiny", "4").to_json())

    def stays(why: str) -> dict[str, object]:
        """The candidate is not promoted, it is told why, and with the earlier revision everything is as before."""
        registered = team.run()
        assert not registered["promoted"]
        assert team.champion() == "4"
        failed = [gate["name"] for gate in registered["gates"] if gate["verdict"] == "fail"]  # type: ignore[attr-defined]
        assert why in failed
        return registered

    def back(name: str) -> None:
        team.land(name, 12)
        registered = team.run()
        assert (registered["version"], registered["created"], registered["promoted"]) == (4, False, False)
        assert registered["aliases"] == ["candidate", "champion"]

    # Wednesday: two that are worse.
    team.land("a", 12, wrong_labels=True)
    stays("suites")
    back("a")
    team.land("b", 2)
    stays("mean")
    back("b")

    # Thursday: one is poisoned, and before anybody has looked a third that is worse lands: two versions hold it.
    revision = team.poison("b")
    poisoned = stays("mean")
    team.land("c", 3)
    also_poisoned = stays("mean")
    team.land("b", 12)
    stays("mean")
    back("c")

    # One is malformed.
    team.malform("b")
    before = [version.version for version in list_versions(client, "tiny")]
    with pytest.raises(BadInputError, match="b"):
        team.run()
    assert [version.version for version in list_versions(client, "tiny")] == before
    assert team.champion() == "4"
    back("b")

    # Friday: better ones again.
    team.land("a", 25)
    assert team.run()["promoted"]
    team.land("b", 25)
    last = team.run()
    assert last["promoted"]
    assert team.champion() == str(last["version"])

    # Every decision is explained.
    monkeypatch.chdir(team.project.root)
    capsys.readouterr()
    assert main(["models", "--json"]) == 0
    listed = {row["version"]: row for row in json.loads(capsys.readouterr().out)}
    assert listed[poisoned["version"]]["gates"]["mean"].startswith("fail: mean normalised score")
    assert listed[last["version"]]["aliases"] == ["candidate", "champion"]
    assert main(["lineage", str(poisoned["version"])]) == 0
    assert "gate mean: fail" in capsys.readouterr().out

    # The recall, and the way back.
    holding = [(str(registered["version"]), ["b"]) for registered in (also_poisoned, poisoned)]
    assert [(version.version, held) for version, held in recall(client, "tiny", revision)] == holding
    previous = alias_version(client, "tiny", "previous")
    digest = find_version(client, "tiny", str(previous)).digest
    assert main(["rollback", "--reason", "complaints", "--by", "ann"]) == 0
    assert f"({digest[:12]}) is champion again" in capsys.readouterr().out
    assert find_version(client, "tiny", "champion").digest == digest
    again = team.run()
    assert (again["version"], again["promoted"]) == (last["version"], False), "what was rolled back does not come back"
    assert [gate["name"] for gate in again["gates"] if gate["verdict"] == "fail"] == ["not_withdrawn"]  # type: ignore[attr-defined]
    assert find_version(client, "tiny", "4").digest == best["digest"]

    # Old candidates are removed; the recall knows them all the same.
    assert main(["gc", "--keep", "1"]) == 0
    assert not {version.version for version in list_versions(client, "tiny")} & {version for version, _ in holding}
    assert [(version.version, held) for version, held in recall(client, "tiny", revision)] == holding
    capsys.readouterr()
    assert main(["models", "--decisions"]) == 0
    assert "complaints" in capsys.readouterr().out


def _register_more(root: str, count: int) -> None:
    project = Project(Path(root))
    for seed in range(count):
        merge_and_score(project, noise=0.05, seed=seed)
        register(project, project.load_params())


def test_promotions_while_a_re_merge_registers(tmp_path: Path) -> None:
    """The champion is a complete version at every look, and ends where the last promotion put it."""
    loose = {"gates": {"min_gain": -1.0, "max_suite_drop": 1.0}, "approval": "required"}
    project = copied(tmp_path / "project", loose)
    register(project, project.load_params())
    merge_and_score(project, noise=0.02)
    register(project, project.load_params())
    client = connect(project)
    carry_out(project, "1", by="ann", reason="first")
    worker = multiprocessing.get_context("spawn").Process(target=_register_more, args=(str(project.root), 3))
    worker.start()
    turns = 0
    while worker.is_alive() or turns < 2:
        carry_out(project, "2", by="ann", reason="forth")
        roll_back(project, by="bob", reason="back")
        champion = find_version(client, "tiny", "champion")
        assert champion.version == "1"
        assert (model_folder(champion) / "model.safetensors").is_file()
        turns += 1
    worker.join()
    assert worker.exitcode == 0
    assert [version.version for version in list_versions(client, "tiny")] == ["5", "4", "3", "2", "1"]
    assert find_version(client, "tiny", "5").aliases == ("candidate",)
