"""Stage task_vectors: the manifest's norms, densities and cosines against plain arithmetic on the checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from poemerge.checkpoints import ExpertSet, statistics
from poemerge.errors import CheckpointError
from poemerge.params import Params
from poemerge.project import Project
from tasks.task_vectors import task_vectors
from tests.tiny import make_base, make_full_expert, make_lora_expert

QUERY = "encoder.layer.0.attention.self.query.weight"


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A project whose data are fetched: two full experts and two adapters."""
    project = Project(tmp_path)
    base = make_base(project.base)
    make_full_expert(base, project.expert("full"), seed=1)
    make_full_expert(base, project.expert("other"), seed=2)
    make_lora_expert(base, project.expert("lora"), seed=3)
    make_lora_expert(base, project.expert("lora2"), seed=4)
    for folder in project.experts.iterdir():
        (folder / "source.json").write_text("{}")
    return project


def _params(project: Project) -> Params:
    return Params.model_validate(
        {"base": {"source": "x"}, "experts": {name: {"source": "x"} for name in project.expert_folders()}}
    )


def _manifest(project: Project) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(project.task_vectors_manifest.read_text())
    return found


def test_manifest_is_plain_arithmetic(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "_BLOCK_ENTRIES", 700)  # several blocks in most parameters
    full = project.expert("full") / "model.safetensors"
    tensors = load_file(full)
    base = load_file(project.base / "model.safetensors")
    tensors[QUERY][::2] = base[QUERY][::2]
    save_file(tensors, full)
    report = task_vectors(project, _params(project))
    manifest = _manifest(project)
    experts = ExpertSet.open(project.base, project.expert_folders())
    names = list(experts.experts)
    vectors = {
        expert: torch.cat([experts.delta(expert, name).double().flatten() for name in experts.names()])
        for expert in names
    }
    for expert, vector in vectors.items():
        one = manifest["experts"][expert]
        assert one["norm"] == pytest.approx(float(vector.norm()), rel=1e-5)
        assert one["kind"] == ("adapter" if expert.startswith("lora") else "full")
        assert one["private"] == ["head.weight"]
    for i, first in enumerate(names):
        for j, second in enumerate(names):
            expected = torch.nn.functional.cosine_similarity(vectors[first], vectors[second], dim=0)
            assert manifest["cosine"]["whole"][i][j] == pytest.approx(float(expected), abs=1e-5)
    group = manifest["cosine"]["groups"]["encoder.layer.attention.self.query"]
    query = [f"encoder.layer.{layer}.attention.self.query.{kind}" for layer in (0, 1) for kind in ("weight", "bias")]
    parts = [torch.cat([experts.delta(expert, name).double().flatten() for name in query]) for expert in names]
    assert group[0][1] == pytest.approx(float(torch.nn.functional.cosine_similarity(*parts[:2], dim=0)), abs=1e-5)
    assert manifest["experts"]["full"]["parameters"][QUERY]["density"] == pytest.approx(0.5, abs=0.01)
    assert manifest["experts"]["full"]["parameters"][QUERY]["norm"] == pytest.approx(
        float(experts.delta("full", QUERY).norm()), rel=1e-5
    )
    assert len(report.table) == 4
    assert "4 task vectors" in report.headline


def test_scalars_and_empty_tensors_are_parameters_too(project: Project) -> None:
    """CLIP's logit_scale is one number."""
    for folder, scale in ((project.base, 1.0), (project.expert("full"), 4.0), (project.expert("other"), 1.0)):
        file = folder / "model.safetensors"
        odd = {"logit_scale": torch.tensor(scale), "none": torch.zeros(0), "no_columns": torch.zeros(5, 0)}
        save_file({**load_file(file), **odd}, file)
    task_vectors(project, _params(project))
    manifest = _manifest(project)
    full, other = (manifest["experts"][name]["parameters"]["logit_scale"] for name in ("full", "other"))
    assert (full["norm"], full["density"], other["norm"], other["density"]) == (3.0, 1.0, 0.0, 0.0)
    assert not {"none", "no_columns"} & set(manifest["parameters"])


def test_adapters_alone_stay_factored(project: Project) -> None:
    for name in ("full", "other"):
        shutil.rmtree(project.expert(name))
    task_vectors(project, _params(project))
    manifest = _manifest(project)
    assert {p["kind"] for p in manifest["experts"]["lora"]["parameters"].values()} == {"factored"}
    experts = ExpertSet.open(project.base, project.expert_folders())
    deltas = [experts.deltas(name).double().flatten(1) for name in experts.names() if experts.touching(name)]
    first, second = torch.cat(deltas, dim=1)
    expected = float(torch.nn.functional.cosine_similarity(first, second, dim=0))
    assert manifest["cosine"]["whole"][0][1] == pytest.approx(expected, abs=1e-6)


def test_warnings_name_twins_and_idle_experts(project: Project) -> None:
    for name, origin in (("twin", project.expert("full")), ("idle", project.base)):
        project.expert(name).mkdir()
        (project.expert(name) / "model.safetensors").write_bytes((origin / "model.safetensors").read_bytes())
        (project.expert(name) / "source.json").write_text("{}")
    report = task_vectors(project, _params(project))
    assert any("idle is identical to the base" in text for text in report.warnings)
    assert any("twin and full are nearly the same" in text for text in report.warnings)


def _drifting(project: Project, count: int, share: float) -> None:
    """Experts whose task vectors are random but for a direction in common, of `share` of their size."""
    base = load_file(project.base / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    drift = {name: torch.randn(value.shape, generator=generator) for name, value in base.items()}
    for i in range(count):
        moved = {
            name: value + 0.02 * (share * drift[name] + torch.randn(value.shape, generator=generator))
            for name, value in base.items()
        }
        _save(project, f"own{i}", moved)


def _save(project: Project, name: str, tensors: dict[str, torch.Tensor]) -> None:
    project.expert(name).mkdir(exist_ok=True)
    save_file(tensors, project.expert(name) / "model.safetensors")
    (project.expert(name) / "source.json").write_text("{}")


def _against(project: Project) -> list[str]:
    return [text for text in task_vectors(project, _params(project)).warnings if "points against" in text]


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_an_expert_that_points_against_the_others_is_told(project: Project, share: float) -> None:
    _drifting(project, 5, share)
    for name in ("full", "other", "lora", "lora2"):
        shutil.rmtree(project.expert(name))
    assert not _against(project)
    base = load_file(project.base / "model.safetensors")
    own = load_file(project.expert("own3") / "model.safetensors")
    _save(project, "own3", {name: 2 * value - own[name] for name, value in base.items()})
    (warning,) = _against(project)
    assert warning.startswith("own3 points against the others in ")
    for name in ("own1", "own2", "own4"):
        shutil.rmtree(project.expert(name))
    assert not _against(project)  # of two that part, nobody knows which


def test_experts_without_a_common_direction_are_not_told(project: Project) -> None:
    _drifting(project, 6, 0.0)
    assert not _against(project)


@pytest.mark.parametrize(("against", "told"), [(25, True), (24, False), (12, False)])
def test_more_than_chance_is_asked_of_the_parameters(against: int, told: bool) -> None:
    """36 parameters, as many as an adapter of six layers has: 25 of them have a chance of 1.4 %, 24 of 3.3 %."""

    def parameter(at: int) -> statistics.ParameterStatistics:
        sign = -2.0 if at < against else 1.0
        directions = torch.tensor([[1.0, 0.1], [1.0, 0.0], [sign, 0.0]], dtype=torch.float64)
        names = ["one", "two", "three"]
        return statistics.ParameterStatistics(
            str(at), "matrix", (2,), names, 1.0, directions @ directions.T, [1, 1, 1], True
        )

    parameters = [parameter(at) for at in range(36)]
    lengths = sum(one.gram.diagonal() for one in parameters).sqrt().tolist()
    found = statistics.opposed(parameters, dict(zip(parameters[0].experts, lengths, strict=True)))
    assert found == ({"three": (against, 36)} if told else {})


def test_every_tensor_that_is_not_finite_is_named(project: Project) -> None:
    for name, tensor in (("full", QUERY), ("other", "embeddings.LayerNorm.bias")):
        file = project.expert(name) / "model.safetensors"
        tensors = load_file(file)
        tensors[tensor].view(-1)[0] = torch.inf
        save_file(tensors, file)
    with pytest.raises(CheckpointError) as caught:
        task_vectors(project, _params(project))
    assert [(problem.expert, problem.tensor) for problem in caught.value.problems] == [
        ("other", "embeddings.LayerNorm.bias"),
        ("full", QUERY),
    ]
    assert not project.task_vectors_manifest.exists()
