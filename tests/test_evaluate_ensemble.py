"""The posterior's ensemble: members are the merge with noise of the right width; probabilities are averaged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from poemerge.checkpoints import folder_digest
from poemerge.contenders import Field, open_suites
from poemerge.ensemble import TEMPERATURES, Ensemble, score_ensemble
from poemerge.errors import BadInputError
from poemerge.merging import merge
from poemerge.params import MergeParams, SuiteParams
from poemerge.project import Project
from poemerge.suites.protocol import Model
from poemerge.suites.runtime import Runtime
from poemerge.suites.store import ScoreStore
from tests.tiny import make_base, make_full_expert, make_suite

FLOAT32 = Runtime(torch.device("cpu"), torch.float32, batch_size=16)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = Project(tmp_path_factory.mktemp("project"))
    make_base(project.base)
    for seed, name in enumerate(("one", "two")):
        make_full_expert(project.base, project.expert(name), seed=seed, size=0.1)
    make_suite(project.suite("one"), seed=1, examples=20)
    for folder in (project.base, project.expert("one"), project.expert("two"), project.suite("one")):
        source = {"source": "s", "revision": None, "digest": folder_digest(folder)}
        (folder / "source.json").write_text(json.dumps(source))
    merge(
        project.base,
        project.expert_folders(),
        project.merged,
        MergeParams(side="output", device="cpu", coefficient=0.5),
    )
    return project


def test_members_are_the_mode_with_noise_of_the_posteriors_width(project: Project, tmp_path: Path) -> None:
    import poemerge
    from poemerge.checkpoints import ExpertSet

    ensemble = Ensemble.draw(Field.of(project), project.merged, tmp_path / "noise", 200, seed=0)
    again = Ensemble.draw(Field.of(project), project.merged, tmp_path / "again", 200, seed=0)
    name = "encoder.layer.0.intermediate.dense.weight"
    number = json.loads((ensemble.folder / "names.json").read_text()).index(name)
    noise = np.load(ensemble.folder / f"{number}.npy")
    assert (noise == np.load(again.folder / f"{number}.npy")).all(), "seeded"

    mode = load_file(project.merged / "model.safetensors")
    folder = ensemble.member(3, 1e-2, tmp_path / "member")
    member = load_file(folder / "model.safetensors")
    assert torch.allclose(member[name], mode[name] + 0.1 * torch.from_numpy(noise[3]), atol=1e-7)
    untouched = "embeddings.word_embeddings.weight"
    assert torch.equal(member[untouched], mode[untouched])

    # Rows of Θ have covariance (2H)⁻¹, whatever the column: compare with the precision that the solution states.
    experts = ExpertSet.open(project.base, project.expert_folders())
    solution = poemerge.solve(experts.deltas(name), expert="cauchy", scale="gram-norm", scale_factor=0.1,
                              prior="relative", prior_precision=1e-2, side="output")  # fmt: skip
    experts.close()
    expected = torch.linalg.inv(solution.posterior.precision).diagonal()
    found = torch.from_numpy(noise / 0.5).double().square().mean((0, 2))
    assert torch.allclose(found, expected, rtol=0.08)


def test_probabilities_are_averaged_and_a_cold_ensemble_is_the_mode(project: Project, tmp_path: Path) -> None:
    field, store = Field.of(project), ScoreStore(tmp_path / "scores")
    suites = open_suites(project, {"one": SuiteParams()})
    found, temperature = score_ensemble(field, suites, [], store, FLOAT32, count=3, seed=1, temperature=0.3)
    assert temperature == 0.3
    ensemble = Ensemble.draw(field, project.merged, tmp_path / "noise", 3, seed=1)
    total = 0.0
    for index in range(3):
        folder = ensemble.member(index, 0.3, tmp_path / f"member{index}")
        head = project.merged / "heads" / "one.safetensors"
        total = total + suites[0].suite.logits(Model("m", folder, project.base, head), FLOAT32).double().softmax(-1) / 3
    target = torch.from_numpy(suites[0].suite.target)
    expected = -total[torch.arange(len(target)), target].log()
    assert found["one"][1]["nll"] == pytest.approx(expected, rel=1e-6)
    assert found["one"][1]["predicted"].tolist() == total.argmax(-1).tolist()

    with field.merged().open() as model_for:
        mode = suites[0].suite.predict(model_for(suites[0]), FLOAT32)
    cold, _ = score_ensemble(field, suites, [], store, FLOAT32, count=2, seed=1, temperature=1e-12)
    assert cold["one"][1]["nll"] == pytest.approx(mode["nll"], rel=1e-3)
    assert not np.allclose(found["one"][1]["nll"], mode["nll"], rtol=1e-2)
    assert not list(project.state.glob("ensemble-*")), "no member is left behind"


def test_temperature_is_chosen_on_validation(project: Project, tmp_path: Path) -> None:
    field, store = Field.of(project), ScoreStore(tmp_path / "scores")
    suites = open_suites(project, {"one": SuiteParams()})
    validation = open_suites(project, {"one": SuiteParams()}, "validation")
    _, chosen = score_ensemble(field, suites, validation, store, FLOAT32, count=2, seed=1)
    assert chosen in TEMPERATURES
    losses = {}
    for width in TEMPERATURES:
        found, _ = score_ensemble(field, validation, [], store, FLOAT32, count=2, seed=1, temperature=width)
        losses[width] = found["one"][1]["nll"].mean()
    assert chosen == min(losses, key=lambda width: losses[width])


def test_a_merge_without_a_posterior_is_refused(project: Project, tmp_path: Path) -> None:
    merge(project.base, project.expert_folders(), tmp_path / "mean", MergeParams(method="mean", device="cpu"))
    with pytest.raises(BadInputError, match="a product of experts"):
        Ensemble.draw(Field.of(project), tmp_path / "mean", tmp_path / "noise", 2, seed=0)
