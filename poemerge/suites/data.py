"""A suite's examples as they lie in its folder: jsonl, csv or parquet by split, and labels.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poemerge.suites.protocol import SuiteSpec

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["class_indices", "description", "read_split"]

_READERS = (".jsonl", ".csv", ".parquet")
_ORDER_SEED = 0


def read_split(spec: SuiteSpec, columns: tuple[str, ...] = ()) -> pd.DataFrame:
    """The rows of the suite's split: SPLIT.jsonl, .csv or .parquet, or shards SPLIT-00000-of-….parquet, at any depth.

    With `max_examples`, that many of them, drawn once and for all and kept in their order, so that sorted files give no
    sample of one class. Raises SuiteError when there is no such file, no row, or a column of `columns` is missing.
    """
    import numpy as np
    import pandas as pd

    folder, split = _folder(spec), spec.settings.split
    files = [
        path
        for path in sorted(folder.rglob(f"{split}*"))
        if path.suffix in _READERS and path.name.split(".")[0].split("-")[0] == split
    ]
    if not files:
        here = ", ".join(sorted(path.name for path in folder.rglob("*") if path.suffix in _READERS)) or "no such file"
        raise spec.error(
            f"split {split!r}",
            got=f"{here} in {folder}",
            expected=f"{split}.jsonl, {split}.csv or {split}.parquet",
            next_step="name a split that is there, or mend `data` of the suite",
        )
    rows = pd.concat([_read(path) for path in files], ignore_index=True)
    missing = [name for name in columns if name not in rows.columns]
    if missing or rows.empty:
        raise spec.error(
            f"split {split!r}",
            got=f"{len(rows)} rows with the columns {', '.join(map(str, rows.columns))}",
            expected=f"at least one row with the columns {', '.join(columns)}",
            next_step="name the columns in the suite's options",
        )
    limit = spec.settings.max_examples
    if limit is not None and limit < len(rows):
        drawn = np.random.default_rng(_ORDER_SEED).permutation(len(rows))[:limit]
        rows = rows.iloc[np.sort(drawn)].reset_index(drop=True)
    return rows


def _folder(spec: SuiteSpec) -> Path:
    if spec.data is None or not spec.data.is_dir():
        raise spec.error(
            "data",
            got="no folder" if spec.data is None else f"{spec.data}, which is not there",
            expected="a folder with one file a split",
            next_step="set `data` of the suite, and run fetch",
        )
    return spec.data


def _read(path: Path) -> pd.DataFrame:
    import pandas as pd

    if path.suffix == ".parquet":
        return pd.read_parquet(path)
    if path.suffix == ".csv":
        return pd.read_csv(path, keep_default_na=False)
    # Not splitlines(): texts may hold the Unicode line separators that it would break at.
    lines = path.read_text(encoding="utf-8").split("\n")
    return pd.DataFrame([json.loads(line) for line in lines if line])


def description(spec: SuiteSpec) -> dict[str, Any]:
    """labels.json of the suite's folder: a list of class names (given as {"labels": …}) or a mapping; {} without one.

    Parquet of the hub carries its class names in its own schema; those are used where labels.json is not there.
    """
    folder = _folder(spec)
    path = folder / "labels.json"
    if not path.is_file():
        names = _hub_labels(folder, str(spec.settings.options.get("label", "label")))
        return {"labels": names} if names else {}
    content = json.loads(path.read_text(encoding="utf-8"))
    return {"labels": content} if isinstance(content, list) else dict(content)


def _hub_labels(folder: Path, column: str) -> list[str]:
    import pyarrow.parquet as pq

    for path in sorted(folder.rglob("*.parquet"))[:1]:
        metadata = pq.read_schema(path).metadata or {}
        features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        return list(features.get(column, {}).get("names", []))
    return []


def class_indices(spec: SuiteSpec, labels: Any, names: list[str]) -> Any:
    """`labels` as integers `[example]`: they are taken as they are, class names by their place in `names`.

    Raises SuiteError on a label that is neither.
    """
    import numpy as np

    index = {name: number for number, name in enumerate(names)}
    values = [index.get(label) if isinstance(label, str) else label for label in labels]
    bad = [
        label
        for label, value in zip(labels, values, strict=True)
        if value is None or int(value) != value or value < 0 or (names and value >= len(names))
    ]
    if bad:
        raise spec.error(
            "labels",
            got=f"{bad[0]!r} ({len(bad)} such rows)",
            expected=f"one of {', '.join(names[:20])}" if names else "integers from 0",
            next_step="check labels.json and the column `label`",
        )
    return np.asarray(values, dtype=np.int64)
