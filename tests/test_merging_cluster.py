"""A merge over a Dask cluster: the same digest as here, also when a worker is killed in the middle."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from poemerge.errors import BadInputError, PoemergeError
from poemerge.merging import merge
from poemerge.params import MergeParams
from tests.tiny import make_base, make_full_expert, make_lora_expert

pytest.importorskip("distributed")

SETTINGS: dict[str, Any] = {"side": "output", "max_shard_size": "8KB"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    folder = tmp_path_factory.mktemp("cluster")
    base = make_base(folder / "base")
    return base, {
        "one": make_full_expert(base, folder / "one", seed=1),
        "lora": make_lora_expert(base, folder / "lora", seed=2),
    }


@pytest.fixture
def cluster() -> Iterator[Any]:
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=2,
        threads_per_worker=1,
        processes=True,
        host="127.0.0.1",
        dashboard_address=None,
        resources={"GPU": 1},
    ) as running:
        yield running


def _params(cluster: Any) -> MergeParams:
    return MergeParams(**SETTINGS, engine="dask", dask_address=cluster.scheduler_address)


def test_a_lost_worker_changes_nothing(models: tuple[Path, dict[str, Path]], tmp_path: Path, cluster: Any) -> None:
    base, experts = models
    local = merge(base, experts, tmp_path / "local", MergeParams(**SETTINGS))
    plain = merge(base, experts, tmp_path / "dask", _params(cluster))
    assert plain.record["digest"] == local.record["digest"]

    pids = [worker.process.process.pid for worker in cluster.workers.values()]

    def kill_one_at_work() -> None:
        while not list(tmp_path.glob(".lost.????????????????.partial/*.safetensors*")):
            time.sleep(0.001)
        os.kill(pids[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_one_at_work)
    killer.start()
    lost = merge(base, experts, tmp_path / "lost", _params(cluster))
    killer.join()
    assert lost.record["digest"] == local.record["digest"]
    assert not list((tmp_path / "lost").rglob("*.partial"))
    ledgers = [
        [json.loads(line)["name"] for line in (tmp_path / name / "ledger.jsonl").read_text().splitlines()]
        for name in ("local", "lost")
    ]
    assert ledgers[0] == ledgers[1]


def test_a_workers_error_is_told(models: tuple[Path, dict[str, Path]], tmp_path: Path, cluster: Any) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    base, _ = models
    bad = make_full_expert(base, tmp_path / "bad", seed=3)
    tensors = load_file(bad / "model.safetensors")
    tensors["encoder.layer.1.output.dense.weight"][0, 0] = torch.nan
    save_file(tensors, bad / "model.safetensors")
    with pytest.raises(BadInputError, match=r"(?s)bad.*encoder\.layer\.1\.output\.dense\.weight"):
        merge(base, {"bad": bad}, tmp_path / "out", _params(cluster))
    assert not (tmp_path / "out").exists()


def test_no_address_and_nobody_there(models: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    base, experts = models
    with pytest.raises(BadInputError, match="dask_address"):
        merge(base, experts, tmp_path / "out", MergeParams(**SETTINGS, engine="dask"))
    from poemerge.merging import cluster as module

    waited = module._CONNECT_SECONDS
    module._CONNECT_SECONDS = "1s"
    try:
        with pytest.raises(PoemergeError, match="Cannot reach"):
            merge(
                base,
                experts,
                tmp_path / "out",
                MergeParams(**SETTINGS, engine="dask", dask_address="tcp://127.0.0.1:9"),
            )
    finally:
        module._CONNECT_SECONDS = waited
