"""params.yaml: typos, wrong values and doubled keys are told, all at once and with their lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from poemerge.errors import ParamsError
from poemerge.params import Params, parse_bytes
from poemerge.params_file import load_params

GOOD = """
base: {source: zoo/base}
experts:
  reuters: {source: zoo/experts/reuters}
merge:
  scale_factor: 0.1
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "params.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_reads_the_sections_and_fills_in_defaults(tmp_path: Path) -> None:
    params = load_params(write(tmp_path, GOOD))
    assert params.base.source == "zoo/base"
    assert list(params.experts) == ["reuters"]
    assert params.merge.scale_factor == 0.1
    assert params.register_.approval == "none"


def test_the_projects_own_params_yaml_is_valid() -> None:
    assert load_params(Path(__file__).parents[1] / "params.yaml").experts


def test_params_are_frozen(tmp_path: Path) -> None:
    params = load_params(write(tmp_path, GOOD))
    with pytest.raises(ValidationError, match="frozen"):
        params.merge.scale_factor = 2.0  # type: ignore[misc]


def test_every_problem_is_listed_with_its_line_and_the_nearest_key(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """base: {source: zoo/base}
experts:
  reuters: {source: zoo/experts/reuters, revison: main}
merge:
  scale_facter: 0.1
  side: left
  prior_precision: -1
  overrides:
    "*.mlp.*": {coeficient: 0.3}
evaluate:
  suites:
    movies: {expert: movie}
""",
    )
    with pytest.raises(ParamsError) as caught:
        load_params(path)
    message = str(caught.value)
    assert len(caught.value.problems) == 6
    assert caught.value.exit_status == 2
    assert "params.yaml:3 experts.reuters.revison" in message
    assert "did you mean 'revision'?" in message
    assert "params.yaml:5 merge.scale_facter" in message
    assert "did you mean 'scale_factor'?" in message
    assert "params.yaml:6 merge.side" in message
    assert "'left'" in message
    assert "params.yaml:7 merge.prior_precision" in message
    assert "params.yaml:9 merge.overrides.*.mlp.*.coeficient" in message
    assert "did you mean 'coefficient'?" in message
    assert "params.yaml:12 evaluate.suites.movies.expert" in message


def test_a_section_of_register_is_known_by_its_name_in_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD + "register: {modle: sentences}\n")
    with pytest.raises(ParamsError, match="did you mean 'model'"):
        load_params(path)


def test_an_expert_named_twice_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "base: {source: b}\nexperts:\n  a: {source: x}\n  a: {source: y}\n")
    with pytest.raises(ParamsError, match="'a' stands twice, first on line 3"):
        load_params(path)


@pytest.mark.parametrize("text", ["", "- a list", "base: [", "base: {source: b}\n"])
def test_files_that_are_no_params_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ParamsError, match="expected"):
        load_params(write(tmp_path, text))


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match=r"nothing\.yaml"):
        load_params(tmp_path / "nothing.yaml")


@pytest.mark.parametrize("name", ["../escape", "a/b", "", ".hidden", "x" * 101])
def test_names_that_cannot_be_file_names_are_refused(name: str) -> None:
    with pytest.raises(ValidationError):
        Params.model_validate({"base": {"source": "b"}, "experts": {name: {"source": "x"}}})


def test_student_t_needs_its_tail_index() -> None:
    base = {"base": {"source": "b"}, "experts": {"a": {"source": "x"}}}
    with pytest.raises(ValidationError, match="needs a tail_index"):
        Params.model_validate({**base, "expert": {"family": "student_t"}})
    with pytest.raises(ValidationError, match="belongs to family student_t"):
        Params.model_validate({**base, "expert": {"family": "cauchy", "tail_index": 2.0}})
    with pytest.raises(ValidationError, match="paper-t5 has Cauchy experts"):
        Params.model_validate({**base, "expert": {"family": "gaussian"}, "merge": {"preset": "paper-t5"}})


@pytest.mark.parametrize(("text", "count"), [("8GB", 8 * 10**9), ("500MiB", 500 * 2**20), (1000, 1000), ("1e9", 10**9)])
def test_amounts_of_memory(text: int | str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["8 parsecs", "", "-1GB", "0", "1e400GB"])
def test_amounts_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"no amount|not positive|any number"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"register": {"gates": {"max_size": "huge"}}}, "no amount of memory"),
        ({"schedule": {"timezone": "Mars/Olympus"}}, "no time zone"),
    ],
)
def test_settings_of_the_last_stages_are_checked_with_the_others(section: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Params.model_validate({"base": {"source": "b"}, "experts": {"a": {"source": "x"}}, **section})


def test_a_key_that_is_a_list_is_told(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("base: {source: b}\n? [a, b]\n: 1\n")
    with pytest.raises(ParamsError, match=r"a key that is no word[^$]*line 2"):
        load_params(tmp_path / "params.yaml")


def test_yaml_may_take_up_a_mapping(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(
        "base: {source: b}\nexperts:\n  a: &a {source: x, license: mit}\n  c: {<<: *a, source: y}\n"
    )
    params = load_params(tmp_path / "params.yaml")
    assert (params.experts["c"].source, params.experts["c"].license) == ("y", "mit")
