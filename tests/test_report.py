"""The report: what it says, that it escapes and is whole in itself, and that a browser shows it without complaint."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from poemerge.errors import ProjectError
from poemerge.params import Params, SuiteParams
from poemerge.project import Project
from poemerge.report.bars import draw_bars
from poemerge.report.heatmap import diverging
from poemerge.report.html import Safe, esc
from poemerge.report.write import write_report
from poemerge.suites.evaluation import OpenSuite
from poemerge.suites.protocol import SuiteSpec
from poemerge.suites.scores import METRICS
from poemerge.suites.store import Scored, ScoreStore
from poemerge.suites.summary import summarise

EVIL = "<script>alert('x')</script>&\"quoted\""
PARAMS = Params.model_validate({"base": {"source": "b"}, "experts": {"a": {"source": "a"}}})


class _Kind:
    metric = METRICS["accuracy"]
    version = 1


def evaluation_of(root: Path) -> dict[str, Any]:
    """A summary of drawn predictions: the merged model better than the mean, worse than the experts."""
    rng = np.random.default_rng(0)
    suites, results = [], {}
    right = {"merged": 0.85, "base": 0.5, "expert": 0.9, "mean": 0.7}
    for name in ("alpha", "beta"):
        suite = OpenSuite(SuiteSpec(name, SuiteParams()), _Kind(), 200, name, "d" * 64)
        target = rng.integers(0, 3, 200)
        row = {}
        for who, share in right.items():
            predicted = np.where(rng.random(200) < share, target, (target + 1) % 3)
            columns = {"target": target, "predicted": predicted}
            row[who] = (Scored(who, {"accuracy": METRICS["accuracy"](columns)}, 200, 0.1), columns)
        suites.append(suite)
        results[name] = row
    summary = summarise(suites, results, ScoreStore(root / "artifacts/scores"), root, samples=200, seed=0)
    return summary | {"runtime": {"device": "cpu", "dtype": "torch.float32"}, "seconds": 1.0}


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """What the stages leave, small, with a hostile text wherever a person or a source may have written one."""
    project = Project(tmp_path)

    def write(path: Path, content: Any) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))

    origin = {"source": EVIL, "revision": "r" * 40, "digest": "d" * 64, "license": EVIL}
    names = [f"encoder.layer.{i}.attention.self.{part}.weight" for i in (0, 1) for part in ("query", "key")]
    write(
        project.merge_json,
        {
            "method": "poe",
            "settings": {"side": "both", "scale": "gram-norm", "scale_factor": 0.1, "prior": "relative"},
            "selection": {"model": {"family": "student_t", "tail_index": 3.5}, "groups": {}},
            "base": origin,
            "experts": {"alpha": origin, EVIL: origin},
            "rules": {"merged": names, "averaged": [EVIL], "left_at_base": [], "private": {EVIL: ["head.weight"]}},
            "digest": "m" * 64,
            "device": "cpu",
            "dtype": "float32",
            "versions": {"torch": "2"},
        },
    )
    weights = (
        {"alpha": 0.95, EVIL: 0.05},
        {"alpha": 0.5, EVIL: 0.5},
        {"alpha": 0.4, EVIL: 0.6},
        {"alpha": 0.3, EVIL: 0.7},
    )
    ledger = [
        {"name": name, "weights": w, "steps": 5, "energy_first": 2.0, "energy_last": 1.5, "outcome": "converged"}
        for name, w in zip(names, weights, strict=True)
    ]
    write(project.ledger, "".join(json.dumps(line) + "\n" for line in ledger))
    write(project.evaluation_json, evaluation_of(tmp_path))
    gates = [{"name": "mean", "verdict": "pass", "figures": {}, "reason": EVIL}]
    registration = {"model": "demo", "version": 2, "digest": "m" * 64, "aliases": ["champion"], "run_id": "r1",
                    "gates": gates, "promoted": True, "champion_before": 1}  # fmt: skip
    write(project.registration_json, registration)
    expert = {"kind": "full", "norm": 1.0, "relative_norm": 0.01, "density": 0.5, "private": ["head.weight"]}
    cosine = {"experts": ["alpha", EVIL], "whole": [[1.0, -0.2], [-0.2, 1.0]], "groups": {}}
    write(
        project.task_vectors_manifest,
        {"experts": {"alpha": expert, EVIL: expert}, "cosine": cosine, "warnings": [EVIL]},
    )
    fit = {
        "best": {"family": "student_t"},
        "fits": {"student_t": {"parameters": {"tail_index": 3.5}, "ks": 0.01}},
        "hill": {"chosen": 0, "tail_index": [3.4], "low": [3.1], "high": [3.7]},
        "entries": 1000,
    }
    write(project.tail_json, {"model": {"pooled": fit}, "groups": {"attention query": {"pooled": None}}})
    write(project.expert_json, {"family": "student_t", "tail_index": 3.5, "reason": EVIL})
    draw_bars(json.loads(project.evaluation_json.read_text()), project.residuals_png)
    write(project.params_yaml, f"base: {{source: b}}  # {EVIL}\n")
    write(project.stage_seconds, {"merge": 12.5})
    write(project.stage_memory, {"merge": 345_000_000})
    write(project.stage_report("merge"), {"headline": EVIL, "table": [], "figure": None, "warnings": []})
    return project


class _Reader(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "link", "img"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_page_says_the_verdict_first_and_has_every_section(project: Project) -> None:
    page = write_report(project, PARAMS).read_text()
    read = _Reader(page)
    assert not read.open, "every tag is closed"
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings == [
        "Scores", "Gates", "Who was outvoted where", "Tails of the residuals", "Task vectors", "What was merged",
        "Lineage", "Time and memory", "Make it again",
    ]  # fmt: skip
    assert page.index("Version 2 became champion, in place of version 1") < page.index("<h2>")
    evaluation = json.loads(project.evaluation_json.read_text())
    text = " ".join(read.text)
    for figure in (evaluation["mean"]["merged"], evaluation["mean"]["normalised"], evaluation["mean"]["expert"]):
        assert f"{100 * figure:.1f}" in text
    assert "poemerge replay 2" in text
    assert "12.5 s" in text
    assert "345 MB" in text
    assert "0.10 of an equal share" in page, "0.05 of two experts: a tenth of an equal share"


def test_nothing_that_others_wrote_becomes_markup(project: Project) -> None:
    page = write_report(project, PARAMS).read_text()
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 10
    assert esc(EVIL) == "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;&amp;&quot;quoted&quot;"
    assert esc(Safe("<b>")) == "<b>"


def test_page_needs_nothing_from_anywhere(project: Project) -> None:
    read = _Reader(write_report(project, PARAMS).read_text())
    for tag, attributes in read.tags:
        assert tag not in {"script", "iframe", "object", "audio", "video"}
        for name in ("src", "href", "xlink:href"):
            target = attributes.get(name) or "#"
            assert target.startswith(("#", "data:")), (tag, target)
    identities = [attributes["id"] for _, attributes in read.tags if attributes.get("id")]
    assert len(identities) == len(set(identities)), "figures share the page without sharing ids"


def test_figures_have_text_alternatives(project: Project) -> None:
    page = write_report(project, PARAMS).read_text()
    read = _Reader(page)
    shown = [attributes for tag, attributes in read.tags if tag == "svg" and "aria-hidden" not in attributes]
    assert len(shown) >= 4
    identities = {attributes.get("id") for _, attributes in read.tags}
    for attributes in shown:
        assert attributes["role"] == "img"
        assert set(str(attributes["aria-labelledby"]).split()) <= identities
    assert all(attributes["alt"] for tag, attributes in read.tags if tag == "img")


def test_page_is_written_from_what_there_is(project: Project) -> None:
    for path in (project.evaluation_json, project.registration_json, project.tail_json, project.task_vectors_manifest,
                 project.ledger):  # fmt: skip
        path.unlink()
    page = write_report(project, PARAMS).read_text()
    assert "Merged; not scored yet" in page
    project.merge_json.unlink()
    with pytest.raises(ProjectError, match="poemerge run"):
        write_report(project, PARAMS)


def test_registration_of_an_earlier_merge_is_not_shown(project: Project) -> None:
    registration = json.loads(project.registration_json.read_text())
    project.registration_json.write_text(json.dumps(registration | {"digest": "another"}))
    assert "not registered yet" in write_report(project, PARAMS).read_text()


def test_command_writes_it(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from poemerge.cli.main import main

    project.params_yaml.write_text("base: {source: b}\nexperts: {alpha: {source: a}}\nregister: {model: wren}\n")
    (project.root / "dvc.yaml").write_text("stages: {}\n")
    monkeypatch.chdir(project.root)
    assert main(["report"]) == 0
    page = project.root / ".poemerge" / "report" / "index.html"
    assert f"Report: {page}\n" in capsys.readouterr().out
    assert "wren" in page.read_text()
    assert not project.report_html.exists(), "an output of the stage `register`, which would count as changed"


@pytest.mark.parametrize("value", np.linspace(-1, 1, 21).tolist())
def test_text_on_every_cell_is_legible(value: float) -> None:
    """WCAG's contrast of at least 4.5 between a cell and the text on it."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    low, high = sorted(map(luminance, diverging(value)))
    assert (high + 0.05) / (low + 0.05) >= 4.5


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--enable-logging=stderr", "--v=0",
]  # fmt: skip


def browse(page: Path, folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """What headless Chromium prints when it shows `page`, with a fresh profile and no way to any other host."""
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={folder / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND"]
    return subprocess.run(
        [*command, *flags, page.as_uri()], capture_output=True, text=True, timeout=240, check=True, cwd=folder
    )


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
def test_browser_shows_it_without_complaint(project: Project, tmp_path: Path) -> None:
    from PIL import Image

    page = write_report(project, PARAMS)
    shown = browse(page, tmp_path, "--dump-dom", f"--log-net-log={tmp_path / 'net.json'}")
    assert "Version 2 became champion" in shown.stdout
    assert "CONSOLE" not in shown.stderr, "no message on the console, so no error and no request refused"
    log = (tmp_path / "net.json").read_text()
    asked = set(re.findall(r'"url":"(https?://[^"]+)"', log))
    assert not [url for url in asked if "google" not in url and "gvt1" not in url], "the page asks for nothing"

    sizes = {
        "light": ("1200,3000",),
        "dark": ("1200,3000", "--blink-settings=preferredColorScheme=0"),
        "phone": ("500,3000",),
    }
    pictures = {}
    for name, (size, *flags) in sizes.items():
        picture = tmp_path / f"{name}.png"
        browse(page, tmp_path, f"--window-size={size}", f"--screenshot={picture}", *flags)
        pictures[name] = np.asarray(Image.open(picture).convert("L"), dtype=float)
    assert pictures["light"][0, 0] == 255
    assert pictures["dark"][0, 0] < 40
    for picture in pictures.values():
        assert picture.std() > 10, "something is drawn"
    # Dark ink on the dark page would leave the figure's axis text out of the picture.
    assert (pictures["dark"] > 180).mean() > 0.004
