"""Malformed inputs: each a clear error naming file, expert and tensor, with its exit status, nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from poemerge.checkpoints import ShardFile
from poemerge.checkpoints.adapter import ADAPTER_WEIGHTS
from poemerge.checkpoints.checkpoint import INDEX, SINGLE
from poemerge.cli.main import main
from tests.tiny import make_base, make_full_expert, make_lora_expert

QUERY = "encoder.layer.0.attention.self.query.weight"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("malformed")
    base = make_base(folder / "base")
    make_full_expert(base, folder / "good", seed=1)
    make_full_expert(base, folder / "bad", seed=2)
    return folder


@pytest.fixture
def models(originals: Path, tmp_path: Path) -> Path:
    for name in ("base", "good", "bad"):
        shutil.copytree(originals / name, tmp_path / name)
    return tmp_path


def _header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite the header of a safetensors file; the data stay."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    changed = change(header)
    text = changed if isinstance(changed, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def _tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path / SINGLE)
    change(tensors)
    save_file(tensors, path / SINGLE)


def _shard(path: Path, index: Callable[[dict[str, str]], object] = lambda _: None) -> None:
    """Turn the single file into two shards with an index, which `index` may spoil."""
    tensors = load_file(path / SINGLE)
    (path / SINGLE).unlink()
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{i:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, path / file)
        weight_map |= dict.fromkeys(part, file)
    index(weight_map)
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _truncated(bad: Path) -> None:
    content = (bad / SINGLE).read_bytes()
    (bad / SINGLE).write_bytes(content[:-100])


def _cut_in_the_header(bad: Path) -> None:
    (bad / SINGLE).write_bytes((bad / SINGLE).read_bytes()[:300])


def _empty_file(bad: Path) -> None:
    (bad / SINGLE).write_bytes(b"")


def _huge_header(bad: Path) -> None:
    (bad / SINGLE).write_bytes(struct.pack("<Q", 1 << 60) + b"{}")


def _nested_header(bad: Path) -> None:
    _header(bad / SINGLE, lambda _: b"[" * 200_000)


def _overlapping(bad: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        one, two = (header[f"encoder.layer.0.attention.self.{name}.weight"] for name in ("query", "key"))
        one["data_offsets"] = two["data_offsets"]

    _header(bad / SINGLE, change)


def _beyond_the_end(bad: Path) -> None:
    _header(bad / SINGLE, lambda header: header[QUERY].update(data_offsets=[1 << 40, (1 << 40) + 4096]))


def _absurd_shape(bad: Path) -> None:
    _header(bad / SINGLE, lambda header: header[QUERY].update(shape=[1 << 40, 1 << 40]))


def _negative_shape(bad: Path) -> None:
    _header(bad / SINGLE, lambda header: header[QUERY].update(shape=[-32, -32]))


def _unknown_dtype(bad: Path) -> None:
    _header(bad / SINGLE, lambda header: header[QUERY].update(dtype="F3"))


def _name_twice(bad: Path) -> None:
    def change(header: dict[str, Any]) -> bytes:
        text = json.dumps(header)
        return (text[:-1] + f', "{QUERY}": {json.dumps(header[QUERY])}' + "}").encode()

    _header(bad / SINGLE, change)


def _something_appended(bad: Path) -> None:
    with (bad / SINGLE).open("ab") as handle:
        handle.write(b"#!/bin/sh\n")


def _missing_shard(bad: Path) -> None:
    _shard(bad)
    (bad / "model-00002-of-00002.safetensors").unlink()


def _no_index(bad: Path) -> None:
    _shard(bad)
    (bad / INDEX).unlink()


def _escaping_index(bad: Path) -> None:
    _shard(bad, lambda weights: weights.update({QUERY: "../good/model.safetensors"}))


def _absolute_index(bad: Path) -> None:
    _shard(bad, lambda weights: weights.update({QUERY: "/etc/passwd.safetensors"}))


def _cyclic_index(bad: Path) -> None:
    _shard(bad, lambda weights: weights.update({QUERY: INDEX}))


def _cyclic_link(bad: Path) -> None:
    (bad / SINGLE).unlink()
    (bad / SINGLE).symlink_to(SINGLE)


def _index_that_disagrees(bad: Path) -> None:
    _shard(bad, lambda weights: weights.update({QUERY: sorted(set(weights.values()) - {weights[QUERY]})[0]}))


def _index_of_no_json(bad: Path) -> None:
    _shard(bad)
    (bad / INDEX).write_text('{"weight_map": ')


def _pickle(bad: Path) -> None:
    (bad / SINGLE).unlink()
    torch.save({"w": torch.ones(2)}, bad / "pytorch_model.bin")


def _no_weights(bad: Path) -> None:
    (bad / SINGLE).unlink()


def _missing_folder(bad: Path) -> None:
    shutil.rmtree(bad)


def _empty_expert(bad: Path) -> None:
    save_file({}, bad / SINGLE)


def _shape_clash(bad: Path) -> None:
    _tensors(bad, lambda tensors: tensors.update({QUERY: torch.zeros(32, 48)}))


def _other_vocabulary(bad: Path) -> None:
    _tensors(bad, lambda tensors: tensors.update({"embeddings.word_embeddings.weight": torch.zeros(99, 32)}))


def _other_tokens(bad: Path) -> None:
    for name in ("tokenizer.json", "vocab.txt"):
        (bad / name).write_text((bad / name).read_text().replace("w07", "w08x"))


def _quantised(bad: Path) -> None:
    _tensors(bad, lambda tensors: tensors.update({QUERY: tensors[QUERY].to(torch.float8_e4m3fn)}))


def _foreign_base(bad: Path) -> None:
    make_full_expert(make_base(bad.parent / "elsewhere", seed=77), bad, seed=2)


def _other_architecture(bad: Path) -> None:
    config = json.loads((bad / "config.json").read_text())
    (bad / "config.json").write_text(json.dumps({**config, "num_attention_heads": 8}))


def _other_names(bad: Path) -> None:
    tensors = {f"layer_{i}": value for i, value in enumerate(load_file(bad / SINGLE).values())}
    save_file(tensors, bad / SINGLE)


def _nan(bad: Path) -> None:
    _tensors(bad, lambda tensors: tensors[QUERY].__setitem__((3, 4), float("nan")))


def _infinite_bias(bad: Path) -> None:
    bias = "encoder.layer.1.output.dense.bias"
    _tensors(bad, lambda tensors: tensors[bias].__setitem__(0, float("inf")))


def _adapter_beside_weights(bad: Path) -> None:
    make_lora_expert(bad.parent / "base", bad.parent / "adapter", seed=3)
    shutil.copy(bad.parent / "adapter" / ADAPTER_WEIGHTS, bad)
    shutil.rmtree(bad.parent / "adapter")


CASES: dict[Callable[[Path], None], tuple[str, ...]] = {
    _truncated: (SINGLE, "truncated"),
    _cut_in_the_header: (SINGLE, "300 bytes"),
    _empty_file: (SINGLE, "0 bytes"),
    _huge_header: (SINGLE, "1152921504606846976"),
    _nested_header: (SINGLE, "no JSON"),
    _overlapping: (SINGLE, "overlapping", "tensor:"),
    _beyond_the_end: (SINGLE, QUERY, "1099511627776"),
    _absurd_shape: (SINGLE, QUERY, "1099511627776"),
    _negative_shape: (SINGLE, QUERY, "negative"),
    _unknown_dtype: (SINGLE, QUERY, "F3"),
    _name_twice: (SINGLE, QUERY, "twice"),
    _something_appended: (SINGLE, "appended"),
    _missing_shard: ("model-00002-of-00002.safetensors", "No such file"),
    _no_index: ("2 safetensors files without",),
    _escaping_index: (INDEX, QUERY, "../good"),
    _absolute_index: (INDEX, QUERY, "/etc/passwd"),
    _cyclic_index: (INDEX, QUERY, "plain name"),
    _cyclic_link: (SINGLE, "symbolic links"),
    _index_that_disagrees: (QUERY, "the index does not place here"),
    _index_of_no_json: (INDEX, "no JSON"),
    _pickle: ("pytorch_model.bin", "save_pretrained"),
    _no_weights: ("no safetensors file",),
    _missing_folder: ("no such folder",),
    _empty_expert: ("no tensors",),
    _shape_clash: (QUERY, "(32, 48)", "(32, 32)"),
    _other_vocabulary: ("word_embeddings", "(99, 32)", "tokenizer"),
    _other_tokens: ("tokenizer.json", "1 token ids with another meaning, 12 for instance is 'w08x'", "'w07'"),
    _quantised: (QUERY, "F8_E4M3"),
    _foreign_base: ("cosine", "another base"),
    _other_architecture: ("config.json", "num_attention_heads: 8"),
    _other_names: ("0 of the base's 39 parameters",),
    _nan: (SINGLE, QUERY, "NaN"),
    _adapter_beside_weights: ("adapter_model.safetensors beside full weights",),
    _infinite_bias: (SINGLE, "encoder.layer.1.output.dense.bias", "infinite"),
}


def _merge(models: Path, *more: str) -> int:
    experts = ["--expert", f"good={models / 'good'}", "--expert", f"bad={models / 'bad'}"]
    out = ["--base", str(models / "base"), "--out", str(models / "out"), "--side", "output"]
    return main(["merge", *out, *experts, *more])


def _left_behind(models: Path) -> list[str]:
    """Safetensors files that the merge left outside the models themselves."""
    return [
        str(path)
        for path in models.rglob("*.safetensors*")
        if path.parent.name not in {"base", "good", "bad", "elsewhere"}
    ]


@pytest.mark.parametrize("damage", CASES, ids=[case.__name__.removeprefix("_") for case in CASES])
def test_a_malformed_expert_is_named(
    models: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None]
) -> None:
    damage(models / "bad")
    assert _merge(models) == 2
    said = capsys.readouterr().err
    for word in (*CASES[damage], "expert:   bad", "got:", "expected:", "next:"):
        assert word in said
    assert "good" not in said.replace("../good", "")
    assert not (models / "out").exists()
    assert _left_behind(models) == []


def test_a_malformed_base_is_named(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _nan(models / "base")
    assert _merge(models) == 2
    said = capsys.readouterr().err
    assert QUERY in said
    assert str(models / "base") in said
    assert "expert:" not in said
    assert not (models / "out").exists()


def _factors(adapter: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    change(tensors)
    save_file(tensors, adapter / ADAPTER_WEIGHTS)


@pytest.mark.parametrize("method", ["poe", "mean", "task_arithmetic", "ties"])
def test_an_adapter_that_is_not_finite_is_named(models: Path, capsys: pytest.CaptureFixture[str], method: str) -> None:
    shutil.rmtree(models / "bad")
    make_lora_expert(models / "base", models / "bad", seed=3)
    factor = f"base_model.model.{QUERY.removesuffix('weight')}lora_B.weight"
    _factors(models / "bad", lambda tensors: tensors[factor].__setitem__((3, 1), float("nan")))
    assert _merge(models, "--method", method) == 2
    said = capsys.readouterr().err
    for word in ("expert:   bad", ADAPTER_WEIGHTS, QUERY, "NaN"):
        assert word in said
    assert not (models / "out").exists()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8], ids=["float8", "int8"])
@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_a_quantised_base_is_refused(
    models: Path, capsys: pytest.CaptureFixture[str], dtype: torch.dtype, kind: str
) -> None:
    """What an expert did to weights that cannot be merged would be lost, and the rest merged."""
    if kind == "adapter":
        shutil.rmtree(models / "bad")
        make_lora_expert(models / "base", models / "bad", seed=3)
    _tensors(models / "base", lambda tensors: tensors.update({QUERY: (100 * tensors[QUERY]).to(dtype)}))
    assert _merge(models) == 2
    said = capsys.readouterr().err
    for word in (str(models / "base" / SINGLE), QUERY, "F8_E4M3" if dtype.is_floating_point else "I8", "unquantised"):
        assert word in said
    assert not (models / "out").exists()


def test_all_malformed_models_are_told_at_once(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _truncated(models / "base")
    _pickle(models / "good")
    _shape_clash(models / "bad")
    assert _merge(models) == 2
    said = capsys.readouterr().err
    assert "2 problems" in said  # what has no base to be compared with waits
    assert "pytorch_model.bin" in said


def test_two_experts_of_one_name(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _merge(models, "--expert", f"good={models / 'bad'}") == 2
    assert "twice" in capsys.readouterr().err


def test_output_that_is_not_ours_is_left_alone(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (models / "out").mkdir()
    (models / "out" / "thesis.tex").write_text("years of work")
    assert _merge(models) == 2
    assert "no merge of poemerge" in capsys.readouterr().err
    assert (models / "out" / "thesis.tex").read_text() == "years of work"


def test_output_over_an_input_is_refused(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(
            ["merge", "--base", str(models / "base"), "--expert", f"a={models / 'good'}", "--out", str(models / "good")]
        )
        == 2
    )
    assert "no merge of poemerge" in capsys.readouterr().err
    assert (models / "good" / SINGLE).is_file()


def test_read_only_output(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Tests may run as root, whom rights do not stop: /proc refuses everybody.
    out = [
        "--base",
        str(models / "base"),
        "--expert",
        f"a={models / 'good'}",
        "--method",
        "mean",
        "--out",
        "/proc/merged",
    ]
    assert main(["merge", *out]) in {1, 2}
    said = capsys.readouterr().err
    assert "/proc" in said
    assert "--out" in said


@pytest.fixture
def full_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder on a file system of 64 kB; skipped where this user may not mount one."""
    import subprocess

    folder = tmp_path_factory.mktemp("disk")
    if (
        os.geteuid() != 0
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], check=False).returncode
    ):
        pytest.skip("no right to mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_out_of_disk(models: Path, capsys: pytest.CaptureFixture[str], full_disk: Path) -> None:
    experts = ["--expert", f"a={models / 'good'}", "--method", "mean"]
    assert main(["merge", "--base", str(models / "base"), *experts, "--out", str(full_disk / "out")]) == 1
    said = capsys.readouterr().err
    assert "No space left" in said
    assert SINGLE in said
    assert not (full_disk / "out").exists()
    assert not list(full_disk.rglob("*.safetensors*"))


def test_out_of_disk_without_a_mount(tmp_path: Path) -> None:
    """The same through a limit on file size, which needs no rights: the error names the file and nothing stays."""
    import resource
    import signal

    from poemerge.checkpoints import plan_shards
    from poemerge.errors import PoemergeError

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        shard = plan_shards([("a", torch.float32, (100, 100))], 10**9)[0]
        with pytest.raises(PoemergeError, match=r"(?s)model\.safetensors.*File too large"):
            ShardFile(tmp_path, shard)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def test_an_input_that_shrinks_under_way_is_told(models: Path) -> None:
    from poemerge.checkpoints import Checkpoint
    from poemerge.errors import CheckpointError

    checkpoint = Checkpoint.open(models / "bad")
    _cut_in_the_header(models / "bad")
    with pytest.raises(CheckpointError, match=r"(?s)query\.weight.*end of the file"):
        checkpoint.read(QUERY)
