"""Stages tail and expert on tiny real models: what they write, what drives the merge, what they leave out."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from scipy import stats
from tiny import make_base, make_full_expert, make_lora_expert

from poemerge.checkpoints.roles import ROLES, block, role
from poemerge.errors import StageError
from poemerge.merging import Selection
from poemerge.params import Params
from poemerge.project import Project
from tasks.expert import expert
from tasks.tail import tail

ENTRIES = 1_000
MATRIX = "encoder.layer.0.attention.self.query.weight"


def params(**sections: Any) -> Params:
    sections.setdefault("tail", {})
    sections["tail"] = {"entries_per_matrix": ENTRIES, **sections["tail"]}
    return Params.model_validate({"base": {"source": "base"}, "experts": {"a": {"source": "a"}}, **sections})


def make_project(root: Path, experts: dict[str, Any]) -> Project:
    project = Project(root)
    make_base(project.base)
    for name, make in experts.items():
        make(project.base, project.expert(name))
        (project.expert(name) / "source.json").write_text("{}", encoding="utf-8")
    return project


def heavy_expert(tail_index: float, seed: int) -> Any:
    """A full expert whose delta in every matrix is drawn from a Student-t with that tail index."""

    def make(base: Path, path: Path) -> None:
        make_full_expert(base, path, seed=seed, size=0.0)
        tensors = load_file(path / "model.safetensors")
        for name, value in tensors.items():
            if value.ndim == 2 and "encoder" in name:
                draw = stats.t.rvs(tail_index, size=value.shape, random_state=seed)
                tensors[name] = value + 1e-4 * torch.from_numpy(draw).to(value.dtype)
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})

    return make


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = make_project(
        tmp_path_factory.mktemp("tail"),
        {
            "apples": lambda base, path: make_full_expert(base, path, seed=1),
            "pears": lambda base, path: make_full_expert(base, path, seed=2),
            "plums": lambda base, path: make_lora_expert(base, path, seed=3),
        },
    )
    project.tail.mkdir(parents=True)
    return project


@pytest.fixture(scope="module")
def fitted(project: Project) -> dict[str, Any]:
    report = tail(project, params())
    assert report.figure == "artifacts/tail/residuals.png"
    assert {"whole model", "attention query", "feed-forward in"} <= {row["group"] for row in report.table}
    json.dumps(report.table)
    document: dict[str, Any] = json.loads(project.tail_json.read_text(encoding="utf-8"))
    return document


def test_tail_json_has_every_family_at_every_reference(fitted: dict[str, Any]) -> None:
    families = {"gaussian", "laplace", "student_t", "cauchy", "weibull"}
    for fits in (fitted["model"], *fitted["groups"].values()):
        if fits["pooled"] is None:
            continue
        assert set(fits["references"]) == {"mean", "task_arithmetic", "ties"}
        for fit in (fits["pooled"], *fits["references"].values()):
            assert set(fit["fits"]) == families
            assert fit["best"]["family"] in families
            assert fit["usable"]["family"] in {"gaussian", "student_t", "cauchy"}
            for one in fit["fits"].values():
                assert all(math.isfinite(one[key]) for key in ("log_likelihood", "held_out", "bic", "ks"))
            curve = fit["hill"]
            assert curve["low"][curve["chosen"]] < curve["tail_index"][curve["chosen"]] < curve["high"][curve["chosen"]]
            assert len(fit["histogram"]["magnitude"]) == len(fit["histogram"]["density"]) > 10


def test_each_matrix_has_its_own_fit_and_what_is_not_solved_is_listed(fitted: dict[str, Any]) -> None:
    matrix = fitted["matrices"][MATRIX]
    assert matrix["group"] == "attention query"
    assert matrix["shape"] == [32, 32]
    assert set(matrix["experts"]) == {"apples", "pears", "plums"}
    one = matrix["experts"]["apples"]["mean"]
    assert one["scale"] == pytest.approx(one["entry_scale"] * 32, rel=1e-4)
    assert one["zeros"] == 0
    assert set(fitted["matrices"]["encoder.layer.0.intermediate.dense.weight"]["experts"]) == {"apples", "pears"}
    assert fitted["left_out"]["embeddings.word_embeddings.weight"] == "embedding"
    assert fitted["left_out"]["encoder.layer.0.attention.self.query.bias"] == "vector"
    assert not set(fitted["left_out"]) & set(fitted["matrices"])


def test_the_same_params_write_the_same_bytes(project: Project, fitted: dict[str, Any]) -> None:
    first = project.tail_json.read_bytes(), project.residuals_png.read_bytes()
    tail(project, params())
    assert (project.tail_json.read_bytes(), project.residuals_png.read_bytes()) == first
    assert first[1].startswith(b"\x89PNG")
    assert not list(project.tail.glob("*.partial"))


def test_auto_drives_the_merge(project: Project, fitted: dict[str, Any]) -> None:
    report = expert(project, params(expert={"family": "auto", "per": "group"}))
    document = json.loads(project.expert_json.read_text(encoding="utf-8"))
    selection = Selection.read(project.expert_json)
    for group, fits in fitted["groups"].items():
        if fits["pooled"] is None:
            continue
        usable = fits["pooled"]["usable"]
        choice = selection.of(fits["matrices"][0])
        assert choice.family == usable["family"]
        assert choice.tail_index == usable["parameters"].get("tail_index")
        assert document["groups"][group]["matrices"] == fits["matrices"]
    assert selection.model.family == fitted["model"]["pooled"]["usable"]["family"]
    assert all(one["reason"] for one in document["groups"].values())
    assert len(report.table) == len(document["groups"]) + 1


def test_per_model_gives_every_group_the_models_family(project: Project, fitted: dict[str, Any]) -> None:
    expert(project, params())
    selection = Selection.read(project.expert_json)
    assert {selection.of(name) for name in fitted["matrices"]} == {selection.model}
    document = json.loads(project.expert_json.read_text(encoding="utf-8"))
    assert (
        document["groups"]["attention key"]["fitted"]["best"]
        == fitted["groups"]["attention key"]["pooled"]["best"]["family"]
    )


def test_a_fixed_family_is_kept_and_the_fit_is_told(project: Project, fitted: dict[str, Any]) -> None:
    report = expert(project, params(expert={"family": "student_t", "tail_index": 2.5}))
    selection = Selection.read(project.expert_json)
    assert (selection.model.family, selection.model.tail_index) == ("student_t", 2.5)
    assert "fixed in params.yaml; the tail fit says" in report.headline


def test_a_tail_on_another_side_is_told(project: Project, fitted: dict[str, Any]) -> None:
    assert expert(project, params(merge={"side": "both"})).warnings == []
    assert "set tail.side" in expert(project, params(merge={"side": "output"})).warnings[0]


def test_heavy_deltas_give_heavy_residuals(tmp_path: Path) -> None:
    indices: dict[str, float] = {}
    for name, tail_index in (("light", 50.0), ("heavy", 1.2)):
        project = make_project(tmp_path / name, {f"e{seed}": heavy_expert(tail_index, seed) for seed in range(3)})
        tail(project, params(tail={"side": "output", "references": ["mean"]}))
        pooled = json.loads(project.tail_json.read_text(encoding="utf-8"))["model"]["pooled"]
        indices[name] = pooled["fits"]["student_t"]["parameters"]["tail_index"]
    assert indices["heavy"] < 1.5 < 3 < indices["light"]


def test_experts_that_equal_the_base_leave_a_gaussian(tmp_path: Path) -> None:
    project = make_project(tmp_path, {"same": lambda base, path: make_full_expert(base, path, seed=1, size=0.0)})
    report = tail(project, params())
    assert "equal the base" in report.headline
    assert project.residuals_png.is_file()
    expert(project, params(expert={"per": "group"}))
    assert Selection.read(project.expert_json).of(MATRIX).family == "gaussian"


def test_a_single_expert_has_no_residual_at_its_own_mean(tmp_path: Path) -> None:
    project = make_project(tmp_path, {"one": lambda base, path: make_full_expert(base, path, seed=1)})
    tail(project, params())
    document = json.loads(project.tail_json.read_text(encoding="utf-8"))
    assert document["model"]["references"]["mean"] is None
    assert document["model"]["references"]["task_arithmetic"] is not None
    assert document["matrices"][MATRIX]["experts"]["one"]["mean"] == {"zeros": 1}


def test_a_broken_tail_json_names_the_stage_to_run(tmp_path: Path) -> None:
    project = Project(tmp_path)
    with pytest.raises(StageError, match="dvc repro tail"):
        expert(project, params())
    project.tail.mkdir(parents=True)
    project.tail_json.write_text(yaml.safe_dump({"groups": 3}), encoding="utf-8")
    with pytest.raises(StageError, match="dvc repro tail"):
        expert(project, params())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("encoder.layer.11.attention.self.key.weight", "attention key"),
        ("bert.encoder.layer.0.attention.output.dense.weight", "attention output"),
        ("encoder.layer.0.intermediate.dense.weight", "feed-forward in"),
        ("encoder.layer.0.output.dense.weight", "feed-forward out"),
        ("model.layers.3.self_attn.q_proj.weight", "attention query"),
        ("model.layers.3.mlp.gate_proj.weight", "feed-forward in"),
        ("model.layers.3.mlp.down_proj.weight", "feed-forward out"),
        ("model.layers.3.block_sparse_moe.experts.1.w2.weight", "feed-forward out"),
        ("h.0.attn.c_attn.weight", "attention query, key, value"),
        ("h.0.attn.c_proj.weight", "attention output"),
        ("h.0.mlp.c_proj.weight", "feed-forward out"),
        ("decoder.block.0.layer.1.EncDecAttention.v.weight", "attention value"),
        ("decoder.block.0.layer.2.DenseReluDense.wi_0.weight", "feed-forward in"),
        ("decoder.block.0.layer.2.DenseReluDense.wo.weight", "feed-forward out"),
        ("vision_model.encoder.layers.0.self_attn.out_proj.weight", "attention output"),
        ("visual.transformer.resblocks.0.attn.in_proj_weight", "attention query, key, value"),
        ("blocks.0.attn.proj.weight", "attention output"),
        ("blocks.0.mlp.fc1.weight", "feed-forward in"),
        ("transformer.layer.0.ffn.lin2.weight", "feed-forward out"),
        ("gpt_neox.layers.0.attention.dense.weight", "attention output"),
        ("layers.0.mlp.Wo.weight", "feed-forward out"),
        ("pooler.dense.weight", "other"),
        ("patch_embed.proj.weight", "other"),
        ("visual_projection.weight", "other"),
    ],
)
def test_roles_are_read_off_the_names_of_many_libraries(name: str, expected: str) -> None:
    assert role(name) == expected
    assert expected in ROLES


def test_blocks_are_numbered() -> None:
    assert block("decoder.block.7.layer.1.EncDecAttention.v.weight") == 7
    assert block("pooler.dense.weight") is None
