"""params.yaml as a file: read, and every mistake told with its line."""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from poemerge.errors import ParamsError, Problem
from poemerge.params import Params

__all__ = ["load_params"]


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys in silence; an expert named twice must be told."""


def _mapping_without_duplicates(loader: _UniqueKeyLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":  # << takes up another mapping's keys, which ours go before
            continue
        key = loader.construct_object(key_node)
        if not isinstance(key, Hashable):
            raise yaml.constructor.ConstructorError(None, None, "a key that is no word", key_node.start_mark)
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {key!r} stands twice, first on line {seen[key]}", key_node.start_mark
            )
        seen[key] = key_node.start_mark.line + 1
    return loader.construct_mapping(node, deep=True)


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_duplicates)


def load_params(path: Path) -> Params:
    """Params read from the YAML file `path`.

    Raises ParamsError listing every problem: YAML that does not parse, keys that stand twice, unknown keys with the
    nearest known one, values of the wrong type or outside their range, suites of experts that do not exist.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ParamsError(
            Problem(
                str(path),
                got=str(error),
                expected="a readable UTF-8 YAML file",
                next_step="check the path and its rights",
            )
        ) from error
    try:
        raw = yaml.load(text, Loader=_UniqueKeyLoader)  # noqa: S506 - a SafeLoader
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ParamsError(
            Problem(str(path), got=" ".join(str(error).split()), expected="valid YAML", next_step="mend that line")
        ) from error
    if not isinstance(raw, dict):
        raise ParamsError(
            Problem(
                str(path),
                got=type(raw).__name__,
                expected="a mapping with at least `base` and `experts`",
                next_step="see the params.yaml of a fresh clone",
            )
        )
    problems: list[Problem] = []
    params: Params | None = None
    try:
        params = Params.model_validate(raw)
    except ValidationError as error:
        problems += [_problem(path, root, detail) for detail in error.errors()]
    problems += _dangling_names(path, root, raw)
    if problems or params is None:
        raise ParamsError(problems)
    return params


def _dangling_names(path: Path, root: yaml.Node | None, raw: dict[str, Any]) -> Iterator[Problem]:
    """Suites that name an expert which params.yaml does not have (members of collections are known only later)."""
    experts, evaluate = raw.get("experts"), raw.get("evaluate")
    if not isinstance(experts, dict) or not isinstance(evaluate, dict) or raw.get("collections"):
        return
    suites = evaluate.get("suites")
    for name, suite in suites.items() if isinstance(suites, dict) else ():
        wanted = (suite or {}).get("expert") if isinstance(suite, dict) else None
        if wanted is not None and wanted not in experts:
            yield Problem(
                _where(path, root, ("evaluate", "suites", name, "expert")),
                got=str(wanted),
                expected=f"one of the experts: {', '.join(map(str, experts))}",
                next_step=_nearest(str(wanted), [str(e) for e in experts]),
                expert=str(wanted),
            )


def _problem(path: Path, root: yaml.Node | None, detail: Any) -> Problem:
    location: tuple[Any, ...] = detail["loc"]
    where = _where(path, root, location)
    if detail["type"] == "extra_forbidden":
        known = _keys_at(location[:-1])
        return Problem(
            where,
            got=f"unknown key {str(location[-1])!r}",
            expected=f"one of: {', '.join(known)}",
            next_step=_nearest(str(location[-1]), known),
        )
    if detail["type"] == "missing":
        return Problem(where, got="nothing", expected="a value", next_step=f"add the key {location[-1]!r}")
    return Problem(
        where,
        got=_short(detail["input"]),
        expected=detail["msg"].removeprefix("Value error, "),
        next_step="mend the value",
        expert=str(location[1]) if len(location) > 1 and location[0] == "experts" else None,
    )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}…"


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else "remove it or choose one of those"


def _keys_at(location: tuple[Any, ...]) -> list[str]:
    """The keys that the section at `location` knows, by walking the models' annotations."""
    model: Any = Params
    for step in location:
        if isinstance(model, type) and issubclass(model, BaseModel):
            fields = {field.alias or name: field for name, field in model.model_fields.items()}
            if str(step) not in fields:
                return []
            model = fields[str(step)].annotation
        else:
            model = get_args(model)[-1]  # Mapping[key, value]: one step down is the value
        model = (
            next((part for part in get_args(model) if isinstance(part, type) and issubclass(part, BaseModel)), model)
            if (get_args(model) and type(None) in get_args(model))
            else model
        )
    if isinstance(model, type) and issubclass(model, BaseModel):
        return [field.alias or name for name, field in model.model_fields.items()]
    return []


def _where(path: Path, root: yaml.Node | None, location: tuple[Any, ...]) -> str:
    """`params.yaml:12 merge.scale_factor`: the line is that of the nearest key that the file has."""
    node, line = root, 1
    for step in location:
        if isinstance(node, yaml.MappingNode):
            for key_node, value_node in node.value:
                if key_node.value == str(step):
                    line, node = key_node.start_mark.line + 1, value_node
                    break
            else:
                break
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            node = node.value[step]
            line = node.start_mark.line + 1
        else:
            break
    return f"{path.name}:{line} {'.'.join(str(step) for step in location) or '(whole file)'}"
