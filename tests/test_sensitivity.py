"""Sensitivities: what the solver makes of them, what is measured, and how a merge finds and keeps them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import poemerge
from poemerge.checkpoints import ExpertSet
from poemerge.errors import BadInputError, CheckpointError
from poemerge.merging import merge, prepare
from poemerge.merging import sensitivity as module
from poemerge.merging.predictor import Predictor
from poemerge.merging.sensitivity import gather, measure, why_not
from poemerge.numerics.breadth import breadth, breadth_of_factors
from poemerge.params import MergeParams
from tests.tiny import make_base, make_full_expert, make_lora_expert

BOTH: dict[str, Any] = {"side": "both", "scale": "common", "scale_factor": 0.1, "prior_precision": 1e-2, "rtol": 1e-8}
QUERY = "encoder.layer.0.attention.self.query.weight"
OUTPUT = "encoder.layer.1.output.dense.weight"


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("pooling", [0.0, 0.5, 1.0, None])
@pytest.mark.parametrize(("rows", "columns", "minded"), [(12, 14, 5), (30, 9, 5), (30, 9, 25), (9, 30, 5)])
def test_theta_is_stationary_under_the_mean_of_both_output_grams(
    rows: int, columns: int, minded: int, pooling: float | None
) -> None:
    deltas, factor = _random(4, rows, columns), _random(4, rows, minded, seed=1)
    solution = poemerge.solve(deltas, sensitivity=factor, pooling=pooling, **BOTH)
    unit = deltas / torch.linalg.vector_norm(deltas, dim=(1, 2), keepdim=True)
    other = factor / torch.linalg.vector_norm(factor, dim=(1, 2), keepdim=True)
    left, right = (unit @ unit.mT + other @ other.mT) / 2, unit.mT @ unit
    share = 0.1 if pooling is None else pooling  # what they tell is everything
    right = (1 - share) * right + share * right.mean(0)
    weights, theta = solution.weights[:, None, None], solution.dense()
    pull = (weights * (left @ (theta - deltas) @ right)).sum(0) + solution.prior_precision * theta
    assert pull.norm() < 1e-5 * (weights * (left @ deltas @ right)).sum(0).norm()
    assert solution.energy.diff().le(1e-12 * solution.energy[0]).all()


def test_adapters_give_what_their_dense_matrices_give() -> None:
    adapters = [(_random(20, 3, seed=i), _random(3, 26, seed=i + 9), 0.7) for i in range(4)]
    factor = _random(4, 20, 6, seed=5)
    thin = poemerge.solve(adapters, sensitivity=factor, **BOTH)
    dense = poemerge.solve(torch.stack([s * b @ a for b, a, s in adapters]), sensitivity=factor, **BOTH)
    torch.testing.assert_close(thin.dense(), dense.dense(), rtol=1e-5, atol=1e-7)
    draws = thin.posterior.sample(3, generator=torch.Generator().manual_seed(0))
    assert draws.shape == (3, 20, 26)


def test_it_moves_theta_and_zeros_say_nothing() -> None:
    deltas, factor = _random(3, 10, 12), _random(3, 10, 4, seed=1)
    without = poemerge.solve(deltas, **BOTH).dense()
    silent = poemerge.solve(deltas, sensitivity=torch.zeros_like(factor), **BOTH).dense()
    torch.testing.assert_close(silent, without, rtol=1e-6, atol=1e-9)
    minded = poemerge.solve(deltas, sensitivity=factor, **BOTH).dense()
    assert (minded - without).norm() > 0.05 * without.norm()
    twice = poemerge.solve(deltas, sensitivity=torch.tensor([3.0, 1e-3, 40.0])[:, None, None] * factor, **BOTH).dense()
    torch.testing.assert_close(twice, minded, rtol=1e-6, atol=1e-9)


def test_an_expert_that_did_not_move_has_no_say_however_much_it_minds() -> None:
    deltas, factor = _random(3, 10, 12), _random(3, 10, 4, seed=1)
    deltas[2] = 0
    every = poemerge.solve(deltas, sensitivity=factor, **{**BOTH, "scale": "gram-norm"}).dense()
    others = poemerge.solve(deltas[:2], sensitivity=factor[:2], **{**BOTH, "scale": "gram-norm"}).dense()
    # The prior is relative to the mean diagonal of the sum, which is the same; the pooled input Gram leaves it out.
    torch.testing.assert_close(every, others, rtol=1e-5, atol=1e-8)


def test_one_expert_returns_itself_as_the_prior_vanishes() -> None:
    delta, factor = _random(1, 8, 6), _random(1, 8, 3, seed=1)
    theta = poemerge.solve(delta, sensitivity=factor, **{**BOTH, "prior_precision": 1e-12}).dense()
    torch.testing.assert_close(theta, delta[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "factor", "expected"),
    [
        ({"side": "output"}, _random(3, 10, 4), 'side "both"'),
        ({"side": "both"}, _random(2, 10, 4), "[3, 10, 's']"),
        ({"side": "both"}, torch.full((3, 10, 4), torch.nan), "finite"),
    ],
    ids=["side", "shape", "nan"],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], factor: Tensor, expected: str) -> None:
    with pytest.raises(BadInputError, match="sensitivity") as caught:
        poemerge.solve(_random(3, 10, 12), sensitivity=factor, **settings)
    assert expected in str(caught.value)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sensitivity")
    base = make_base(folder / "base")
    headless = make_full_expert(base, folder / "headless", seed=2)
    tensors = load_file(headless / "model.safetensors")
    del tensors["head.weight"]
    save_file(tensors, headless / "model.safetensors", metadata={"format": "pt"})
    return {
        "base": base,
        "headless": headless,
        "one": make_full_expert(base, folder / "one", seed=1),
        "lora": make_lora_expert(base, folder / "lora", seed=3),
    }


def _experts(models: dict[str, Path], *names: str) -> dict[str, Path]:
    return {name: models[name] for name in names}


def test_what_is_measured_is_the_covariance_of_the_gradients(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModel

    monkeypatch.setattr(module, "_INPUTS", 2048)
    experts = ExpertSet.open(models["base"], _experts(models, "one", "lora"))
    found = measure(experts, "one")
    assert set(found) == {name for name in experts.names() if experts.rule(name) == "matrix" and "pooler" not in name}

    own = load_file(models["one"] / "model.safetensors")
    head = own.pop("head.weight")
    model = AutoModel.from_pretrained(models["base"]).eval()
    model.load_state_dict(own)
    generator = torch.Generator().manual_seed(5)
    layer = model.get_submodule(OUTPUT.removesuffix(".weight"))
    seen: list[Tensor] = []
    layer.register_forward_hook(lambda _, __, out: seen.append(out))
    tokens = torch.randint(1, model.config.vocab_size, (192, 32), generator=generator)
    states = model(input_ids=tokens).last_hidden_state
    logits = torch.nn.functional.normalize(states.mean(1), dim=-1) @ head.T
    share = torch.softmax(logits, -1).detach()
    expected = torch.zeros(32, 32)
    for label in range(head.shape[0]):
        # Exactly E[g gᵀ], class by class: the gradient of log p_c, weighed by p_c.
        loss = (torch.log_softmax(logits, -1)[:, label] * share[:, label].sqrt()).sum()
        (gradient,) = torch.autograd.grad(loss, seen[0], retain_graph=True)
        rows = gradient.flatten(0, 1)
        expected += rows.T @ rows / len(tokens)
    torch.testing.assert_close(found[OUTPUT] @ found[OUTPUT].T, expected, atol=0.15 * float(expected.max()), rtol=0)


def test_a_wide_layer_is_sketched(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    experts = ExpertSet.open(models["base"], _experts(models, "lora"))
    whole = measure(experts, "lora")[QUERY]
    monkeypatch.setattr(module, "_WHOLE", 31)
    monkeypatch.setattr(module, "_SKETCH", 31)
    sketch = measure(experts, "lora")[QUERY]
    assert sketch.shape == (32, 31)
    one, other = whole @ whole.T, sketch @ sketch.T
    assert torch.trace(other) == pytest.approx(float(torch.trace(one)), rel=0.3)
    assert float((one * other).sum() / one.norm() / other.norm()) > 0.7


def test_a_merge_measures_once_and_says_so(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POEMERGE_CACHE", str(tmp_path / "cache"))

    def flops(*names: str) -> float:
        _, experts, plan = prepare(models["base"], _experts(models, *names), MergeParams())
        return module.measuring_flops(experts, plan)

    assert flops("one", "lora") == 2 * flops("one") > 0
    result = merge(models["base"], _experts(models, "one", "lora"), tmp_path / "m", MergeParams())
    assert flops("one", "lora") == 0
    assert {one["sensitivity"] for one in result.record["experts"].values()} == {"measured"}
    assert len(list((tmp_path / "cache" / "sensitivity").glob("*.safetensors"))) == 2
    monkeypatch.setattr(module, "measure", lambda *_: pytest.fail("measured again"))
    again = merge(models["base"], _experts(models, "one", "lora"), tmp_path / "again", MergeParams())
    assert again.record["digest"] == result.record["digest"]
    off = merge(models["base"], _experts(models, "one", "lora"), tmp_path / "off", MergeParams(sensitivity="off"))
    assert off.record["digest"] != result.record["digest"]
    assert {one["sensitivity"] for one in off.record["experts"].values()} == {"off"}
    assert not [path.name for path in tmp_path.iterdir() if path.is_dir() and path.name.startswith(".")]


def _coefficient(folder: Path, name: str) -> float:
    lines = map(json.loads, (folder / "ledger.jsonl").read_text().splitlines())
    return float(next(line["coefficient"] for line in lines if line["name"] == name))


def _with_config(base: Path, folder: Path, **config: Any) -> Path:
    """A copy of the base whose config.json says something else."""
    shutil.copytree(base, folder)
    told = json.loads((base / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**told, **config}))
    return folder


def test_a_merge_is_added_whole_where_all_that_moved_a_matrix_are_measured(
    models: dict[str, Path], tmp_path: Path
) -> None:
    both, headless = _experts(models, "one", "lora"), _experts(models, "one", "headless")
    merge(models["base"], both, tmp_path / "known", MergeParams())
    assert _coefficient(tmp_path / "known", QUERY) == 1
    base = _with_config(models["base"], tmp_path / "generator", architectures=["BertLMHeadModel"])
    record = merge(base, headless, tmp_path / "partly", MergeParams()).record
    assert [record["experts"][name]["sensitivity"] for name in ("one", "headless")] == [
        "measured",
        "it has no head of its own, and its base is no encoder",
    ]
    merge(models["base"], headless, tmp_path / "off", MergeParams(sensitivity="off"))
    by_length = _coefficient(tmp_path / "off", QUERY)
    assert 0 < _coefficient(tmp_path / "partly", QUERY) == by_length < 1
    merge(models["base"], both, tmp_path / "given", MergeParams(coefficient=0.4))
    assert _coefficient(tmp_path / "given", QUERY) == 0.4


def test_a_merge_of_a_part_is_no_measurement_of_the_whole(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = _experts(models, "one", "lora")
    monkeypatch.setenv("POEMERGE_CACHE", str(tmp_path / "fresh"))
    whole = merge(models["base"], experts, tmp_path / "whole", MergeParams()).record
    monkeypatch.setenv("POEMERGE_CACHE", str(tmp_path / "used"))
    merge(models["base"], experts, tmp_path / "part", MergeParams(include=("*layer.1*",)))
    assert merge(models["base"], experts, tmp_path / "again", MergeParams()).record["digest"] == whole["digest"]


def test_a_cache_that_cannot_be_written_costs_time_alone(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("POEMERGE_CACHE", str(tmp_path / "file"))
    record = merge(models["base"], _experts(models, "one"), tmp_path / "m", MergeParams()).record
    assert record["experts"]["one"]["sensitivity"] == "measured"


def test_the_merge_is_the_solver_with_what_was_measured(models: dict[str, Path], tmp_path: Path) -> None:
    params = MergeParams(coefficient=0.7, refinement_steps=0)
    merge(models["base"], _experts(models, "one", "lora"), tmp_path / "m", params)
    experts = ExpertSet.open(models["base"], _experts(models, "lora", "one"))
    gather(experts, {}, tmp_path / "s")
    factor = module.Sensitivities(tmp_path / "s").read(QUERY, ["lora", "one"], 32)
    assert factor is not None
    defaults = MergeParams()
    theta = poemerge.solve(
        experts.deltas(QUERY), sensitivity=factor, side="both", scale="common", scale_factor=defaults.scale_factor,
        prior_precision=defaults.prior_precision, pooling=defaults.pooling, rtol=defaults.rtol,
    ).dense()  # fmt: skip
    merged = load_file(tmp_path / "m" / "model.safetensors")[QUERY] - experts.base.read(QUERY)
    torch.testing.assert_close(merged / 0.7, theta, atol=2e-5, rtol=0)


def test_without_a_head_the_features_that_it_moved_stand_for_one(models: dict[str, Path], tmp_path: Path) -> None:
    record = merge(models["base"], _experts(models, "headless", "lora"), tmp_path / "m", MergeParams()).record
    assert {one["sensitivity"] for one in record["experts"].values()} == {"measured"}
    assert _coefficient(tmp_path / "m", QUERY) == 1


def test_what_is_measured_without_a_head_is_the_covariance_of_its_moved_features_gradients(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_INPUTS", 1024)
    experts = ExpertSet.open(models["base"], _experts(models, "headless"))
    found = measure(experts, "headless")
    predictor = Predictor(experts, "headless")
    seen: list[Tensor] = []
    layer = predictor.model.get_submodule(OUTPUT.removesuffix(".weight"))
    layer.register_forward_hook(lambda _, __, out: seen.append(out.requires_grad_()))
    said = predictor.answer(predictor.inputs.draw(96, 8, torch.Generator().manual_seed(5))).features
    assert said is not None
    expected = torch.zeros(32, 32)
    for token in range(said.shape[1]):
        for direction in range(said.shape[2]):
            # Exactly E[g gᵀ]: a Gaussian's Fisher matrix is the identity, so every mean's gradient counts as one.
            (gradient,) = torch.autograd.grad(said[:, token, direction].sum(), seen[0], retain_graph=True)
            rows = gradient.flatten(0, 1)
            expected += rows.T @ rows
    one, other = found[OUTPUT] @ found[OUTPUT].T, expected
    assert float((one * other).sum() / one.norm() / other.norm()) > 0.98


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "its base is no encoder"),
        ({"is_encoder_decoder": True}, "its base is no encoder"),
        ({"image_size": 32}, "its inputs are images"),
    ],
)
def test_features_tell_nothing_of_generators_and_images(
    models: dict[str, Path], tmp_path: Path, config: dict[str, Any], reason: str
) -> None:
    base = _with_config(models["base"], tmp_path / "base", **config)
    reasons = why_not(ExpertSet.open(base, _experts(models, "one", "headless")), 1 << 40)
    assert set(reasons) == {"headless"}
    assert reason in reasons["headless"]


def test_an_expert_that_moves_no_features_is_merged_without(models: dict[str, Path], tmp_path: Path) -> None:
    base = load_file(models["base"] / "model.safetensors")
    moved = {n: value + 0.1 if n == "pooler.dense.weight" else value for n, value in base.items()}
    (tmp_path / "pooler").mkdir()
    save_file(moved, tmp_path / "pooler" / "model.safetensors")
    experts = {"pooler": tmp_path / "pooler", "lora": models["lora"]}
    record = merge(models["base"], experts, tmp_path / "m", MergeParams()).record
    assert "moves no features of the base" in record["experts"]["pooler"]["sensitivity"]
    assert "pooler cannot be asked" in record["refinement"]["why"]


def test_a_model_that_is_too_large_or_unknown_is_merged_without(models: dict[str, Path], tmp_path: Path) -> None:
    experts = ExpertSet.open(models["base"], _experts(models, "one"))
    assert "merge.max_memory" in why_not(experts, 1000)["one"]
    config = json.loads((models["base"] / "config.json").read_text())
    odd = tmp_path / "odd"
    odd.mkdir()
    for file in models["base"].iterdir():
        (odd / file.name).write_bytes(file.read_bytes())
    (odd / "config.json").write_text(json.dumps({**config, "model_type": "never-heard-of"}))
    reasons = gather(ExpertSet.open(odd, _experts(models, "lora")), {}, tmp_path / "s")
    assert "never-heard-of" in reasons["lora"]


def test_a_vision_model_is_measured_with_noise_for_an_image(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    ViTModel(config).save_pretrained(tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    (tmp_path / "eyes").mkdir()
    moved = {name: value + 0.01 * torch.randn_like(value) for name, value in tensors.items()}
    save_file({**moved, "head.weight": torch.randn(3, 16)}, tmp_path / "eyes" / "model.safetensors")
    experts = ExpertSet.open(tmp_path / "base", {"eyes": tmp_path / "eyes"})
    found = measure(experts, "eyes")
    expected = {name for name in experts.names() if experts.rule(name) == "matrix" and "pooler" not in name}
    assert set(found) == expected
    assert all(bool(factor.isfinite().all()) and float(factor.norm()) > 0 for factor in found.values())


def test_an_expert_of_no_numbers_is_named_by_the_merge_itself(models: dict[str, Path], tmp_path: Path) -> None:
    tensors = load_file(models["one"] / "model.safetensors")
    tensors[QUERY][0, 0] = torch.nan
    (tmp_path / "broken").mkdir()
    save_file(tensors, tmp_path / "broken" / "model.safetensors")
    with pytest.raises(CheckpointError, match="NaN") as caught:
        merge(models["base"], {"broken": tmp_path / "broken", "lora": models["lora"]}, tmp_path / "m", MergeParams())
    assert QUERY in str(caught.value)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(("rows", "columns"), [(12, 7), (7, 12), (9, 9)])
def test_the_input_gram_counts_by_how_much_the_task_vector_tells(rows: int, columns: int, known: bool) -> None:
    deltas, factor = _random(3, rows, columns), _random(3, rows, 4, seed=1)
    deltas[0] = deltas[0][:, :2] @ deltas[0][:2]  # an expert of rank 2, and one that moved nothing
    deltas[1] = 0
    d = min(rows, columns)
    torch.testing.assert_close(breadth(deltas), torch.tensor([2 / d, 0, 1], dtype=torch.float64))
    solution = poemerge.solve(deltas, sensitivity=factor if known else None, **BOTH)
    assert isinstance(solution.posterior.pooling, torch.Tensor)
    expected = torch.tensor([1 - 2 / d, 1, 0.1], dtype=torch.float64)
    torch.testing.assert_close(solution.posterior.pooling, expected)


def test_breadth_of_an_adapter_is_its_rank_and_not_the_rounding_of_its_densified_form() -> None:
    b, a = _random(2, 96, 4).float(), _random(2, 4, 64, seed=1).float()
    expected = torch.full((2,), 4 / 64, dtype=torch.float64)
    for scale in (1.0, 1e-30):
        torch.testing.assert_close(breadth(scale * b @ a), expected)
        torch.testing.assert_close(breadth_of_factors(scale * b, a.mT, 64), expected)
    assert breadth(torch.zeros(2, 5, 3)).tolist() == [0.0, 0.0]


def test_adapters_of_unlike_ranks_are_shrunk_as_their_dense_matrices_are() -> None:
    adapters = [(_random(60, r, seed=r), _random(r, 70, seed=r + 9), 0.7) for r in (1, 3, 6)]
    thin, dense = (
        poemerge.solve(adapters, **BOTH),
        poemerge.solve(torch.stack([s * b @ a for b, a, s in adapters]), **BOTH),
    )
    torch.testing.assert_close(thin.posterior.pooling, torch.tensor([59, 57, 54], dtype=torch.float64) / 60)
    torch.testing.assert_close(thin.dense(), dense.dense(), rtol=1e-5, atol=1e-7)


def test_pooling_may_be_each_experts_own() -> None:
    deltas = _random(3, 8, 6)
    own = torch.tensor([0.2, 0.5, 1.0], dtype=torch.float64)
    solution = poemerge.solve(deltas, pooling=own, **BOTH)
    torch.testing.assert_close(solution.posterior.pooling, own)
    same = poemerge.solve(deltas, pooling=torch.full((3,), 0.5), **BOTH).dense()
    torch.testing.assert_close(same, poemerge.solve(deltas, pooling=0.5, **BOTH).dense())
    for wrong, said in ((own[:2], "shape"), (own + 0.1, "0 to 1"), (own * torch.nan, "0 to 1")):
        with pytest.raises(BadInputError, match=said):
            poemerge.solve(deltas, pooling=wrong, **BOTH)
