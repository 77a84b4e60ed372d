"""Kinds of suites: each scores a real small model, and the numbers are those of an independent computation."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from poemerge.errors import SuiteError
from poemerge.params import SuiteParams
from poemerge.params_file import load_params
from poemerge.suites.data import read_split
from poemerge.suites.protocol import Model, SuiteSpec, kinds, open_suite
from poemerge.suites.runtime import Runtime
from tests.tiny import WORDS

FLOAT32 = Runtime(torch.device("cpu"), torch.float32, batch_size=3)
SIZE = 16


def word_tokenizer(folder: Path, end: str = "[SEP]", appended: bool = True) -> None:
    """A tokenizer of one token a word, saved for AutoTokenizer; `end` is put after each text where `appended`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", end, *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if appended:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, 2)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token=end, model_max_length=32
    ).save_pretrained(folder)


def write_images(folder: Path, count: int = 8) -> list[bytes]:
    """test.parquet of PNGs as the hub stores them, two classes, with labels.json."""
    from PIL import Image

    rng = np.random.default_rng(0)
    encoded = []
    for i in range(count):
        pixels = rng.integers(0, 128, (20, 24, 3)) + 120 * (i % 2)
        stream = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(stream, "PNG")
        encoded.append(stream.getvalue())
    folder.mkdir(parents=True)
    rows = {"image": [{"bytes": one, "path": None} for one in encoded], "label": [i % 2 for i in range(count)]}
    pd.DataFrame(rows).to_parquet(folder / "test.parquet")
    (folder / "labels.json").write_text('["w01", "w02"]')
    return encoded


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole CLIP model with its tokenizer and image processor."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    folder = tmp_path_factory.mktemp("clip") / "base"
    torch.manual_seed(0)
    text = {"vocab_size": 99, "hidden_size": SIZE, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "max_position_embeddings": 32, "eos_token_id": 2}  # fmt: skip
    vision = {"hidden_size": SIZE, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 16, "patch_size": 8}  # fmt: skip
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16).save_pretrained(folder)
    word_tokenizer(folder)
    return folder


@torch.no_grad()
def test_clip_is_scored_zero_shot_as_clip_scores_itself(clip: Path, tmp_path: Path) -> None:
    from PIL import Image
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, CLIPVisionModel

    encoded = write_images(tmp_path / "data")
    options = {"templates": ["w10 {}", "w11 {} w12"]}
    suite = open_suite(SuiteSpec("s", SuiteParams(kind="image-classification", options=options), tmp_path / "data"))
    assert suite.load() == 8
    got = suite.predict(Model("base", clip, clip), FLOAT32)

    whole = CLIPModel.from_pretrained(clip).eval()
    tokenizer, processor = AutoTokenizer.from_pretrained(clip), AutoImageProcessor.from_pretrained(clip)
    pixels = processor([Image.open(io.BytesIO(one)) for one in encoded], return_tensors="pt")["pixel_values"]
    sides = []
    for name in ("w01", "w02"):
        tokens = tokenizer([t.format(name) for t in options["templates"]], padding=True, return_tensors="pt")
        outs = [whole(pixel_values=pixels, input_ids=ids[None]) for ids in tokens["input_ids"][:, :]]
        vector = torch.cat([out.text_embeds for out in outs]).mean(0)
        sides.append(vector / vector.norm())
    logits = whole.logit_scale.exp() * outs[0].image_embeds @ torch.stack(sides).T
    target = torch.tensor([0, 1] * 4)
    assert got["nll"] == pytest.approx(torch.nn.functional.cross_entropy(logits, target, reduction="none"), abs=1e-5)
    assert got["target"].tolist() == target.tolist()

    # An expert that is a bare vision tower: the projection is the base's.
    CLIPVisionModel.from_pretrained(clip).save_pretrained(tmp_path / "tower")
    tower = suite.predict(Model("expert", tmp_path / "tower", clip), FLOAT32)
    assert tower["nll"] == pytest.approx(got["nll"], abs=1e-6)
    assert set(suite.score(got)) == {"accuracy", "macro_f1", "nll", "ece"}


@torch.no_grad()
def test_vit_with_its_private_classifier(tmp_path: Path) -> None:
    from PIL import Image
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    encoded = write_images(tmp_path / "data")
    torch.manual_seed(1)
    config = ViTConfig(hidden_size=SIZE, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
                       image_size=16, patch_size=8, num_labels=2)  # fmt: skip
    expert = ViTForImageClassification(config).eval()
    expert.save_pretrained(tmp_path / "expert")
    expert.vit.save_pretrained(tmp_path / "base")
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    processor.save_pretrained(tmp_path / "base")
    head = {name: value for name, value in expert.state_dict().items() if name.startswith("classifier.")}
    save_file(head, tmp_path / "head.safetensors")
    suite = open_suite(SuiteSpec("s", SuiteParams(kind="image-classification"), tmp_path / "data"))
    suite.load()
    model = Model("merged", tmp_path / "base", tmp_path / "base", tmp_path / "head.safetensors", tmp_path / "expert")
    got = suite.predict(model, FLOAT32)
    pixels = processor([Image.open(io.BytesIO(one)) for one in encoded], return_tensors="pt")["pixel_values"]
    logits = expert(pixel_values=pixels).logits
    target = torch.tensor([0, 1] * 4)
    assert got["nll"] == pytest.approx(torch.nn.functional.cross_entropy(logits, target, reduction="none"), abs=1e-5)


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 that has learnt to answer with the last word of its prompt."""
    from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

    folder = tmp_path_factory.mktemp("t5") / "base"
    word_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    config = T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, eos_token_id=2,
                      pad_token_id=0, decoder_start_token_id=0, dropout_rate=0.0)  # fmt: skip
    model = T5ForConditionalGeneration(config)
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    answers = ["w05", "w06"]
    for _ in range(80):
        picks = torch.randint(2, (16,)).tolist()
        prompts = tokenizer([f"w01 w02 {answers[pick]}" for pick in picks], return_tensors="pt")
        labels = tokenizer([answers[pick] for pick in picks], return_tensors="pt")["input_ids"]
        loss = model(input_ids=prompts["input_ids"], attention_mask=prompts["attention_mask"], labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.eval().save_pretrained(folder)
    return folder


def test_seq2seq_answers_are_compared_exactly(t5: Path, tmp_path: Path) -> None:
    rows = [{"a": "w02", "b": "w05", "label": 0}, {"a": "w02", "b": "w06", "label": 1}] * 5
    rows.append({"a": "w02", "b": "w05", "label": 1})  # a wrong label: the model cannot be right here
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {"prompt": "w01 {a} {b}", "answers": ["w05", "w06"], "max_new_tokens": 3}
    suite = open_suite(SuiteSpec("s", SuiteParams(kind="seq2seq", options=options), tmp_path))
    assert suite.load() == 11
    got = suite.predict(Model("base", t5, t5), FLOAT32)
    assert got["predicted_text"].tolist() == ["w05", "w06"] * 5 + ["w05"]
    assert suite.score(got) == {"exact_match": pytest.approx(10 / 11)}


def test_seq2seq_numbers_are_correlated(t5: Path, tmp_path: Path) -> None:
    from scipy.stats import spearmanr

    rows = [{"text": "w01 w02 w05", "label": score} for score in (1.0, 2.5, 4.0)]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = SuiteParams(kind="seq2seq", metric="spearman", options={"numeric": True})
    suite = open_suite(SuiteSpec("s", settings, tmp_path))
    suite.load()
    got = suite.predict(Model("base", t5, t5), FLOAT32)
    assert got["target_value"].tolist() == [1.0, 2.5, 4.0]
    assert got["predicted_value"].tolist() == [0.0, 0.0, 0.0], "an answer that is no number counts as 0"
    got = got | {"predicted_value": np.array([1.0, 3.0, 2.0])}
    assert suite.score(got)["spearman"] == pytest.approx(spearmanr(got["target_value"], [1, 3, 2]).statistic)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("gpt2") / "base"
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=99, n_positions=32, n_embd=SIZE, n_layer=1, n_head=2, bos_token_id=2, eos_token_id=2,
                        initializer_range=0.5)  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    word_tokenizer(folder, appended=False)
    return folder


@torch.no_grad()
def test_perplexity_scores_each_token_once(gpt2: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    texts = [" ".join(WORDS[:11]), "w01 w02", " ".join(WORDS[20:48])]
    (tmp_path / "test.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(gpt2).eval(), AutoTokenizer.from_pretrained(gpt2)

    def score(**options: int) -> dict[str, np.ndarray]:
        suite = open_suite(SuiteSpec("s", SuiteParams(kind="perplexity", options=options), tmp_path))
        suite.load()
        got = suite.predict(Model("base", gpt2, gpt2), FLOAT32)
        expected = np.exp(got["nll"].sum() / got["tokens"].sum())
        assert suite.score(got)["perplexity"] == pytest.approx(expected)
        assert not suite.metric.higher_is_better
        return dict(got)

    whole, windows = score(), score(max_tokens=8, stride=4)
    for text, nll, in_windows, count in zip(texts, whole["nll"], windows["nll"], whole["tokens"], strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        assert nll == pytest.approx(float(model(ids, labels=ids).loss) * (ids.shape[1] - 1), rel=1e-5)
        assert count == ids.shape[1] - 1
        # Token by token: the window that a token is scored in starts at a multiple of 4 and reaches 8 far.
        expected = 0.0
        for place in range(1, ids.shape[1]):
            start = 0 if place < 8 else (place - 8) // 4 * 4 + 4
            logits = model(ids[:, start:place]).logits[0, -1]
            expected -= float(torch.log_softmax(logits, -1)[ids[0, place]])
        assert in_windows == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_lm_eval_scores_a_local_task_file(gpt2: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rng = np.random.default_rng(0)
    rows = [
        {"context": " ".join(rng.choice(WORDS, 4)), "choices": ["w01", "w02", "w03"], "gold": int(rng.integers(3))}
        for _ in range(12)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "tiny_choice.yaml").write_text(
        "task: tiny_choice\ndataset_path: json\ndataset_kwargs: {data_files: {test: rows.jsonl}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: '{{context}}'\ndoc_to_choice: '{{choices}}'\n"
        "doc_to_target: '{{gold}}'\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    suite = open_suite(SuiteSpec("tiny_choice", SuiteParams(kind="lm-eval"), tmp_path))
    assert suite.load() == 12
    got = suite.predict(Model("base", gpt2, gpt2), FLOAT32)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(gpt2).eval(), AutoTokenizer.from_pretrained(gpt2)
    expected = []
    for row in rows:
        ids = tokenizer(row["context"], add_special_tokens=False, return_tensors="pt")["input_ids"]
        logits = model(ids).logits[0, -1]
        best = max(range(3), key=lambda i: float(logits[tokenizer.convert_tokens_to_ids(row["choices"][i])]))
        expected.append(float(best == row["gold"]))
    assert got["value"].tolist() == expected
    assert suite.score(got) == {"value:acc": np.mean(expected)}
    assert suite.metric.higher_is_better
    digest = suite.data_digest()
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows[:6])))
    again = open_suite(SuiteSpec("tiny_choice", SuiteParams(kind="lm-eval"), tmp_path))
    assert again.load() == 6
    assert again.data_digest() != digest
    with pytest.raises(SuiteError, match="a task of the harness"):
        open_suite(SuiteSpec("tiny_choise", SuiteParams(kind="lm-eval"), tmp_path)).load()
    with pytest.raises(SuiteError, match="one of acc"):
        open_suite(SuiteSpec("tiny_choice", SuiteParams(kind="lm-eval", metric="f1"), tmp_path)).load()


def test_kind_of_another_package_is_found_by_its_entry_point(tmp_path: Path) -> None:
    """A package with an entry point, installed as pip leaves it: a module and its dist-info."""
    (tmp_path / "their_suites.py").write_text(
        "import numpy as np\n"
        "from poemerge.suites.scores import METRICS\n"
        "class Lengths:\n"
        "    metric, version = METRICS['value'], 1\n"
        "    def __init__(self, spec): self.spec = spec\n"
        "    def load(self): return 3\n"
        "    def predict(self, model, runtime):\n"
        "        runtime.tick(3)\n"
        "        return {'value': np.full(3, len(model.name))}\n"
        "    def score(self, predictions): return {'value': self.metric(predictions)}\n"
    )
    info = tmp_path / "their_suites-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-suites\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[poemerge.suites]\nlengths = their_suites:Lengths\n")
    code = (
        "import torch\nfrom pathlib import Path\nfrom poemerge.params import SuiteParams\n"
        "from poemerge.suites.protocol import Model, SuiteSpec, open_suite\n"
        "from poemerge.suites.runtime import Runtime\n"
        "suite = open_suite(SuiteSpec('s', SuiteParams(kind='lengths')))\n"
        "assert suite.load() == 3\n"
        "got = suite.predict(Model('four', Path(), Path()), Runtime(torch.device('cpu'), torch.float32))\n"
        "print(suite.score(got))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout.strip() == "{'value': 4.0}", done.stderr[-2000:]


def test_every_published_benchmark_is_a_valid_params_file() -> None:
    folder = files("poemerge.suites") / "benchmarks"
    names = sorted(path.name for path in folder.iterdir() if path.name.endswith(".yaml"))
    glue = ["flan-t5-base-glue-lora.yaml", "flan-t5-base-glue.yaml"]
    assert names == ["clip-vit-b32-14.yaml", "clip-vit-b32-20.yaml", "clip-vit-b32-8.yaml", *glue]
    for name in names:
        params = load_params(Path(str(folder / name)))
        assert set(params.evaluate.suites) == set(params.experts), "each suite has its expert"
        for suite, settings in params.evaluate.suites.items():
            opened = open_suite(SuiteSpec(suite, settings))
            assert opened.metric.higher_is_better
        count = {"8": 8, "14": 14, "20": 20}.get(name.removesuffix(".yaml").rpartition("-")[2], 8)
        assert len(params.experts) == count


def test_our_kinds_are_all_there() -> None:
    assert {"text-classification", "image-classification", "seq2seq", "lm-eval", "perplexity"} <= set(kinds())


def test_shards_and_class_names_of_the_hub_are_read(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    features = {"info": {"features": {"label": {"names": ["no", "yes"], "_type": "ClassLabel"}}}}
    for shard, rows in enumerate((["a", "b"], ["c"])):
        table = pa.table({"text": rows, "label": [0] * len(rows)})
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
        (tmp_path / "data").mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / "data" / f"test-0000{shard}-of-00002.parquet")
    pq.write_table(table, tmp_path / "data" / "test_other-00000-of-00001.parquet")
    spec = SuiteSpec("s", SuiteParams(), tmp_path)
    assert read_split(spec)["text"].tolist() == ["a", "b", "c"], "every shard of this split, and no other split"
    suite = open_suite(spec)
    suite.load()
    from poemerge.suites.data import description

    assert description(spec) == {"labels": ["no", "yes"]}
