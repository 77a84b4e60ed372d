"""Refinement: the merge comes nearer to what its experts predict, never farther, and a killed one is whole again."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from poemerge.checkpoints import ExpertSet
from poemerge.merging import MergeResult, matrices, merge, panel, refinement, staging
from poemerge.merging.predictor import Answer, Predictor
from poemerge.merging.staging import Staging
from poemerge.params import MergeParams
from tests.tiny import make_base, make_full_expert, make_lora_expert

NAMES = ("one", "two", "lora")
STEPS = 20


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    base = make_base(root / "base")
    return {
        "base": base,
        "one": make_full_expert(base, root / "one", seed=1, size=0.08),
        "two": make_full_expert(base, root / "two", seed=2, size=0.08),
        "lora": make_lora_expert(base, root / "lora", seed=3, size=0.3),
    }


def _merge(models: dict[str, Path], out: Path, names: tuple[str, ...] = NAMES, **settings: Any) -> MergeResult:
    params = MergeParams(**{"refinement_steps": STEPS, **settings})
    return merge(models["base"], {name: models[name] for name in names}, out, params)


def _answers(models: dict[str, Path], merged: Path, name: str) -> tuple[Answer, Answer]:
    """What an expert says of inputs that the refinement does not draw, and what the merge says under its head."""
    predictor = Predictor(ExpertSet.open(models["base"], {name: models[name]}), name, features=True)
    inputs = predictor.inputs.draw(200, 16, torch.Generator().manual_seed(12345))
    with torch.no_grad():
        own = predictor.answer(inputs)
        weights = load_file(merged / "model.safetensors")
        predictor.adopt({each: torch.nn.Parameter(value) for each, value in weights.items()})
        return own, predictor.answer(inputs)


def _divergence(models: dict[str, Path], merged: Path, name: str) -> float:
    """KL(expert ‖ merged)."""
    own, now = _answers(models, merged, name)
    assert own.logits is not None
    assert now.logits is not None
    said = torch.log_softmax(own.logits, -1)
    return float((said.exp() * (said - torch.log_softmax(now.logits, -1))).sum(-1).mean())


def _distance(models: dict[str, Path], merged: Path, name: str) -> float:
    """Mean ½‖V(h_i − h_Θ)‖² of the features that the expert moved."""
    own, now = _answers(models, merged, name)
    assert own.features is not None
    assert now.features is not None
    return 0.5 * float((own.features - now.features).square().sum(-1).mean())


def test_the_merge_comes_nearer_to_what_the_experts_predict(models: dict[str, Path], tmp_path: Path) -> None:
    solved = _merge(models, tmp_path / "solved", refinement_steps=0)
    refined = _merge(models, tmp_path / "refined")
    assert solved.record["refinement"] == {"steps": 0, "why": "off"}
    note = refined.record["refinement"]
    assert note["steps"] == STEPS
    assert note["kept"] is True
    before = {name: _divergence(models, tmp_path / "solved", name) for name in NAMES}
    after = {name: _divergence(models, tmp_path / "refined", name) for name in NAMES}
    assert sum(after.values()) < 0.9 * sum(before.values())
    for name in NAMES:
        assert note["divergence"][name] == pytest.approx([before[name], after[name]], rel=0.3)


def test_without_heads_the_merge_comes_nearer_to_the_features_that_were_moved(
    models: dict[str, Path], tmp_path: Path
) -> None:
    headless = {"base": models["base"]}
    for name in ("one", "two"):
        tensors = load_file(models[name] / "model.safetensors")
        del tensors["head.weight"]
        headless[name] = tmp_path / name
        headless[name].mkdir()
        save_file(tensors, headless[name] / "model.safetensors")

    _merge(headless, tmp_path / "solved", ("one", "two"), refinement_steps=0)
    note = _merge(headless, tmp_path / "refined", ("one", "two")).record["refinement"]
    assert (note["steps"], note["kept"]) == (STEPS, True)
    for name in ("one", "two"):
        assert _distance(headless, models["base"], name) == pytest.approx(1, rel=0.4)  # on shorter texts
        before, after = (_distance(headless, tmp_path / out, name) for out in ("solved", "refined"))
        assert note["divergence"][name] == pytest.approx([before, after], rel=0.3)
        assert after < 0.9 * before


def test_the_features_that_were_moved_count_beside_what_the_heads_say(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _merge(models, tmp_path / "both")
    monkeypatch.setattr("poemerge.merging.predictor.moved_directions", Mock(side_effect=ValueError))
    _merge(models, tmp_path / "heads alone")
    monkeypatch.undo()
    both, alone = (sum(_distance(models, tmp_path / out, name) for name in NAMES) for out in ("both", "heads alone"))
    assert both < 0.95 * alone


def test_what_moves_and_what_stays(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refinement, "_SHORTEST", 1.0)  # by steps alone
    _merge(models, tmp_path / "solved", refinement_steps=0)
    _merge(models, tmp_path / "refined")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("solved", "refined"))
    moved = {name for name in one if not torch.equal(one[name], other[name])}
    assert "encoder.layer.0.attention.self.query.weight" in moved
    assert "encoder.layer.1.output.LayerNorm.bias" in moved
    assert not any("_embeddings" in name for name in moved)
    assert not any("pooler" in name for name in moved)  # the heads do not read it
    lines = [json.loads(line) for line in (tmp_path / "refined" / "ledger.jsonl").read_text().splitlines()]
    told = {line["name"]: line["refined"] for line in lines if line["refined"]}
    assert set(told) == moved
    base = load_file(models["base"] / "model.safetensors")
    for name, distance in told.items():
        way = float((other[name] - one[name]).norm() / (one[name] - base[name]).norm())
        assert distance == pytest.approx(way, rel=1e-3)
        assert distance < STEPS * 0.01
    # An attention's key biases change no prediction: what rounding says of them is not followed.
    keys = [name for name in one if name.endswith("key.bias")]
    assert all(told.get(name, 0.0) < 0.01 * told["encoder.layer.0.attention.self.query.bias"] for name in keys)


def test_neither_processors_nor_order_have_a_say(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = _merge(models, tmp_path / "two").record["digest"]
    monkeypatch.setattr(refinement, "processors", lambda: 1)
    assert _merge(models, tmp_path / "one", names=NAMES[::-1]).record["digest"] == digest


def test_what_wins_nothing_is_taken_back(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    solved = _merge(models, tmp_path / "solved", refinement_steps=0)
    plain, calls = panel.Panel.judge, []

    def harsh(one: Any) -> dict[str, float]:
        calls.append(one)
        return {name: value * len(calls) ** 4 for name, value in plain(one).items()}

    monkeypatch.setattr(panel.Panel, "judge", harsh)
    again = _merge(models, tmp_path / "again")
    assert again.record["refinement"]["kept"] is False
    assert again.record["digest"] == solved.record["digest"]


@pytest.mark.parametrize("fails", ["adopt", "answer"])
def test_a_network_that_fails_costs_the_refinement_alone(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    solved = _merge(models, tmp_path / "solved", refinement_steps=0)
    plain, calls = getattr(Predictor, fails), []
    before = len(NAMES) * (2 * panel.CHECKS + STEPS)  # the experts' own answers, and the solved merge's

    def failing(*given: Any) -> Any:
        calls.append(given)
        if fails == "adopt" or len(calls) > before:
            raise RuntimeError("no kernel for this\nand a long story")
        return plain(*given)

    monkeypatch.setattr(Predictor, fails, failing)
    again = _merge(models, tmp_path / "again")
    assert calls
    assert again.record["refinement"] == {"steps": 0, "why": "RuntimeError: no kernel for this", "failed": True}
    assert again.record["digest"] == solved.record["digest"]
    from tasks.merge import _report

    assert _report(again, 1.0).warnings == ["not refined: RuntimeError: no kernel for this"]
    assert not _report(solved, 1.0).warnings


class _KilledError(Exception):
    pass


@pytest.mark.parametrize("shards", ["5GB", "40KB"])
def test_killed_on_the_way_down_only_the_way_down_is_gone_again(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: str
) -> None:
    whole = _merge(models, tmp_path / "whole", max_shard_size=shards).record

    def killed(_: int, __: int, what: str) -> None:
        if what.startswith(f"refined by step {STEPS // 2} "):
            raise _KilledError

    params = MergeParams(refinement_steps=STEPS, max_shard_size=shards)
    experts = {name: models[name] for name in NAMES}
    with pytest.raises(_KilledError):
        merge(models["base"], experts, tmp_path / "m", params, progress=killed)
    assert not (tmp_path / "m").exists()
    again = merge(models["base"], experts, tmp_path / "m", params)
    assert again.resumed_shards == (1 if shards == "5GB" else len(list((tmp_path / "m").glob("*.safetensors"))))
    assert again.record["digest"] == whole["digest"]


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_killed_while_refined_shards_take_their_places(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    whole = _merge(models, tmp_path / "whole", max_shard_size="40KB").record
    plain, written = Staging.write_text, []

    def failing(path: Path, text: str) -> None:
        if path.parent.name.endswith(".records.partial") and (tmp_path / "armed").exists():
            written.append(path)
            if len(written) > after:
                raise _KilledError
        plain(path, text)

    def told(_: int, __: int, what: str) -> None:
        if what == f"refined by step {STEPS} of {STEPS}":
            (tmp_path / "armed").touch()

    monkeypatch.setattr(Staging, "write_text", staticmethod(failing))
    params = MergeParams(refinement_steps=STEPS, max_shard_size="40KB")
    experts = {name: models[name] for name in NAMES}
    with pytest.raises(_KilledError):
        merge(models["base"], experts, tmp_path / "m", params, progress=told)
    (tmp_path / "armed").unlink()
    again = merge(models["base"], experts, tmp_path / "m", params)
    assert again.record["digest"] == whole["digest"]
    assert again.record["refinement"] == whole["refinement"]
    assert again.resumed_shards == len(list((tmp_path / "m").glob("*.safetensors")))
    ledger, expected = ((tmp_path / name / "ledger.jsonl").read_text().splitlines() for name in ("m", "whole"))
    assert [json.loads(line)["refined"] for line in ledger] == [json.loads(line)["refined"] for line in expected]


@pytest.mark.parametrize("name", ["m", "merged[1] *"])
def test_the_same_command_again_gives_the_same(models: dict[str, Path], tmp_path: Path, name: str) -> None:
    first = _merge(models, tmp_path / name, max_shard_size="40KB").record
    assert _merge(models, tmp_path / name, max_shard_size="40KB").record == first
    assert [path.name for path in tmp_path.glob(".*") if path.is_dir()] == []


def test_killed_when_the_output_has_its_name(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _merge(models, tmp_path / "whole").record
    with monkeypatch.context() as patched:
        patched.setattr(staging.shutil, "rmtree", Mock(side_effect=_KilledError))
        with pytest.raises(_KilledError):
            _merge(models, tmp_path / "m")
    assert (tmp_path / "m" / "merge.json").is_file()
    again = _merge(models, tmp_path / "m").record
    assert (again["digest"], again["refinement"]) == (whole["digest"], whole["refinement"])


def test_a_refined_shard_that_was_lost_is_refined_again(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _merge(models, tmp_path / "whole", max_shard_size="40KB").record
    with monkeypatch.context() as patched:
        patched.setattr(Staging, "publish", Mock(side_effect=_KilledError))
        with pytest.raises(_KilledError):
            _merge(models, tmp_path / "m", max_shard_size="40KB")
    next(tmp_path.glob(".m.*.partial/*.safetensors")).write_bytes(b"damaged")
    again = _merge(models, tmp_path / "m", max_shard_size="40KB").record
    assert (again["digest"], again["refinement"]) == (whole["digest"], whole["refinement"])


def test_why_a_merge_is_not_refined(models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "still").mkdir()
    shutil.copy(models["base"] / "model.safetensors", tmp_path / "still")
    known = {**models, "still": tmp_path / "still"}
    for names, settings, why in (
        (("one",), {}, "one expert alone"),
        (("one", "still"), {}, "still cannot be asked: ValueError: it has no head of its own, and moves no features"),
        (("one", "two"), {"side": "output"}, "no matrix is solved with"),
        (("one", "two"), {"method": "mean"}, "no matrix is solved with"),
        (("one", "two"), {"max_memory": "800KB"}, "it would take"),
    ):
        note = _merge(known, tmp_path / "m", names, **settings).record["refinement"]
        assert note["steps"] == 0
        assert why in note["why"]


def _vision_models(folder: Path, size: float, *, agreed: bool = False) -> dict[str, Path]:
    """A vision transformer and three experts with heads, `size` of its weights' own size away from it, each in a
    direction of its own or all at the same place."""
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ViTModel(ViTConfig(image_size=16, patch_size=8, initializer_range=0.2, **sizes)).save_pretrained(folder / "base")
    tensors = load_file(folder / "base" / "model.safetensors")
    for name in ("cats", "dogs", "birds"):
        (folder / name).mkdir()
        if agreed:
            torch.manual_seed(1)
        moved = {
            own: value + size * value.std().nan_to_num(0) * torch.randn_like(value) for own, value in tensors.items()
        }
        save_file({**moved, "head.weight": torch.randn(3, 16)}, folder / name / "model.safetensors")
    return {name: folder / name for name in ("base", "cats", "dogs", "birds")}


def _added(models: dict[str, Path], merged: Path) -> dict[str, Tensor]:
    base, weights = (load_file(path / "model.safetensors") for path in (models["base"], merged))
    return {name: value - base[name] for name, value in weights.items()}


def test_a_merge_that_is_too_long_is_halved_until_the_experts_recognise_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts at the same place, and a solver that overshoots it fourfold."""
    models = _vision_models(tmp_path, 0.5, agreed=True)
    experts = {name: path for name, path in models.items() if name != "base"}
    monkeypatch.setattr(matrices, "with_length", lambda settings, *_: replace(settings, coefficient=4.0))
    merge(models["base"], experts, tmp_path / "solved", MergeParams(refinement_steps=0))
    note = merge(models["base"], experts, tmp_path / "m", MergeParams()).record["refinement"]
    assert (note["steps"], note["kept"], note["multiple"]) == (0, True, 0.25)
    assert "images" in note["why"]
    for was, now in note["divergence"].values():
        assert now < 0.5 * was
    rules = ExpertSet.open(models["base"], experts).rules
    whole, part = (_added(models, tmp_path / name) for name in ("solved", "m"))
    for name, value in whole.items():
        share = 1.0 if rules[name] == "embedding" else 0.25
        torch.testing.assert_close(part[name], share * value, rtol=1e-3, atol=1e-5, msg=name)


def test_experts_that_agree_stay_whole_to_the_bit_and_so_does_a_given_length(tmp_path: Path) -> None:
    for agreed, settings in ((True, {}), (False, {"coefficient": 1.0})):
        models = _vision_models(tmp_path / str(agreed), 0.5, agreed=agreed)
        experts = {name: path for name, path in models.items() if name != "base"}
        solved = merge(models["base"], experts, tmp_path / "solved", MergeParams(refinement_steps=0, **settings))
        merged = merge(models["base"], experts, tmp_path / "m", MergeParams(**settings))
        assert merged.record["refinement"]["multiple"] == 1
        assert merged.record["digest"] == solved.record["digest"]


def test_stage_and_report_tell_of_it(models: dict[str, Path], tmp_path: Path) -> None:
    from poemerge.report.provenance import _selected
    from tasks.merge import _report

    result = _merge(models, tmp_path / "m")
    assert _report(result, 1.0).headline.endswith(", refined")
    sentence = _selected(result.record).rpartition("Refined by ")[2]
    assert sentence.startswith(
        f"{STEPS} steps: the mean divergence from the experts' predictions on random texts fell from"
    )
    plain = _merge(models, tmp_path / "plain", refinement_steps=0)
    assert "refined" not in _report(plain, 1.0).headline
    assert "Refined" not in _selected(plain.record)


def test_the_command_tells_of_it(models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from poemerge.cli.main import main

    command = ["merge", "--base", str(models["base"]), "--out", str(tmp_path / "m"), "--refinement-steps", "6"]
    command += [part for name in NAMES for part in ("--expert", f"{name}={models[name]}")]
    assert main([*command, "--dry-run"]) == 0
    assert "refines the merge by 6 steps" in capsys.readouterr().out
    assert main([*command, "--dry-run", "--json", "--max-memory", "800KB"]) == 0
    assert "it would take" in json.loads(capsys.readouterr().out)["refinement"]["why"]
    assert main(command) == 0
    assert "predictions in 6 steps: 0." in capsys.readouterr().out


def _under_classifiers(models: dict[str, Path], folder: Path, names: tuple[str, ...]) -> dict[str, Path]:
    """The experts with a classifier of transformers' own in place of the head."""
    experts = {}
    for name in names:
        shutil.copytree(models[name], folder / name)
        experts[name] = folder / name
        tensors = load_file(folder / name / "model.safetensors")
        head = tensors.pop("head.weight")
        classifier = {"classifier.weight": head, "classifier.bias": torch.zeros(len(head))}
        save_file(tensors | classifier, folder / name / "model.safetensors", {"format": "pt"})
    return experts


def test_what_a_classifier_says_that_was_trained_with_its_expert_has_no_part(
    models: dict[str, Path], tmp_path: Path
) -> None:
    experts = _under_classifiers(models, tmp_path, ("one", "two"))
    merged = merge(models["base"], experts, tmp_path / "merged", MergeParams(refinement_steps=STEPS)).record
    assert {one["sensitivity"] for one in merged["experts"].values()} == {"measured"}
    assert (merged["refinement"]["steps"], merged["refinement"]["kept"]) == (STEPS, True)
    for folder in experts.values():
        tensors = load_file(folder / "model.safetensors")
        tensors["classifier.weight"].neg_()
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    other = merge(models["base"], experts, tmp_path / "other", MergeParams(refinement_steps=STEPS)).record
    assert other["refinement"] == merged["refinement"]
    one, two = (load_file(tmp_path / out / "model.safetensors") for out in ("merged", "other"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_images_under_classifiers_of_their_own_stay_as_they_are_solved(tmp_path: Path) -> None:
    """Their classifiers were trained with them: measured, held to the experts' reach, and not refined."""
    models = _vision_models(tmp_path / "models", 0.3)
    experts = _under_classifiers(models, tmp_path, ("cats", "dogs"))
    params = MergeParams(refinement_steps=STEPS)
    merged = merge(models["base"], experts, tmp_path / "merged", params)
    assert {one["sensitivity"] for one in merged.record["experts"].values()} == {"measured"}
    assert merged.record["refinement"]["steps"] == 0
    assert "cats has a classifier that was trained with it" in merged.record["refinement"]["why"]
    base, weights = (load_file(path / "model.safetensors") for path in (models["base"], tmp_path / "merged"))
    opened = ExpertSet.open(models["base"], experts)
    ledger = [json.loads(line) for line in (tmp_path / "merged" / "ledger.jsonl").read_text().splitlines()]
    solved = [line for line in ledger if line["method"] == "poe"]
    assert any(line["held"] for line in solved)
    for line in solved:
        name = line["name"]
        reach = max(float(torch.linalg.matrix_norm(opened.delta(one, name), 2)) for one in experts)
        assert float(torch.linalg.matrix_norm(weights[name] - base[name], 2)) <= reach * (1 + 1e-4), name
