"""The winner of a sweep, written into params.yaml; comments and everything else in it stay as they are."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

from poemerge.params_file import load_params
from poemerge.search.space import DEFAULT_TAIL_INDEX, Point

__all__ = ["write_back"]


def write_back(path: Path, point: Point, tail_index: float | None) -> None:
    """Put `point` under `merge` and `expert` of the file at `path`; a coefficient that it lacks is removed there.

    The new file is read as params.yaml before it takes the old one's place: raises ParamsError, and changes nothing, if
    it would not be one.
    """
    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 4096
    text = path.read_text(encoding="utf-8")
    if "coefficient" not in point:
        text = _without_coefficient(text, yaml.load(text))
    content = yaml.load(text)
    if not content.get("merge"):
        content["merge"] = {}
    merge = content["merge"]
    if "coefficient" not in point:
        merge.pop("coefficient", None)
    for name, value in point.items():
        if name != "family":
            merge[name] = value
    if "family" in point:
        expert = content.setdefault("expert", {})
        expert["family"] = point["family"]
        expert.pop("tail_index", None)
        if point["family"] == "student_t":
            expert["tail_index"] = float(f"{tail_index or DEFAULT_TAIL_INDEX:.4g}")
    stream = io.StringIO()
    yaml.dump(content, stream)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(stream.getvalue(), encoding="utf-8")
    try:
        load_params(partial)
    except BaseException:
        partial.unlink()
        raise
    partial.replace(path)


def _without_coefficient(text: str, content: Any) -> str:
    """`text` without the line of merge.coefficient, where it has one of its own: ruamel's removal of a key takes the
    comments of the next one with it."""
    merge = content.get("merge")
    if not merge or "coefficient" not in merge:
        return text
    lines = text.splitlines(keepends=True)
    line = merge.lc.key("coefficient")[0]
    if re.match(r"\s*[\"']?coefficient[\"']?\s*:", lines[line]):
        del lines[line]
    return "".join(lines)
