"""Which models meet on a project's suites: the base, each suite's expert, the merged model, other methods' merges."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from poemerge.checkpoints import file_digest, folder_digest
from poemerge.errors import ProjectError
from poemerge.merging import Selection, merge
from poemerge.params import BaselineName, MergeParams, SuiteParams
from poemerge.project import Project
from poemerge.suites.evaluation import Contender, OpenSuite, load_suites
from poemerge.suites.protocol import Model, SuiteSpec
from poemerge.suites.store import score_key

__all__ = ["Field", "open_suites"]

log = logging.getLogger(__name__)

_SHARED = {
    "include", "exclude", "device", "dtype", "max_memory", "max_shard_size", "engine", "dask_address", "seed"
}  # fmt: skip
"""Settings that a baseline takes from ours: what is merged, in which precision, and how."""


def open_suites(project: Project, suites: Mapping[str, SuiteParams], split: str | None = None) -> list[OpenSuite]:
    """The project's suites, loaded and checked, on their own splits or all on `split`.

    A suite belongs to the expert that its settings name, else to the one of its own name, else to none (its scores then
    have no expert's beside them). Raises BadSuitesError that lists what is wrong with each.
    """
    experts = project.expert_folders()
    specs = []
    for name, settings in suites.items():
        chosen = settings if split is None else settings.model_copy(update={"split": split})
        data = project.suite(name)
        specs.append(SuiteSpec(name, chosen, data if data.is_dir() else None))

    def expert_of(spec: SuiteSpec) -> str | None:
        wanted = spec.settings.expert or spec.name
        return wanted if wanted in experts else None

    return load_suites(specs, expert_of, _digest_of)


def _digest_of(folder: Path) -> str:
    """The digest that fetching recorded for `folder`, else one that is made now."""
    try:
        recorded = json.loads((folder / "source.json").read_text(encoding="utf-8")).get("digest")
    except (OSError, ValueError):
        recorded = None
    return str(recorded) if recorded else folder_digest(folder)


@functools.cache
def _code_digest() -> str:
    """Of the code that merges: scores of merges made by other code are not taken again."""
    package = Path(__file__).parent
    files = sorted(path for room in ("numerics", "merging") for path in (package / room).rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


@dataclass(frozen=True)
class Field:
    """The models of one evaluation; heads (the tasks' private parameters) are those that a merge kept, in `heads`.

    The base and a merged model are scored with each task's own head; an expert with the same one, which is its own.
    """

    project: Project
    heads: Path

    @staticmethod
    def of(project: Project) -> Field:
        """The field of a project that has been merged; raises ProjectError where it has not."""
        if not project.merge_json.is_file():
            raise ProjectError(
                f"Nothing merged yet.\n  got:      no {project.merge_json}\n  expected: what the merge stage makes\n"
                "  next:     poemerge run"
            )
        return Field(project, project.merged / "heads")

    def base(self) -> Contender:
        """The base model, with the head of each suite's expert."""
        digest = _digest_of(self.project.base)
        return self._folder("base", digest, lambda suite: self._model("base", self.project.base, suite))

    def expert(self) -> Contender:
        """Each suite's own expert; it takes no part in suites that have none."""
        base = _digest_of(self.project.base)
        digests = {name: _digest_of(folder) for name, folder in self.project.expert_folders().items()}

        def digest(suite: OpenSuite) -> str | None:
            return (
                None if suite.expert is None else self._key(score_key(base=base, expert=digests[suite.expert]), suite)
            )

        def model(suite: OpenSuite) -> Model:
            assert suite.expert is not None
            return self._model("expert", self.project.expert(suite.expert), suite)

        return Contender("expert", digest, lambda: _ready(model))

    def merged(self, name: str = "merged", folder: Path | None = None) -> Contender:
        """The project's merged model, or another Hugging Face folder of the same architecture."""
        folder = folder or self.project.merged
        record = folder / "merge.json"
        digest = json.loads(record.read_text(encoding="utf-8"))["digest"] if record.is_file() else folder_digest(folder)
        return self._folder(name, str(digest), lambda suite: self._model(name, folder, suite))

    def merging(self, name: str, params: MergeParams, selection: Selection | None = None) -> Contender:
        """A merge with other settings, made in a temporary folder, and only when a score of it is not kept already."""
        experts = self.project.expert_folders()
        digest = score_key(
            base=_digest_of(self.project.base),
            experts={expert: _digest_of(folder) for expert, folder in experts.items()},
            params=params.model_dump(mode="json", exclude={"max_memory", "max_shard_size", "engine", "dask_address"}),
            selection=repr(selection),
            code=_code_digest(),
        )

        @contextmanager
        def ready() -> Iterator[Callable[[OpenSuite], Model]]:
            self.project.state.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix="merge-", dir=self.project.state) as scratch:
                folder = Path(scratch) / "model"
                log.info("merging %s, to be scored", name)
                merge(self.project.base, experts, folder, params, selection)
                yield lambda suite: self._model(name, folder, suite)

        return Contender(name, lambda suite: self._key(digest, suite), ready)

    def baseline(self, method: BaselineName, params: MergeParams) -> Contender:
        """The merge by another method at that method's own settings; which parameters are merged, and how the work is
        carried out, is as in `params`."""
        shared = params.model_dump(include=_SHARED & params.model_fields_set)
        return self.merging(method, MergeParams.model_validate({**shared, "method": method}))

    def _folder(self, name: str, digest: str, model: Callable[[OpenSuite], Model]) -> Contender:
        return Contender(name, lambda suite: self._key(digest, suite), lambda: _ready(model))

    def _model(self, name: str, folder: Path, suite: OpenSuite) -> Model:
        expert = self.project.expert(suite.expert) if suite.expert is not None else None
        config = expert if expert is not None and (expert / "config.json").is_file() else None
        return Model(name, folder, self.project.base, self._head(suite), config)

    def _head(self, suite: OpenSuite) -> Path | None:
        """The head file: what params.yaml names (in the suite's data, or in the project), else the expert's own."""
        named = suite.spec.settings.head
        places: Iterable[Path]
        if named is not None:
            places = [folder / named for folder in (suite.spec.data, self.project.root) if folder is not None]
        else:
            places = [self.heads / f"{suite.expert}.safetensors"]
        found = next((path for path in places if path.is_file()), None)
        if found is None and named is not None:
            raise suite.spec.error(
                "head",
                got=f"{named}, which is neither in the suite's data nor in the project",
                expected="a safetensors file",
                next_step="mend `head`, or leave it out to use the expert's own",
            )
        return found

    def _key(self, digest: str, suite: OpenSuite) -> str:
        head = self._head(suite)
        return score_key(weights=digest, head=file_digest(head) if head is not None else None)


@contextmanager
def _ready(model: Callable[[OpenSuite], Model]) -> Iterator[Callable[[OpenSuite], Model]]:
    yield model
