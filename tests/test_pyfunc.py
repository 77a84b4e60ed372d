"""The registered model answers with mlflow, torch, transformers and safetensors alone, and as the suites scored it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from poemerge.project import Project
from poemerge.registry.model import MergedModel
from poemerge.registry.record import record
from poemerge.registry.tracking import connect
from tests.registry_project import copied
from tests.tiny import make_base


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = copied(tmp_path_factory.mktemp("pyfunc") / "project")
    record(connect(project), project, project.load_params())
    return project


def test_it_answers_as_the_suites_scored_it(project: Project) -> None:
    connect(project)
    model = mlflow.pyfunc.load_model("models:/tiny@candidate")
    evaluation = json.loads(project.evaluation_json.read_text())
    for task in ("a", "b"):
        rows = [json.loads(line) for line in (project.suite(task) / "test.jsonl").read_text().splitlines()]
        texts = [row["text"] for row in rows]
        answers = model.predict(texts, params={"task": task})
        path = project.root / evaluation["suites"][task]["predictions"]["merged"]
        scored = pq.ParquetFile(path.open("rb")).read().to_pandas()
        assert answers["label"].tolist() == [f"class{index}" for index in scored["predicted"]]
        np.testing.assert_allclose(answers["score"], scored["confidence"], rtol=1e-4)
        framed = model.predict(pd.DataFrame({"text": texts}), params={"task": task})
        pd.testing.assert_frame_equal(framed, answers)


def test_an_unknown_task_is_told_with_those_there_are(project: Project) -> None:
    connect(project)
    model = mlflow.pyfunc.load_model("models:/tiny@candidate")
    with pytest.raises(Exception, match=r"got 'c'; this model has: a, b"):
        model.predict(["w01"], params={"task": "c"})
    with pytest.raises(Exception, match="this model has: a, b"):
        model.predict(["w01"])


def test_the_consumer_needs_nothing_of_poemerge(project: Project, tmp_path: Path) -> None:
    """In a process that cannot import poemerge, prefect or dvc, as in the environment that requirements.txt makes."""
    script = tmp_path / "consumer.py"
    script.write_text(
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.split('.')[0] in {'poemerge', 'prefect', 'dvc', 'tasks', 'flows', 'huggingface_cli'}:\n"
        "            raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "import mlflow\n"
        f"mlflow.set_tracking_uri('sqlite:///{project.mlflow_db}')\n"
        "model = mlflow.pyfunc.load_model('models:/tiny@candidate')\n"
        "print(model.predict(['w01 w02'], params={'task': 'a'})['label'][0])\n"
        "assert not {name.split('.')[0] for name in sys.modules} & {'poemerge', 'prefect', 'dvc'}\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in {"class0", "class1", "class2"}


def test_a_classifier_of_its_own_architecture_is_served(tmp_path: Path) -> None:
    """classifier.weight and classifier.bias are put into the architecture's own sequence classification model."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = make_base(tmp_path / "merged")
    torch.manual_seed(0)
    whole = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=5).eval()
    private = {name: value for name, value in whole.state_dict().items() if name.startswith("classifier.")}
    (folder / "heads").mkdir()
    save_file(private, folder / "heads" / "topic.safetensors")
    (tmp_path / "tasks.json").write_text(json.dumps({"topic": {"labels": list("abcde")}}))

    class Context:
        artifacts = {"merged": str(folder), "tasks": str(tmp_path / "tasks.json")}  # noqa: RUF012

    served = MergedModel()
    served.load_context(Context())
    texts = ["w01 w02 w03", "w40 w50 w60 w70", "w89"]
    answers = served.predict(Context(), texts)
    tokens = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        scores, classes = whole(**tokens).logits.softmax(-1).max(-1)
    assert answers["label"].tolist() == ["abcde"[index] for index in classes]
    np.testing.assert_allclose(answers["score"], scores, rtol=1e-5)
