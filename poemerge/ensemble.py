"""An ensemble of draws from the posterior of a merge, scored beside its mode: what uncertainty about Θ is worth."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from poemerge.checkpoints import Checkpoint, ExpertSet
from poemerge.contenders import Field
from poemerge.errors import BadInputError, Problem
from poemerge.merging import FamilyChoice, Selection
from poemerge.merging.matrices import solve_as_merged, with_length
from poemerge.merging.sensitivity import Sensitivities, gather, why_not
from poemerge.merging.settings import ParameterSettings, resolve
from poemerge.params import MergeParams, parse_bytes
from poemerge.suites.classification import columns_of
from poemerge.suites.evaluation import OpenSuite
from poemerge.suites.runtime import Runtime
from poemerge.suites.scores import Columns
from poemerge.suites.store import Scored, ScoreStore, score_key

__all__ = ["TEMPERATURES", "Ensemble", "score_ensemble"]

log = logging.getLogger(__name__)

TEMPERATURES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""Tried on the validation split where none is given; 1 is as wide as one observation a matrix leaves Θ."""


@dataclass(frozen=True)
class Ensemble:
    """`count` draws of a merge's noise in `folder`: a file for each matrix, `[draw, out, in]` at temperature 1."""

    merged: Path
    folder: Path
    count: int

    @staticmethod
    def draw(field: Field, merged: Path, folder: Path, count: int, seed: int) -> Ensemble:
        """Solve every matrix of `merged` again and draw from its posterior; a matrix's draws depend on seed and name.

        Raises BadInputError when `merged` is no product of experts.
        """
        if not (merged / "merge.json").is_file():
            raise BadInputError(
                Problem(str(merged), "no merge.json", "a folder that poemerge merged", "leave --posterior-samples out")
            )
        record = json.loads((merged / "merge.json").read_text(encoding="utf-8"))
        lines = [json.loads(line) for line in (merged / "ledger.jsonl").read_text(encoding="utf-8").split("\n") if line]
        solved = [line["name"] for line in lines if line["rule"] == "merged" and line["method"] == "poe"]
        if not solved:
            raise BadInputError(
                Problem(str(merged), f"method {record['method']}", "a product of experts", "merge with method poe")
            )
        # A merge of before sensitivities were known was made without.
        params = MergeParams.model_validate({"sensitivity": "off", **record["settings"]})
        selection = _selection(record["selection"])
        experts = ExpertSet.open(field.project.base, field.project.expert_folders())
        folder.mkdir(parents=True)
        minded = Sensitivities(folder / "sensitivity")
        try:
            chosen = {name: resolve(params, selection, name, experts.rule(name)) for name in solved}
            if params.sensitivity == "auto" and any(settings.side == "both" for settings in chosen.values()):
                gather(experts, why_not(experts, parse_bytes(params.max_memory)), minded.folder)
            for number, (name, settings) in enumerate(chosen.items()):
                noise = _noise(experts, name, settings, minded, count, f"{seed} {name}")
                np.save(folder / f"{number}.npy", noise.numpy(), allow_pickle=False)
        finally:
            experts.close()
        (folder / "names.json").write_text(json.dumps(solved), encoding="utf-8")
        return Ensemble(merged, folder, count)

    def member(self, index: int, temperature: float, out: Path) -> Path:
        """Write the model of one draw into `out`: merged weight + coefficient · √temperature · noise."""
        from safetensors.torch import save_file

        if out.exists():
            shutil.rmtree(out)
        out.mkdir(parents=True)
        for path in self.merged.iterdir():
            if path.is_file() and ".safetensors" not in path.name:
                shutil.copy2(path, out / path.name)
        checkpoint = Checkpoint.open(self.merged)
        try:
            tensors = {name: checkpoint.read(name) for name in checkpoint.names()}
        finally:
            checkpoint.close()
        for number, name in enumerate(json.loads((self.folder / "names.json").read_text(encoding="utf-8"))):
            noise = np.load(self.folder / f"{number}.npy", mmap_mode="r", allow_pickle=False)[index]
            added = tensors[name].float() + temperature**0.5 * torch.from_numpy(np.array(noise))
            tensors[name] = added.to(tensors[name].dtype)
        save_file(tensors, out / "model.safetensors", {"format": "pt"})
        return out


def _selection(record: Mapping[str, Any]) -> Selection:
    groups = {name: FamilyChoice(**one) for name, one in (record.get("groups") or {}).items()}
    return Selection(FamilyChoice(**record["model"]), groups)


def _noise(
    experts: ExpertSet, name: str, settings: ParameterSettings, minded: Sensitivities, count: int, seed: str
) -> Tensor:
    """coefficient · (draw − mode) as the weight is stored, float32 `[draw, *shape]`."""
    import zlib

    deltas = experts.deltas(name)
    transposed = experts.transposed(name)
    rows = deltas.shape[-1 if transposed else -2]
    known = minded.read(name, experts.touching(name), rows) if settings.side == "both" else None
    base = experts.base.read(name)
    solution = solve_as_merged(deltas, base, settings, transposed=transposed, sensitivity=known)
    generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
    draws = solution.posterior.sample(count, generator=generator)
    assert isinstance(draws, Tensor)  # the deltas were dense
    settings = with_length(settings, deltas, base, known)
    noise = settings.multiple * (draws - solution.dense()).float()
    return (noise.mT if transposed else noise).contiguous()


def score_ensemble(
    field: Field,
    suites: Sequence[OpenSuite],
    validation: Sequence[OpenSuite],
    store: ScoreStore,
    runtime: Runtime,
    *,
    count: int,
    seed: int,
    temperature: float | None = None,
    merged: Path | None = None,
) -> tuple[dict[str, tuple[Scored, Columns]], float]:
    """Each suite's score of the mean of the members' class probabilities, and the temperature.

    Where none is given, it is the one of `TEMPERATURES` with the best mean log-likelihood of two members on the
    `validation` suites. Raises BadInputError for suites whose kind has no class probabilities.
    """
    alone = [suite.name for suite in (*suites, *validation) if not hasattr(suite.suite, "logits")]
    if alone:
        raise BadInputError(
            Problem(f"suite {alone[0]}", "a kind without class probabilities", "a classification", "leave it out")
        )
    contender = field.merged("merged", merged)
    with tempfile.TemporaryDirectory(prefix="ensemble-", dir=_state(field)) as scratch, contender.open() as model_for:
        ensemble = Ensemble.draw(field, merged or field.project.merged, Path(scratch) / "noise", count, seed)

        def shares(chosen: Sequence[OpenSuite], width: float, members: int) -> dict[str, Tensor]:
            """log of the mean class probabilities `[example, class]` by suite."""
            total: dict[str, Tensor] = {}
            for index in range(members):
                folder = ensemble.member(index, width, Path(scratch) / "member")
                runtime.release()  # the folder's content is another one now
                for suite in chosen:
                    own = model_for(suite)
                    logits = _logits(suite)(type(own)(own.name, folder, own.base, own.head, own.config), runtime)
                    share = torch.log_softmax(logits.double(), dim=-1)
                    total[suite.name] = torch.logaddexp(total[suite.name], share) if suite.name in total else share
            return {name: share - np.log(members) for name, share in total.items()}

        if temperature is None:
            losses = {width: _loss(validation, shares(validation, width, min(count, 2))) for width in TEMPERATURES}
            temperature = min(losses, key=lambda width: losses[width])
            log.info("temperature %g: nll on validation %s", temperature, losses)
        began = time.monotonic()
        found = {}
        for name, share in shares(suites, temperature, count).items():
            suite = next(one for one in suites if one.name == name)
            columns = columns_of(share, _target(suite))
            key = score_key(
                ensemble=contender.digest(suite), count=count, seed=seed, temperature=temperature,
                data=suite.data_digest, split=suite.spec.settings.split, runtime=runtime.settings,
            )  # fmt: skip
            seconds = round(time.monotonic() - began, 3)
            scored = Scored(key, suite.suite.score(columns), suite.examples, seconds)
            store.put(scored, columns, {"model": f"ensemble of {count}", "suite": name, "temperature": temperature})
            found[name] = (scored, columns)
        runtime.release()
    return found, temperature


def _state(field: Field) -> Path:
    field.project.state.mkdir(parents=True, exist_ok=True)
    return field.project.state


def _logits(suite: OpenSuite) -> Callable[..., Tensor]:
    logits: Callable[..., Tensor] = suite.suite.logits  # type: ignore[attr-defined]
    return logits


def _target(suite: OpenSuite) -> Any:
    return suite.suite.target  # type: ignore[attr-defined]


def _loss(suites: Sequence[OpenSuite], shares: Mapping[str, Tensor]) -> float:
    return float(np.mean([columns_of(shares[suite.name], _target(suite))["nll"].mean() for suite in suites]))
