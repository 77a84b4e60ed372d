"""The merge end to end on tiny real models: what comes out, that it repeats, resumes, and stays within its budget."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

import poemerge
from poemerge.checkpoints import Checkpoint, ExpertSet, file_digest, weights_digest
from poemerge.checkpoints.remote import as_path
from poemerge.cli.main import main
from poemerge.errors import BadInputError, CheckpointError, NumericsError, PoemergeError
from poemerge.merging import FamilyChoice, Selection, merge, prepare
from poemerge.merging.card import licence_clash
from poemerge.merging.exchange import exchange
from poemerge.merging.staging import Staging
from poemerge.merging.stream import MemoryGate, stream
from poemerge.numerics.presets import solver_settings
from poemerge.params import MergeOverride, MergeParams
from tests.tiny import make_base, make_full_expert, make_lora_expert

ROOT = Path(__file__).parent.parent
QUERY = "encoder.layer.0.attention.self.query.weight"
OUTPUT = "encoder.layer.0.output.dense.weight"
BIAS = "encoder.layer.0.output.dense.bias"
WORDS = "embeddings.word_embeddings.weight"
FAST: dict[str, Any] = {"side": "output", "max_steps": 5}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("merging")
    base = make_base(folder / "base")
    return {
        "base": base,
        "one": make_full_expert(base, folder / "one", seed=1),
        "two": make_full_expert(base, folder / "two", seed=2, classes=5),
        "lora": make_lora_expert(base, folder / "lora", seed=3),
        "lora2": make_lora_expert(base, folder / "lora2", seed=4),
    }


def _experts(models: dict[str, Path], *names: str) -> dict[str, Path]:
    return {name: models[name] for name in names}


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(folder)
    return {name: checkpoint.read(name) for name in checkpoint.names()}


def _ledger(folder: Path) -> dict[str, dict[str, Any]]:
    return {(line := json.loads(text))["name"]: line for text in (folder / "ledger.jsonl").read_text().splitlines()}


def test_mean_is_the_mean_of_the_models(models: dict[str, Path], tmp_path: Path) -> None:
    merge(models["base"], _experts(models, "one", "two"), tmp_path / "m", MergeParams(method="mean"))
    one, two = (load_file(models[name] / "model.safetensors") for name in ("one", "two"))
    for name, value in _weights(tmp_path / "m").items():
        torch.testing.assert_close(value, (one[name] + two[name]) / 2, atol=1e-6, rtol=0)


def test_task_arithmetic_adds_the_task_vectors(models: dict[str, Path], tmp_path: Path) -> None:
    params = MergeParams(method="task_arithmetic", coefficient=0.3)
    merge(models["base"], _experts(models, "one", "two", "lora"), tmp_path / "m", params)
    experts = ExpertSet.open(models["base"], _experts(models, "one", "two", "lora"))
    for name, value in _weights(tmp_path / "m").items():
        expected = experts.base.read(name) + 0.3 * experts.deltas(name).sum(0)
        torch.testing.assert_close(value, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    "names", [("one", "two"), ("lora", "lora2"), ("one", "lora")], ids=lambda names: "+".join(names)
)
def test_poe_is_the_solver_matrix_by_matrix(models: dict[str, Path], tmp_path: Path, names: tuple[str, ...]) -> None:
    selection = Selection(FamilyChoice("student_t", 3.0))
    params = MergeParams(**FAST, coefficient=0.7, scale="gram-norm", scale_factor=0.2, prior_precision=1e-2)
    result = merge(models["base"], _experts(models, *names), tmp_path / "m", params, selection)
    experts = ExpertSet.open(models["base"], _experts(models, *names))
    weights, ledger = _weights(tmp_path / "m"), _ledger(tmp_path / "m")
    for name in (QUERY, OUTPUT):
        if not experts.touching(name):
            assert torch.equal(weights[name], experts.base.read(name))
            assert ledger[name]["rule"] == "left_at_base"
            continue
        solution = poemerge.solve(
            experts.deltas(name), expert="student_t", tail_index=3.0, scale="gram-norm", scale_factor=0.2,
            prior="relative", prior_precision=1e-2, side="output", max_steps=5, rtol=params.rtol,
        )  # fmt: skip
        theta = (weights[name] - experts.base.read(name)) / 0.7
        torch.testing.assert_close(theta, solution.dense(), atol=2e-5, rtol=0)
        line = ledger[name]
        assert (line["rule"], line["method"], line["family"]) == ("merged", "poe", "student_t")
        assert line["factored"] == (names == ("lora", "lora2"))
        assert sum(line["weights"].values()) == pytest.approx(1.0)
        assert set(line["weights"]) == set(experts.touching(name))
        assert line["energy_last"] <= line["energy_first"]
    assert result.record["rules"]["merged"] == [name for name, line in ledger.items() if line["rule"] == "merged"]


def test_a_preset_gives_the_papers_settings_and_what_is_given_beside_it_stays(
    models: dict[str, Path], tmp_path: Path
) -> None:
    experts = _experts(models, "one", "two")
    merge(models["base"], experts, tmp_path / "m", MergeParams(preset="paper-vit", device="cpu"))
    opened = ExpertSet.open(models["base"], experts)
    settings = {**solver_settings("paper-vit"), "rtol": 1e-6}
    weights, ledger = _weights(tmp_path / "m"), _ledger(tmp_path / "m")
    theta = weights[QUERY] - opened.base.read(QUERY)
    torch.testing.assert_close(theta, poemerge.solve(opened.deltas(QUERY), **settings).dense(), atol=2e-5, rtol=0)
    assert (ledger[QUERY]["family"], ledger[QUERY]["coefficient"]) == ("cauchy", 1.0)

    half = MergeParams(preset="paper-vit", coefficient=0.5, device="cpu")
    merge(models["base"], experts, tmp_path / "half", half)
    torch.testing.assert_close(
        _weights(tmp_path / "half")[QUERY] - opened.base.read(QUERY), theta / 2, atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("method", ["ties", "dare_ties", "tsv_m", "iso_c", "wudi", "karcher"])
def test_every_baseline_is_its_function(models: dict[str, Path], tmp_path: Path, method: str) -> None:
    from poemerge import baselines

    merge(models["base"], _experts(models, "one", "two", "lora"), tmp_path / "m", MergeParams(method=method, seed=7))
    experts = ExpertSet.open(models["base"], _experts(models, "one", "two", "lora"))
    extra = {"seed": 7} if method == "dare_ties" else {}
    for name in (QUERY, OUTPUT):
        theta = (
            getattr(baselines, method)(experts.deltas(name).flatten(1).unsqueeze(1), **extra).reshape(
                experts.base.shape(name)
            )
            if method in {"ties", "dare_ties", "karcher"}
            else getattr(baselines, method)(experts.deltas(name))
        )
        torch.testing.assert_close(_weights(tmp_path / "m")[name], experts.base.read(name) + theta, atol=2e-5, rtol=0)
    assert _ledger(tmp_path / "m")[BIAS]["rule"] == ("averaged" if method in {"tsv_m", "iso_c", "wudi"} else "merged")


def test_what_is_no_matrix_is_the_mean_of_those_that_moved_it(models: dict[str, Path], tmp_path: Path) -> None:
    merge(models["base"], _experts(models, "one", "two", "lora"), tmp_path / "m", MergeParams(**FAST))
    one, two = (load_file(models[name] / "model.safetensors") for name in ("one", "two"))
    weights = _weights(tmp_path / "m")
    torch.testing.assert_close(weights[BIAS], (one[BIAS] + two[BIAS]) / 2, atol=1e-6, rtol=0)
    assert _ledger(tmp_path / "m")[BIAS]["rule"] == "averaged"


def test_a_row_of_an_embedding_follows_the_experts_that_moved_it(models: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "three"
    shutil.copytree(models["one"], folder)
    tensors = load_file(folder / "model.safetensors")
    base = load_file(models["base"] / "model.safetensors")[WORDS]
    tensors[WORDS] = base.clone()
    tensors[WORDS][7] += 0.3
    save_file(tensors, folder / "model.safetensors")
    merge(models["base"], {"two": models["two"], "three": folder}, tmp_path / "m", MergeParams(**FAST))
    two = load_file(models["two"] / "model.safetensors")[WORDS] - base
    merged, line = _weights(tmp_path / "m")[WORDS] - base, _ledger(tmp_path / "m")[WORDS]
    expected = two.clone()
    weights = two[7].square().sum(), torch.tensor(len(two[7]) * 0.3**2)
    expected[7] = (weights[0] * two[7] + weights[1] * 0.3) / sum(weights)
    torch.testing.assert_close(merged, expected, atol=1e-6, rtol=0)
    assert (line["rule"], line["outcome"]) == ("averaged", "rows")


def test_adapters_merge_as_their_densified_checkpoints_do(models: dict[str, Path], tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModel

    for name in ("lora", "lora2"):
        model = PeftModel.from_pretrained(AutoModel.from_pretrained(models["base"]), models[name])
        model.merge_and_unload().save_pretrained(tmp_path / name)
        shutil.copy(models[name] / "head.safetensors", tmp_path / name)
    for side in ("output", "input", "both"):
        params = MergeParams(side=side, max_steps=50, rtol=1e-7)
        merge(models["base"], _experts(models, "lora", "lora2"), tmp_path / "factored", params)
        merge(models["base"], {name: tmp_path / name for name in ("lora", "lora2")}, tmp_path / "dense", params)
        dense = _weights(tmp_path / "dense")
        for name, value in _weights(tmp_path / "factored").items():
            torch.testing.assert_close(value, dense[name], atol=1e-5, rtol=0, msg=f"{side} {name}")


def test_folder_is_whole_and_loads(models: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    experts = _experts(models, "one", "two", "lora")
    params = MergeParams(**FAST, dtype="bfloat16", max_shard_size="30KB")
    result = merge(models["base"], experts, tmp_path / "m", params)
    model = AutoModel.from_pretrained(tmp_path / "m")
    assert model.dtype == torch.bfloat16
    weights = _weights(tmp_path / "m")
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert AutoTokenizer.from_pretrained(tmp_path / "m")("w01 w02")["input_ids"] == [2, 6, 7, 3]
    files = sorted((tmp_path / "m").glob("model-*.safetensors"))
    assert len(files) > 1
    assert result.record["digest"] == weights_digest({file.name: file_digest(file) for file in files})
    heads = {name: load_file(tmp_path / "m" / "heads" / f"{name}.safetensors") for name in experts}
    assert {name: len(head["head.weight"]) for name, head in heads.items()} == {"one": 3, "two": 5, "lora": 3}
    rules = result.record["rules"]
    assert sorted(rules["merged"] + rules["averaged"] + rules["left_at_base"]) == sorted(weights)
    assert [
        file.name for file in tmp_path.iterdir() if "partial" in file.name and not file.name.endswith("lock.partial")
    ] == []


@pytest.mark.gpu
@pytest.mark.parametrize(
    "names", [("one", "two"), ("lora", "lora2"), ("one", "lora")], ids=lambda names: "+".join(names)
)
def test_cuda_agrees_with_the_processor(models: dict[str, Path], tmp_path: Path, names: tuple[str, ...]) -> None:
    experts = _experts(models, *names)
    for settings in ({"side": "output"}, {"side": "both"}, {"method": "ties"}, {"method": "tsv_m"}):
        merge(
            models["base"],
            experts,
            tmp_path / "cpu",
            MergeParams.model_validate({**settings, "rtol": 1e-6, "device": "cpu"}),
        )
        on_cuda = MergeParams.model_validate({**settings, "rtol": 1e-6, "device": "cuda", "max_memory": "300KB"})
        first = merge(models["base"], experts, tmp_path / "cuda", on_cuda).record
        assert merge(models["base"], experts, tmp_path / "again", on_cuda).record["digest"] == first["digest"]
        assert first["device"] == torch.cuda.get_device_name()
        expected = _weights(tmp_path / "cpu")
        for name, value in _weights(tmp_path / "cuda").items():
            torch.testing.assert_close(value, expected[name], atol=1e-4, rtol=0, msg=f"{settings} {name}")


def test_equal_shapes_come_together_for_a_gpu(models: dict[str, Path]) -> None:
    """The plan of a CUDA device, made here: batches of one shape within the budget, each parameter once."""
    from poemerge.merging.plan import make_plan

    experts = ExpertSet.open(models["base"], _experts(models, "one", "two"))
    plan = make_plan(experts, MergeParams(**FAST, max_memory="3MB"), Selection(), "cuda")
    units = plan.order[0]
    assert max(len(unit.parameters) for unit in units) > 2
    assert all(len({p.shape for p in unit.parameters}) == 1 for unit in units)
    assert all(unit.memory <= plan.max_memory for unit in units)
    names = [p.name for unit in units if unit.last for p in unit.parameters]
    assert names == [name for name, _, _ in plan.shards[0].tensors]
    assert sorted(names) == sorted(experts.names())


def test_a_batch_is_its_matrices_one_by_one(models: dict[str, Path]) -> None:
    from poemerge.merging.matrices import _batched, merge_matrices
    from poemerge.merging.settings import resolve

    experts = ExpertSet.open(models["base"], _experts(models, "one", "two"))
    names = [f"encoder.layer.{i}.attention.self.{kind}.weight" for i in (0, 1) for kind in ("query", "key")]
    settings = resolve(MergeParams(**FAST), Selection(), names[0], "matrix")
    bases = torch.stack([experts.base.read(name) for name in names])
    deltas = torch.stack([experts.deltas(name) for name in names])
    deltas[2] = 0
    one_by_one = merge_matrices(names, ["one", "two"], bases, deltas, settings, False, torch.float32, 2)
    together = _batched(names, ["one", "two"], bases, deltas, settings, False, torch.float32)
    assert together[2].weight is None
    assert one_by_one[2].weight is None
    for one, other in zip(one_by_one, together, strict=True):
        if one.weight is not None and other.weight is not None:
            torch.testing.assert_close(one.weight, other.weight, atol=1e-6, rtol=0)
            assert one.entry["weights"] == pytest.approx(other.entry["weights"], rel=1e-4)


def test_same_inputs_same_digest(models: dict[str, Path], tmp_path: Path) -> None:
    experts = _experts(models, "one", "two", "lora")
    digests = set()
    for i, memory in enumerate(["1GB", "1GB", "2MB"]):
        params = MergeParams(**FAST, max_memory=memory)
        given = experts if i != 1 else dict(reversed(experts.items()))
        digests.add(merge(models["base"], given, tmp_path / "m", params).record["digest"])
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    digests.add(merge(models["base"], experts, tmp_path / "m", MergeParams(**FAST)).record["digest"])
    assert torch.get_num_threads() == threads + 1
    torch.set_num_threads(threads)
    assert len(digests) == 1


def test_large_parameters_go_block_by_block(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from poemerge.merging import elementwise, plan

    experts = _experts(models, "one", "two", "lora")
    whole = {
        m: merge(models["base"], experts, tmp_path / "w", MergeParams(method=m, **FAST)).record for m in ("mean", "poe")
    }
    whole["ties"] = merge(models["base"], experts, tmp_path / "w", MergeParams(method="ties")).record
    checked = ExpertSet.open(models["base"], experts)
    for name, merged in _weights(tmp_path / "w").items():
        if checked.touching(name):
            expected = checked.base.read(name) + poemerge.baselines.ties(checked.deltas(name))
            torch.testing.assert_close(merged, expected, atol=1e-6, rtol=0)
    monkeypatch.setattr(plan, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(plan, "TRIMMED_BYTES", 1000)
    monkeypatch.setattr(elementwise, "_BLOCK_ENTRIES", 1000)
    _, checkpoints, made = prepare(models["base"], experts, MergeParams(method="mean"))
    assert len(made.order[0]) > 3 * len(checkpoints.names())
    for method, record in whole.items():
        blocks = merge(models["base"], experts, tmp_path / "b", MergeParams(method=method, **FAST)).record
        assert blocks["digest"] == record["digest"]
        assert blocks["rules"] == record["rules"]


def test_inputs_in_object_storage(models: dict[str, Path], tmp_path: Path) -> None:
    """What fsspec reads (memory:// here, s3:// on a cluster) merges to the same digest, adapters included."""
    import fsspec

    store = fsspec.filesystem("memory")
    for name in ("base", "one", "lora"):
        store.put(str(models[name]) + "/", f"/bucket/{name}/", recursive=True)
    local = merge(models["base"], _experts(models, "one", "lora"), tmp_path / "local", MergeParams(**FAST))
    places = {name: as_path(f"memory://bucket/{name}") for name in ("base", "one", "lora")}
    remote = merge(places.pop("base"), places, tmp_path / "remote", MergeParams(**FAST))
    assert remote.record["digest"] == local.record["digest"]
    assert (tmp_path / "remote" / "config.json").read_bytes() == (tmp_path / "local" / "config.json").read_bytes()
    assert remote.record["experts"]["one"]["source"] == "memory://bucket/one"
    with pytest.raises(CheckpointError, match="memory://bucket/nothing"):
        merge(as_path("memory://bucket/nothing"), places, tmp_path / "no", MergeParams(**FAST))


def test_include_exclude_and_overrides(models: dict[str, Path], tmp_path: Path) -> None:
    params = MergeParams(
        **FAST,
        exclude=("encoder.layer.1.*",),
        overrides={
            "*embeddings*": MergeOverride(method="task_arithmetic", coefficient=0.25),
            "*.query.weight": MergeOverride(family="gaussian", side="input", coefficient=0.5),
        },
    )
    merge(models["base"], _experts(models, "one", "two"), tmp_path / "m", params)
    weights, ledger = _weights(tmp_path / "m"), _ledger(tmp_path / "m")
    experts = ExpertSet.open(models["base"], _experts(models, "one", "two"))
    assert all(line["rule"] == "left_at_base" for name, line in ledger.items() if name.startswith("encoder.layer.1."))
    expected = experts.base.read(WORDS) + 0.25 * experts.deltas(WORDS).sum(0)
    torch.testing.assert_close(weights[WORDS], expected, atol=1e-6, rtol=0)
    assert (ledger[QUERY]["family"], ledger[QUERY]["side"]) == ("gaussian", "input")
    assert (ledger[OUTPUT]["family"], ledger[OUTPUT]["side"]) == ("cauchy", "output")


def test_experts_equal_to_the_base_leave_its_bytes(models: dict[str, Path], tmp_path: Path) -> None:
    for method in ("poe", "mean", "task_arithmetic", "ties"):
        merge(models["base"], {"same": models["base"]}, tmp_path / "m", MergeParams(method=method, **FAST))
        assert all(line["outcome"] == "unchanged" for line in _ledger(tmp_path / "m").values())
        for name, value in _weights(tmp_path / "m").items():
            assert torch.equal(value, load_file(models["base"] / "model.safetensors")[name])


def test_low_precision_inputs_are_summed_in_float32(models: dict[str, Path], tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", dtype=torch.bfloat16)
    tensors = load_file(base / "model.safetensors")
    experts = {}
    for i in range(3):
        own = {name: (value.float() * (1 + 0.02 * (i + 1))).to(torch.bfloat16) for name, value in tensors.items()}
        (tmp_path / f"e{i}").mkdir()
        save_file(own, tmp_path / f"e{i}" / "model.safetensors")
        experts[f"e{i}"] = tmp_path / f"e{i}"
    merge(base, experts, tmp_path / "m", MergeParams(method="mean"))
    for name, value in _weights(tmp_path / "m").items():
        own = torch.stack([load_file(path / "model.safetensors")[name].float() for path in experts.values()])
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, (tensors[name].float() + (own - tensors[name].float()).sum(0) * (1 / 3)).bfloat16())


def test_killed_and_started_again(models: dict[str, Path], tmp_path: Path) -> None:
    """kill -9 in the middle; the same command goes on at the first unwritten shard and ends in the same digest."""
    experts = _experts(models, "one", "two", "lora")
    params = MergeParams(side="output", max_shard_size="8KB")
    whole = merge(models["base"], experts, tmp_path / "whole", params)
    script = (
        "import sys, time; from pathlib import Path\n"
        "from poemerge.merging import merge; from poemerge.params import MergeParams\n"
        "def slow(done, total, name): print(done, flush=True); time.sleep(0.05)\n"
        "merge(Path(sys.argv[1]), dict(a.split('=') for a in sys.argv[3:]), Path(sys.argv[2]), "
        "MergeParams(side='output', max_shard_size='8KB'), progress=slow)\n"
    )
    arguments = [str(models["base"]), str(tmp_path / "out"), *(f"{name}={path}" for name, path in experts.items())]
    process = subprocess.Popen([sys.executable, "-c", script, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(12):
        assert process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "out").exists()
    staged = next(tmp_path.glob(".out.????????????????.partial"))
    kept = {file.name: file.stat().st_mtime_ns for file in staged.glob("*.safetensors")}
    assert kept
    result = merge(models["base"], experts, tmp_path / "out", params)
    assert result.resumed_shards == len(kept)
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == at for name, at in kept.items())
    assert result.record["digest"] == whole.record["digest"]
    assert list(_ledger(tmp_path / "out")) == list(_ledger(tmp_path / "whole"))
    assert [path.name for path in tmp_path.glob(".out.*")] == [".out.lock.partial"]


_KILLED_WHILE_PUBLISHING = """
import os, signal, sys
from pathlib import Path
import poemerge.merging.staging as staging
from poemerge.merging import merge
from poemerge.params import MergeParams

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

rename = Path.rename
if sys.argv[1] == "after the exchange":
    exchange = staging.exchange
    staging.exchange = lambda one, other: exchange(one, other) and die()
elif sys.argv[1] == "before the old one is removed":
    staging.shutil.rmtree = die
else:  # a file system without exchange, killed between the two renames
    staging.exchange = lambda one, other: False
    Path.rename = lambda self, target: die() if Path(target).name == "out" else rename(self, target)
merge(Path(sys.argv[2]), dict(a.split("=") for a in sys.argv[4:]), Path(sys.argv[3]), MergeParams(method="mean"))
"""


@pytest.mark.parametrize("moment", ["after the exchange", "before the old one is removed", "between two renames"])
def test_killed_while_it_takes_the_place_of_an_earlier_merge(
    models: dict[str, Path], tmp_path: Path, moment: str
) -> None:
    """The output is the old merge or the new one, whole; the same command ends in the new one and nothing else."""
    experts = _experts(models, "one", "two")
    old = merge(models["base"], experts, tmp_path / "out", MergeParams(method="task_arithmetic", max_shard_size="8KB"))
    given = [f"{name}={path}" for name, path in experts.items()]
    arguments = [moment, str(models["base"]), str(tmp_path / "out"), *given]
    process = subprocess.run([sys.executable, "-c", _KILLED_WHILE_PUBLISHING, *arguments], cwd=ROOT)
    assert process.returncode == -signal.SIGKILL
    if moment != "between two renames":
        assert json.loads((tmp_path / "out" / "merge.json").read_text())["method"] == "mean"
    else:
        assert not (tmp_path / "out").exists()
        staging = Staging(tmp_path / "out", "0" * 16)
        with staging.hold():  # any merge to that name brings the earlier one back before it begins
            assert json.loads((tmp_path / "out" / "merge.json").read_text()) == old.record
    new = merge(models["base"], experts, tmp_path / "out", MergeParams(method="mean"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.lock.partial", "out"]
    assert new.record["digest"] == weights_digest(
        {file.name: file_digest(file) for file in (tmp_path / "out").glob("*.safetensors")}
    )
    assert not list((tmp_path / "out").glob("*-of-*")), "no shards of the earlier merge"
    fresh = merge(models["base"], experts, tmp_path / "fresh", MergeParams(method="mean"))
    assert new.record["digest"] == fresh.record["digest"]


def test_the_name_is_never_empty_while_merges_replace_each_other(models: dict[str, Path], tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()
        (folder / "merge.json").write_text("{}")
    if not exchange(one, other):
        pytest.skip("this file system cannot exchange names")
    missing, done = [0], threading.Event()

    def look() -> None:
        while not done.is_set():
            missing[0] += not (tmp_path / "one" / "merge.json").exists()

    watcher = threading.Thread(target=look)
    watcher.start()
    for _ in range(2000):
        assert exchange(one, other)
    done.set()
    watcher.join()
    assert not missing[0]
    with pytest.raises(OSError, match="No such file"):
        exchange(one, tmp_path / "nothing")


def test_a_damaged_shard_is_written_again(models: dict[str, Path], tmp_path: Path) -> None:
    experts, params = _experts(models, "one", "two"), MergeParams(method="mean", max_shard_size="8KB")
    whole = merge(models["base"], experts, tmp_path / "whole", params)

    class StoppedError(Exception):
        pass

    def stop(done: int, total: int, name: str) -> None:
        if done > total / 2:
            raise StoppedError

    with pytest.raises(StoppedError):
        merge(models["base"], experts, tmp_path / "out", params, progress=stop)
    staged = next(tmp_path.glob(".out.????????????????.partial"))
    files = sorted(staged.glob("*.safetensors"))
    with files[0].open("r+b") as handle:
        handle.seek(-1, os.SEEK_END)
        last = handle.read(1)
        handle.seek(-1, os.SEEK_END)
        handle.write(bytes([last[0] ^ 1]))
    result = merge(models["base"], experts, tmp_path / "out", params)
    assert 0 < result.resumed_shards < len(files)
    assert result.record["digest"] == whole.record["digest"]


def test_an_output_that_is_a_link_stays_one(models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "other disk").mkdir()
    (tmp_path / "m").symlink_to(tmp_path / "other disk" / "m")
    for _ in range(2):
        assert merge(models["base"], _experts(models, "one"), tmp_path / "m", MergeParams(**FAST)).out == tmp_path / "m"
        assert (tmp_path / "m").is_symlink()
        assert (tmp_path / "other disk" / "m" / "merge.json").is_file()
    assert [path.name for path in tmp_path.rglob(".*") if path.is_dir()] == []


def test_an_output_that_cannot_be_renamed_is_refused_before_any_work(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "volume").mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(Path, "is_mount", lambda path: path == tmp_path / "volume")
        with pytest.raises(BadInputError, match="a mount point"):
            merge(models["base"], _experts(models, "one"), tmp_path / "volume", MergeParams(**FAST))
    assert not list((tmp_path / "volume").iterdir())
    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", Mock(side_effect=OSError(errno.EBUSY, "Device or resource busy")))
        with pytest.raises(PoemergeError, match=r"Cannot give the merge its name[^$]*busy"):
            merge(models["base"], _experts(models, "one"), tmp_path / "m", MergeParams(**FAST))
    assert merge(models["base"], _experts(models, "one"), tmp_path / "m", MergeParams(**FAST)).resumed_shards == 1


@pytest.mark.parametrize("method", ["mean", "ties", "dare_ties", "karcher", "tsv_m", "poe"])
def test_scalars_and_empty_tensors(models: dict[str, Path], tmp_path: Path, method: Any) -> None:
    """CLIP's logit_scale is one number."""
    places = {}
    for name, scale in (("base", 4.0), ("one", 5.0), ("two", 4.5)):
        tensors = load_file(models[name] / "model.safetensors")
        places[name] = shutil.copytree(models[name], tmp_path / name)
        extra = {"logit_scale": torch.tensor(scale), "nothing": torch.zeros(0), "nowhere.weight": torch.zeros(5, 0)}
        save_file({**tensors, **extra}, places[name] / "model.safetensors", {"format": "pt"})
    merge(places.pop("base"), places, tmp_path / "m", MergeParams(method=method, **FAST))
    merged = _weights(tmp_path / "m")
    assert 4.2 < float(merged["logit_scale"]) <= 6.0  # DARE makes up for what it drops
    assert merged["logit_scale"].shape == ()
    assert (merged["nothing"].shape, merged["nowhere.weight"].shape) == ((0,), (5, 0))


@pytest.mark.parametrize("exclude", [(), (QUERY, BIAS)])
@pytest.mark.parametrize("method", ["mean", "ties", "poe"])
@pytest.mark.parametrize("name", [QUERY, BIAS])
def test_what_does_not_fit_float16_is_told(
    models: dict[str, Path], tmp_path: Path, name: str, method: Any, exclude: tuple[str, ...]
) -> None:
    places = {}
    for one in ("base", "one"):
        places[one] = shutil.copytree(models[one], tmp_path / one)
        tensors = load_file(places[one] / "model.safetensors")
        tensors[name].view(-1)[0] = 1e5
        save_file(tensors, places[one] / "model.safetensors", {"format": "pt"})
    params = MergeParams(method=method, dtype="float16", exclude=exclude, **FAST)
    with pytest.raises(NumericsError, match=rf"{name}: entries up to 100000 do not fit float16.*bfloat16"):
        merge(places["base"], {"one": places["one"], "lora": models["lora"]}, tmp_path / "m", params)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"overrides": {"*.biass": {"method": "mean"}}}, r"merge.overrides[^$]*'\*.biass', which matches no parameter"),
        ({"exclude": ["*qeury*"]}, r"merge.exclude[^$]*'\*qeury\*', which matches no parameter"),
    ],
)
def test_settings_that_fit_no_parameter_are_refused(
    models: dict[str, Path], settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(BadInputError, match=said):
        prepare(models["base"], _experts(models, "one"), MergeParams.model_validate(settings))


def test_an_override_with_a_method_for_matrices_averages_the_rest(models: dict[str, Path], tmp_path: Path) -> None:
    params = MergeParams(overrides={"encoder.layer.0.*": {"method": "tsv_m"}}, **FAST)
    merge(models["base"], _experts(models, "one", "two"), tmp_path / "m", params)
    ledger = [json.loads(line) for line in (tmp_path / "m" / "ledger.jsonl").read_text().splitlines()]
    methods = {line["name"]: (line["rule"], line["method"]) for line in ledger}
    assert methods[QUERY] == ("merged", "tsv_m")
    assert methods[BIAS] == ("averaged", "average")


def test_an_override_gives_student_t_its_tail_index(models: dict[str, Path], tmp_path: Path) -> None:
    overrides = {QUERY: {"family": "student_t", "tail_index": 3.0}, OUTPUT: {"family": "gaussian"}}
    merge(models["base"], _experts(models, "one", "two"), tmp_path / "m", MergeParams(overrides=overrides, **FAST))
    ledger = [json.loads(line) for line in (tmp_path / "m" / "ledger.jsonl").read_text().splitlines()]
    families = {line["name"]: (line["family"], line["tail_index"]) for line in ledger}
    assert families[QUERY] == ("student_t", 3.0)
    assert families[OUTPUT] == ("gaussian", None)
    with pytest.raises(ValidationError, match="go together"):
        MergeParams(overrides={"*": {"family": "student_t"}})


def test_a_preset_says_its_own_family(models: dict[str, Path], tmp_path: Path) -> None:
    gaussian = Selection(FamilyChoice("gaussian"))
    record = merge(
        models["base"], _experts(models, "one"), tmp_path / "m", MergeParams(preset="paper-t5"), gaussian
    ).record
    assert record["selection"]["model"]["family"] == "cauchy"


def test_a_base_of_one_file_brings_what_belongs_to_it_alone(models: dict[str, Path], tmp_path: Path) -> None:
    base, one = (shutil.copytree(models[name], tmp_path / name) for name in ("base", "one"))
    (base / "secrets.json").write_text("{}")
    (one / "source.json").write_text("[]")
    files = {"one": one / "model.safetensors"}
    params = MergeParams(dtype="bfloat16", **FAST)
    record = merge(base / "model.safetensors", files, tmp_path / "m", params, digests=True).record
    assert record["base"]["digest"] == file_digest(base / "model.safetensors")
    assert not (tmp_path / "m" / "secrets.json").exists()
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert (config["model_type"], config["dtype"]) == ("bert", "bfloat16")
    assert merge(base, {"one": one}, tmp_path / "f", params).record["experts"]["one"]["source"] == str(one)


def test_modules_behind_a_sentence_transformer_come_along(models: dict[str, Path], tmp_path: Path) -> None:
    base = shutil.copytree(models["base"], tmp_path / "base")
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}, {"path": "../one"}]
    (base / "modules.json").write_text(json.dumps(modules))
    for module, file in (("1_Pooling", "config.json"), ("2_Dense", "model.safetensors"), ("notes", "a.json")):
        (base / module).mkdir()
        (base / module / file).write_bytes(b"{}")
    merge(base, _experts(models, "one"), tmp_path / "m", MergeParams(**FAST))
    assert {path.name for path in (tmp_path / "m").iterdir() if path.is_dir()} == {"1_Pooling", "2_Dense", "heads"}
    assert (tmp_path / "m" / "2_Dense" / "model.safetensors").read_bytes() == b"{}"


def test_an_output_within_the_base_is_resumed(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = shutil.copytree(models["base"], tmp_path / "base")
    params = MergeParams(max_shard_size="40KB", **FAST)
    with monkeypatch.context() as patched:
        patched.setattr(Staging, "publish", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            merge(base, _experts(models, "one"), base / "merged", params)
    assert merge(base, _experts(models, "one"), base / "merged", params).resumed_shards > 1


def test_other_settings_do_not_resume(models: dict[str, Path], tmp_path: Path) -> None:
    experts = _experts(models, "one", "two")

    def stop(done: int, total: int, name: str) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(models["base"], experts, tmp_path / "m", MergeParams(method="mean", max_shard_size="8KB"), progress=stop)
    other = MergeParams(method="task_arithmetic", max_shard_size="8KB")
    assert merge(models["base"], experts, tmp_path / "m", other).resumed_shards == 0
    assert merge(models["base"], experts, tmp_path / "m", other).out.is_dir()  # replaces our own earlier merge


def test_memory_gate_holds_back_and_lets_large_ones_pass_alone() -> None:
    gate = MemoryGate(100, 2)
    under_way, peak, lock = [0], [0], threading.Lock()

    def read(size: int) -> int:
        with lock:
            under_way[0] += size
            peak[0] = max(peak[0], under_way[0])
        return size

    def write(size: int, _: int) -> None:
        time.sleep(0.001)
        with lock:
            under_way[0] -= size

    sizes = [30, 50, 40, 10, 250, 60, 60, 1] * 4
    stream(sizes, lambda s: s, read, lambda s, _: s, write, workers=3, limit=100)
    assert peak[0] == 250
    assert under_way[0] == 0
    assert gate.acquire(1000)
    gate.close()
    assert not gate.acquire(1)


def test_no_more_units_are_read_ahead_than_keep_the_workers_busy() -> None:
    """A budget of memory is no reason to fill it: with room for 10,000 units a slow writer has few waiting for it."""
    started, most, lock = [0], [0], threading.Lock()

    def read(unit: int) -> int:
        with lock:
            started[0] += 1
        return unit

    def write(unit: int, _: int) -> None:
        time.sleep(0.002)
        with lock:
            most[0] = max(most[0], started[0] - unit)

    stream(range(50), lambda _: 1, read, lambda unit, _: unit, write, workers=2, limit=10_000)
    assert 2 <= most[0] <= 6


@pytest.mark.parametrize("step", ["read", "compute", "write"])
def test_an_error_in_any_step_ends_the_stream(step: str) -> None:
    def at(name: str) -> Any:
        def call(unit: int, *_: Any) -> int:
            if name == step and unit == 20:
                raise RuntimeError(name)
            return unit

        return call

    with pytest.raises(RuntimeError, match=step):
        stream(range(10_000), lambda _: 30, at("read"), at("compute"), at("write"), workers=2, limit=100)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("merge-")]


def test_card_is_one_that_the_hub_reads(models: dict[str, Path], tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    experts = _experts(models, "one", "lora")
    for name, licence in (("one", "apache-2.0"), ("lora", "cc-by-nc-4.0")):
        record = {"source": f"hf://team/{name}", "revision": "a" * 40, "digest": "d" * 64, "license": licence}
        copied = tmp_path / name
        copied.mkdir()
        for file in experts[name].iterdir():
            (copied / file.name).write_bytes(file.read_bytes())
        (copied / "source.json").write_text(json.dumps(record))
        experts[name] = copied
    merge(models["base"], experts, tmp_path / "m", MergeParams(**FAST))
    card = ModelCard.load(tmp_path / "m" / "README.md")
    assert card.data.base_model == ["team/lora", "team/one"]
    assert card.data.library_name == "transformers"
    assert "merge" in card.data.tags
    assert card.data.license == "other"
    assert "Licences clash" in card.text
    assert "cc-by-nc-4.0 restricts commercial use" in card.text
    assert json.loads((tmp_path / "m" / "merge.json").read_text())["experts"]["one"]["digest"] == "d" * 64


@pytest.mark.parametrize(
    ("licences", "said"),
    [
        ({"a": "mit", "b": "mit"}, None),
        ({"a": None, "b": None}, None),
        ({"a": "mit", "b": None}, "no licence is stated for b"),
        ({"a": "mit", "b": "apache-2.0"}, "must meet all"),
        ({"a": "mit", "b": "agpl-3.0"}, "same licence"),
        ({"a": "mit", "b": "cc-by-nc-4.0"}, "commercial"),
    ],
)
def test_licence_clashes(licences: dict[str, str | None], said: str | None) -> None:
    found = licence_clash(licences)
    assert found is None if said is None else found is not None and re.search(said, found)


def test_command_line(models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "m"
    common = ["merge", "--base", str(models["base"]), "--expert", f"one={models['one']}", "--side", "output"]
    common += ["--expert", f"lora={models['lora']}", "--out", str(out)]
    assert main([*common, "--dry-run", "--json"]) == 0
    assert list(tmp_path.iterdir()) == []
    plan = json.loads(capsys.readouterr().out)
    assert main([*common, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert plan["rules"]["private"] == record["rules"]["private"] == {"lora": ["head.weight"], "one": ["head.weight"]}
    assert sorted(plan["rules"]["merged"]) == sorted(record["rules"]["merged"])
    assert plan["bytes_written"] == plan["shards"][0]["bytes"]
    assert plan["seconds"] > 0
    assert main([*common, "--dry-run"]) == 0
    assert "poe" in capsys.readouterr().out
    assert main(common) == 0
    assert "digest " + record["digest"][:12] in capsys.readouterr().out


def test_command_line_tells_all_that_is_wrong(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["merge", "--base", str(models["base"]), "--out", str(tmp_path / "m")]
    flags = ["--scale-factor", "-1", "--override", "x:mothod=ties"]
    assert main([*common, "--expert", f"a={models['one']}", *flags]) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in ("2 problems", "--scale-factor", "mothod"))
    assert main([*common, "--expert", f"a={models['one']}", "--max-memory", "much"]) == 2
    assert "much" in capsys.readouterr().err
    assert (
        main([*common, "--expert", f"a={models['one']}", "--expert", f"a={models['two']}", "--expert", "../b=x"]) == 2
    )
    assert "2 problems" in capsys.readouterr().err
    assert main([*common, "--expert", f"a={models['one']}", "--expert-family", "student_t"]) == 2
    assert "tail index" in capsys.readouterr().err
    preset = ("--preset", "paper-t5", "--expert-family", "gaussian")
    assert main([*common, "--expert", f"a={models['one']}", *preset]) == 2
    assert "Cauchy" in capsys.readouterr().err
    assert main([*common, "--expert", f"a={models['one']}", "--device", "cuda:99"]) == 2
    assert "cuda:99" in capsys.readouterr().err
    assert main([*common, "--expert", f"a={models['one']}", "--max-memory", "20KB"]) == 2
    assert "at least" in capsys.readouterr().err
    assert main([*common, "--expert", f"a={models['one']}", "--include", "nothing.like.this"]) == 2
    assert "no parameter" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
