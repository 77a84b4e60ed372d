"""The whole promise on real architectures, language and vision: killed, resumed, spread out, loaded by transformers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from poemerge.checkpoints import Checkpoint
from poemerge.cli.main import main
from poemerge.merging import merge
from poemerge.params import MergeParams
from tests.tiny import make_base, make_full_expert

ROOT = Path(__file__).parent.parent
SETTINGS: dict[str, Any] = {"max_shard_size": "12KB"}


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=80,
            hidden_size=32,
            intermediate_size=72,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=False,
            initializer_range=0.2,
        )
    )


def _vit() -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=16,
            patch_size=4,
            num_labels=5,
            initializer_range=0.2,
        )
    )


def _save(model: Any, path: Path, **options: Any) -> Path:
    model.save_pretrained(path, **options)
    return path


def _adapter(base: Path, path: Path, seed: int) -> tuple[Path, Path]:
    """A LoRA adapter of `base` saved by PEFT, with ranks and alphas of its own, and PEFT's own merge of the two."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForImageClassification

    vision = "vit" in base.parent.name
    model = (AutoModelForImageClassification if vision else AutoModelForCausalLM).from_pretrained(base)
    targets = ["q_proj", "v_proj", "fc1"] if vision else ["q_proj", "v_proj", "down_proj"]
    config = LoraConfig(r=4, lora_alpha=6, target_modules=targets, rank_pattern={"v_proj": 2}, use_rslora=seed % 2 == 0)
    generator = torch.Generator().manual_seed(seed)
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    adapted.save_pretrained(path)
    return path, _save(adapted.merge_and_unload(), path.with_name(path.name + "-dense"))


@pytest.fixture(scope="module", params=["llama", "vit"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base in shards; full fine-tunes in one file and in other shards; two adapters, and what PEFT makes of them."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = {"llama": _llama, "vit": _vit}[request.param]()
    found = {"base": _save(model, folder / "base", max_shard_size="20KB")}
    for seed, options in ((1, {}), (2, {"max_shard_size": "30KB"})):
        generator = torch.Generator().manual_seed(seed)
        tuned = {"llama": _llama, "vit": _vit}[request.param]()
        with torch.no_grad():
            for own, start in zip(tuned.parameters(), model.parameters(), strict=True):
                own.copy_(start + 0.01 * torch.randn(start.shape, generator=generator))
        found[f"full{seed}"] = _save(tuned, folder / f"full{seed}", **options)
    for seed in (3, 4):
        found[f"lora{seed}"], found[f"dense{seed}"] = _adapter(found["base"], folder / f"lora{seed}", seed)
    return found


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, host="127.0.0.1", dashboard_address=None
    ) as running:
        yield running


def _experts(models: dict[str, Path]) -> dict[str, Path]:
    return {name: models[name] for name in ("full1", "full2", "lora3")}


_SLOW = (
    "import sys, time; from pathlib import Path\n"
    "from poemerge.merging import merge; from poemerge.params import MergeParams\n"
    "def slow(done, total, name): print(done, flush=True); time.sleep(0.05)\n"
    "merge(Path(sys.argv[1]), dict(a.split('=') for a in sys.argv[3:]), Path(sys.argv[2]), "
    "MergeParams(max_shard_size='12KB'), progress=slow)\n"
)


def test_killed_resumed_and_spread_out_it_is_one_merge(models: dict[str, Path], tmp_path: Path, cluster: Any) -> None:
    experts = _experts(models)
    local = merge(models["base"], experts, tmp_path / "local", MergeParams(**SETTINGS))
    assert len(list((tmp_path / "local").glob("model-*.safetensors"))) > 5

    given = [str(models["base"]), str(tmp_path / "killed"), *(f"{name}={path}" for name, path in experts.items())]
    process = subprocess.Popen([sys.executable, "-c", _SLOW, *given], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(20):
        assert process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "killed").exists()
    resumed = merge(models["base"], experts, tmp_path / "killed", MergeParams(**SETTINGS))
    assert resumed.resumed_shards > 0
    assert resumed.record["digest"] == local.record["digest"]

    victim = next(iter(cluster.workers.values())).process.process.pid
    killed = threading.Event()

    def kill_one_at_work() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not list(
            tmp_path.glob(".spread.????????????????.partial/*.safetensors*")
        ):
            time.sleep(0.001)
        os.kill(victim, signal.SIGKILL)
        killed.set()

    killer = threading.Thread(target=kill_one_at_work)
    killer.start()
    spread = MergeParams(**SETTINGS, engine="dask", dask_address=cluster.scheduler_address)
    lost = merge(models["base"], experts, tmp_path / "spread", spread)
    killer.join()
    assert killed.is_set()
    assert lost.record["digest"] == local.record["digest"]
    assert not list((tmp_path / "spread").rglob("*.partial"))


@pytest.mark.parametrize("method", ["poe", "mean", "ties"])
def test_transformers_loads_the_result(models: dict[str, Path], tmp_path: Path, method: str) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForImageClassification

    merge(models["base"], _experts(models), tmp_path / "m", MergeParams(method=method, **SETTINGS))
    vision = "vit" in models["base"].parent.name
    auto = AutoModelForImageClassification if vision else AutoModelForCausalLM
    model, info = auto.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    ours_in_file, again = Checkpoint.open(tmp_path / "m"), Checkpoint.open(_save(model, tmp_path / "again"))
    assert sorted(again.names()) == sorted(ours_in_file.names())
    assert all(torch.equal(again.read(name), ours_in_file.read(name)) for name in again.names())
    inputs = torch.randn(2, 3, 16, 16) if vision else torch.arange(20).view(2, 10)
    start = auto.from_pretrained(models["base"])
    with torch.no_grad():
        ours, theirs = model.eval()(inputs).logits, start.eval()(inputs).logits
    assert bool(ours.isfinite().all())
    assert not torch.allclose(ours, theirs, atol=1e-4)


def test_layer_norms_of_an_old_bert_are_merged_under_their_own_names(tmp_path: Path) -> None:
    from transformers import AutoModel

    base = make_base(tmp_path / "base")
    experts = {f"e{seed}": make_full_expert(base, tmp_path / f"e{seed}", seed) for seed in (1, 2)}
    tensors = load_file(base / "model.safetensors")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in tensors.items()
    }
    save_file(old, base / "model.safetensors", {"format": "pt"})
    merge(base, experts, tmp_path / "m", MergeParams(method="mean"))
    merged = load_file(tmp_path / "m" / "model.safetensors")
    assert list(merged) == list(load_file(base / "model.safetensors"))
    assert sum("LayerNorm" in name and not torch.equal(merged[name], old[name]) for name in old) == 10
    model, info = AutoModel.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.equal(model.embeddings.LayerNorm.weight, merged["embeddings.LayerNorm.gamma"])


@pytest.mark.parametrize("side", ["both", "output", "input"])
def test_adapters_merge_as_what_peft_makes_of_them(models: dict[str, Path], tmp_path: Path, side: str) -> None:
    """To 1e-5 of the largest weight, with a solve that is precise enough to see it."""
    params = MergeParams.model_validate({"side": side, "rtol": 1e-7, "max_steps": 300})
    for kind in ("lora", "dense"):
        experts = {f"e{seed}": models[f"{kind}{seed}"] for seed in (3, 4)}
        merge(models["base"], experts, tmp_path / kind, params)
    factored, dense = (load_file(tmp_path / kind / "model.safetensors") for kind in ("lora", "dense"))
    assert factored.keys() == dense.keys()
    base, moved = Checkpoint.open(models["base"]), 0
    for name, value in factored.items():
        torch.testing.assert_close(value, dense[name], atol=1e-5, rtol=0)
        moved += not torch.equal(value, base.read(name))
    assert moved == 9, "three matrices in each of three layers, and nothing else"


def test_command_line(models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [text for name, path in _experts(models).items() for text in ("--expert", f"{name}={path}")]
    command = ["merge", "--base", str(models["base"]), *given, "--out", str(tmp_path / "m"), "--max-shard-size", "12KB"]
    assert main([*command, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "peak memory about" in told
    assert not (tmp_path / "m").exists()
    assert main(command) == 0
    assert "3 experts by poe (cauchy)" in capsys.readouterr().out
