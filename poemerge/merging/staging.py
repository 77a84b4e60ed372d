"""The folder in which a merge grows, out of sight: what is finished there is found again, and renamed when whole."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from poemerge.checkpoints import Shard, file_digest
from poemerge.errors import BadInputError, PoemergeError, Problem
from poemerge.filelock import exclusive
from poemerge.merging.exchange import exchange
from poemerge.wholefile import write_whole

__all__ = ["Staging", "check_output", "job_key"]

log = logging.getLogger(__name__)


def job_key(description: Mapping[str, Any]) -> str:
    """Sixteen hexadecimal digits that stand for the inputs and settings of a merge."""
    text = json.dumps(description, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_output(out: Path) -> None:
    """Raises BadInputError when `out` exists and is no merge of ours, or cannot be replaced by one."""
    out = out.resolve()
    if out.exists() and not (out.is_dir() and ((out / "merge.json").is_file() or not any(out.iterdir()))):
        raise BadInputError(
            Problem(
                str(out),
                "something that is no merge of poemerge",
                "a new folder, or an earlier merge to replace",
                "choose another --out, or remove it",
            )
        )
    if out.is_mount():
        raise BadInputError(
            Problem(str(out), "a mount point", "a folder that can be renamed", "name a folder inside it as --out")
        )
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise BadInputError(
            Problem(
                str(out),
                f"{parent} cannot be written",
                "a folder that you may write to",
                "choose another --out, or mend its rights",
            )
        )


class Staging:
    """`.NAME.KEY.partial` beside the output folder NAME: finished shards, each with a record of digest and ledger.

    A record is written after its shard has its name, and believed only when the shard still has the recorded digest.
    """

    def __init__(self, out: Path, key: str) -> None:
        self.out = out
        self.key = key
        self.folder = out.absolute().parent / f".{out.name}.{key}.partial"

    @property
    def records(self) -> Path:
        """Where the records of finished shards lie while the merge grows, and until its output has its name."""
        return self.folder.with_name(self.folder.name.removesuffix(".partial") + ".records.partial")

    @property
    def sensitivities(self) -> Path:
        """Where the experts' measured sensitivities lie while the merge grows."""
        return self.records / "sensitivity"

    @property
    def refinement(self) -> Path:
        """Where refined shards lie until all of them are whole."""
        return self.records / "refinement"

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Make the folder and keep other merges to the same output away from it."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.records.mkdir(exist_ok=True)
        except OSError as error:
            raise PoemergeError(
                f"Cannot write {self.folder}\n  got:      {error.strerror}\n  expected: a folder that can be written\n"
                "  next:     choose another --out"
            ) from error
        with exclusive(self.folder.parent / f".{self.out.name}.lock.partial", self._wait):
            self._mend()
            yield

    def _wait(self, holder: str) -> None:
        log.warning("waiting for process %s, which merges to %s as well", holder or "(unknown)", self.out)

    def _beside(self, kind: str) -> list[Path]:
        """Folders of this `kind` that merges to the same output have left beside it."""
        pattern = f".{glob.escape(self.out.name)}.{'[0-9a-f]' * 16}{kind}.partial"
        return list(self.folder.parent.glob(pattern))

    def _mend(self) -> None:
        """Finish what a publishing that was killed left half done."""
        for replaced in self._beside(".replaced"):
            if self.out.exists():
                shutil.rmtree(replaced, ignore_errors=True)
            else:  # killed between two renames: until the new merge comes, the earlier one is back
                replaced.rename(self.out.absolute())
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if json.loads((self.folder / "merge.json").read_text(encoding="utf-8")).get("key") != self.key:
                # An earlier merge that has traded places with ours, and was to be removed.
                for folder in (self.folder, self.records):
                    shutil.rmtree(folder)
                    folder.mkdir()

    def finished(self, shard: Shard, check: bool = True) -> dict[str, Any] | None:
        """The record of `shard` when it is there whole, else None (what is left of it is removed).

        `check` compares the file's digest with the record's: for what an earlier run left.
        """
        record, file = self.records / f"{shard.file}.json", self.folder / shard.file
        try:
            known: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
            if file.is_file() and (not check or file_digest(file) == known["sha256"]):
                return known
        except (OSError, ValueError, KeyError):
            pass
        for path in (record, file, *self.folder.glob(f"{file.name}.*.partial")):
            path.unlink(missing_ok=True)
        return None

    def record(self, shard: Shard, sha256: str, ledger: list[dict[str, Any]], device: str) -> None:
        """Note that `shard` is finished, and on which device."""
        note = {"sha256": sha256, "device": device, "ledger": ledger}
        self.write_text(self.records / f"{shard.file}.json", json.dumps(note, ensure_ascii=False))

    def record_refinement(self, digests: Mapping[str, str], moved: Mapping[str, float], note: dict[str, Any]) -> None:
        """Note that the shards in `refinement` are whole (sha256 by file), and give them their places.

        `moved` is, by parameter, how far it went; `note` is what merge.json says.
        """
        whole = {"digests": dict(digests), "moved": dict(moved), "note": note}
        self.write_text(self.records / "refinement.json", json.dumps(whole, ensure_ascii=False))
        self.refined()

    def refined(self) -> dict[str, Any] | None:
        """What merge.json says of the refinement once it is done, the refined shards in their places; None before."""
        try:
            whole = json.loads((self.records / "refinement.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        for file, digest in whole["digests"].items():
            record = self.records / f"{file}.json"
            known = json.loads(record.read_text(encoding="utf-8"))
            if known["sha256"] != digest:
                # Killed between these two, the next run finds the shard in its place and the record of the solved one.
                with contextlib.suppress(FileNotFoundError):
                    (self.refinement / file).replace(self.folder / file)
                ledger = [{**line, "refined": whole["moved"].get(line["name"])} for line in known["ledger"]]
                self.write_text(record, json.dumps({**known, "sha256": digest, "ledger": ledger}, ensure_ascii=False))
        note: dict[str, Any] = whole["note"]
        return note

    def unrefine(self) -> None:
        """Forget the refinement and the shards that it made: without one of them the others are of no use to it."""
        file = self.records / "refinement.json"
        for shard in json.loads(file.read_text(encoding="utf-8"))["digests"]:
            (self.records / f"{shard}.json").unlink(missing_ok=True)
        file.unlink()

    @staticmethod
    def write_text(path: Path, text: str) -> None:
        """Write a text file, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)

    def publish(self) -> None:
        """Give the finished folder the output's name; an earlier merge of that name goes, and so do stale stagings.

        The two trade names in one step where the file system can; else the name is empty between two renames, and a run
        killed just there is mended by the next one. Raises PoemergeError where the system refuses.
        """
        for left in self.folder.rglob("*.partial"):  # of a worker that was lost and whose work was done again
            left.unlink()
        try:
            self._rename()
        except OSError as error:
            raise PoemergeError(
                f"Cannot give the merge its name {self.out}\n  got:      {error.strerror}\n"
                f"  expected: a name that can be given\n  next:     the merge is whole in {self.folder}; start it again"
            ) from error
        for kind in ("", ".records", ".replaced"):
            for stale in self._beside(kind):
                shutil.rmtree(stale, ignore_errors=True)

    def _rename(self) -> None:
        replaced = self.folder.with_name(self.folder.name.removesuffix(".partial") + ".replaced.partial")
        if not self.out.exists():
            self.folder.rename(self.out.absolute())
        elif exchange(self.folder, self.out.absolute()):
            self.folder.rename(replaced)
        else:
            self.out.rename(replaced)
            self.folder.rename(self.out.absolute())
