"""Predictor: every kind of expert predicts, on random inputs, exactly what its own library makes it predict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from poemerge.checkpoints import ExpertSet
from poemerge.merging import merge
from poemerge.merging.predictor import Answer, Predictor, divergence, predicts
from poemerge.merging.sensitivity import measure, why_not
from poemerge.params import MergeParams
from tests.tiny import make_base, make_full_expert

SIZES: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip


def _moved(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval()


def _bert(folder: Path) -> Any:
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    BertModel(BertConfig(vocab_size=60, **SIZES)).save_pretrained(folder / "base")
    return _moved(BertForSequenceClassification.from_pretrained(folder / "base", num_labels=3))


def _roberta(folder: Path) -> Any:
    from transformers import RobertaConfig, RobertaForSequenceClassification, RobertaModel

    config = RobertaConfig(vocab_size=60, max_position_embeddings=64, pad_token_id=1, **SIZES)
    RobertaModel(config, add_pooling_layer=False).save_pretrained(folder / "base")
    return _moved(RobertaForSequenceClassification.from_pretrained(folder / "base", num_labels=3))


def _vit(folder: Path) -> Any:
    from transformers import ViTConfig, ViTForImageClassification, ViTModel

    ViTModel(ViTConfig(image_size=16, patch_size=8, **SIZES), add_pooling_layer=False).save_pretrained(folder / "base")
    return _moved(ViTForImageClassification.from_pretrained(folder / "base", num_labels=3))


def _llama(folder: Path) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    LlamaForCausalLM(LlamaConfig(vocab_size=60, num_key_value_heads=2, **SIZES)).save_pretrained(folder / "base")
    return _moved(LlamaForSequenceClassification.from_pretrained(folder / "base", num_labels=3, pad_token_id=0))


def _asked(make: Any, folder: Path) -> tuple[Any, ExpertSet, Predictor, dict[str, torch.Tensor], Answer]:
    """transformers' own expert, the set with it alone, its predictor, and what that answers to some inputs."""
    torch.manual_seed(0)
    expert = make(folder)
    expert.save_pretrained(folder / "expert")
    experts = ExpertSet.open(folder / "base", {"expert": folder / "expert"})
    assert why_not(experts, 1 << 30) == {}
    predictor = Predictor(experts, "expert")
    inputs = predictor.inputs.draw(32, 32, torch.Generator().manual_seed(4))
    return expert, experts, predictor, inputs, predictor.answer(inputs)


@pytest.mark.parametrize("make", [_vit, _llama])
def test_a_classifier_of_transformers_predicts_what_it_predicts(make: Any, tmp_path: Path) -> None:
    expert, experts, _, inputs, found = _asked(make, tmp_path)
    with torch.no_grad():
        expected = expert(**inputs).logits
    torch.testing.assert_close(found.logits, expected, rtol=1e-4, atol=1e-5)
    factors = measure(experts, "expert")
    matrices = {name for name in experts.names() if experts.rule(name) == "matrix"}
    assert matrices - {"lm_head.weight"} == set(factors)
    assert all(float(factor.norm()) > 0 for factor in factors.values())


@pytest.mark.parametrize("make", [_bert, _roberta])
def test_an_encoder_of_texts_is_asked_by_its_features_whatever_its_classifier_reads(make: Any, tmp_path: Path) -> None:
    expert, experts, predictor, inputs, found = _asked(make, tmp_path)
    assert predictor.directions is not None
    with torch.no_grad():
        expected = expert.base_model(**inputs).last_hidden_state @ predictor.directions.T
    assert found.logits is None
    torch.testing.assert_close(found.features, expected, rtol=1e-4, atol=1e-4)
    matrices = {name for name in experts.names() if experts.rule(name) == "matrix" and "pooler" not in name}
    assert set(measure(experts, "expert")) == matrices


def _adapted(base: Path, classifier: Any, task: str) -> Any:
    from peft import LoraConfig, get_peft_model

    whole = classifier.from_pretrained(base, num_labels=3)
    if whole.config.pad_token_id is None:
        whole.config.pad_token_id = 0
    names = ["q_proj", "v_proj"] if "llama" in whole.config.model_type else ["query", "value"]
    settings = LoraConfig(task_type=task, r=2, target_modules=names, init_lora_weights=False)
    return get_peft_model(whole, settings).eval()


def test_an_adapter_with_its_classifier_predicts_what_peft_makes_it_predict(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    _llama(tmp_path)
    adapted = _adapted(tmp_path / "base", AutoModelForSequenceClassification, "SEQ_CLS")
    adapted.save_pretrained(tmp_path / "adapter")
    experts = ExpertSet.open(tmp_path / "base", {"adapter": tmp_path / "adapter"})
    predictor = Predictor(experts, "adapter")
    inputs = predictor.inputs.draw(32, 32, torch.Generator().manual_seed(4))
    found = predictor.answer(inputs)
    with torch.no_grad():
        expected = adapted(**inputs).logits
    torch.testing.assert_close(found.logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_a_classifier_of_tokens_is_asked_by_its_features_or_not_at_all(kind: str, tmp_path: Path) -> None:
    from transformers import AutoModelForTokenClassification

    _llama(tmp_path)
    for base, told in ((tmp_path / "base", False), (make_base(tmp_path / "encoder"), True)):
        whole = _moved(AutoModelForTokenClassification.from_pretrained(base, num_labels=3))
        folder = tmp_path / f"expert-{told}"
        (whole if kind == "full" else _adapted(base, AutoModelForTokenClassification, "TOKEN_CLS")).save_pretrained(
            folder
        )
        experts = ExpertSet.open(base, {"expert": folder})
        said = {"full": "LlamaForTokenClassification", "adapter": "an adapter for TOKEN_CLS"}[kind]
        reasons = {} if told else {"expert": f"{said} does not say one class for an input"}
        assert why_not(experts, 1 << 30) == reasons


def test_a_network_with_a_hole_is_merged_without_a_measurement(tmp_path: Path) -> None:
    torch.manual_seed(0)
    expert = _vit(tmp_path)
    expert.save_pretrained(tmp_path / "expert")
    tensors = load_file(tmp_path / "expert" / "model.safetensors")
    del tensors["classifier.bias"]
    save_file(tensors, tmp_path / "expert" / "model.safetensors", metadata={"format": "pt"})
    record = merge(tmp_path / "base", {"one": tmp_path / "expert"}, tmp_path / "m", MergeParams()).record
    assert (
        record["experts"]["one"]["sensitivity"] == "ValueError: neither the base nor the expert holds classifier.bias"
    )


@pytest.mark.parametrize("name", ["head.weight", "classifier.out_proj.weight", "score.weight"])
def test_what_counts_as_a_head(name: str) -> None:
    assert predicts(["pooler.dense.weight", name])


@pytest.mark.parametrize("names", [["lm_head.weight"], ["classifier.bias"], []])
def test_what_is_no_head(names: list[str]) -> None:
    assert not predicts(names)


def test_inputs_are_of_the_tokens_that_an_expert_met(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    one = make_full_expert(base, tmp_path / "one", seed=1)
    tensors, old = load_file(one / "model.safetensors"), load_file(base / "model.safetensors")
    name = "embeddings.word_embeddings.weight"
    tensors[name] = old[name].clone()
    tensors[name][[30, 31, 32]] += 0.1
    save_file(tensors, one / "model.safetensors", metadata={"format": "pt"})
    predictor = Predictor(ExpertSet.open(base, {"one": one}), "one")
    drawn = predictor.inputs.draw(50, 10, torch.Generator().manual_seed(0))["input_ids"]
    assert set(drawn[:, 1:-1].unique().tolist()) == {30, 31, 32}


def test_beside_a_head_features_are_worth_what_the_head_says_was_moved(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    one = make_full_expert(base, tmp_path / "one", seed=1, size=0.08)
    predictor = Predictor(ExpertSet.open(base, {"one": one}), "one", features=True)
    inputs = predictor.inputs.draw(500, 32, torch.Generator().manual_seed(4))
    with torch.no_grad():
        own = predictor.answer(inputs)
        weights = load_file(base / "model.safetensors")
        predictor.adopt({name: torch.nn.Parameter(value) for name, value in weights.items()})
        was = predictor.answer(inputs)
    assert own.logits is not None
    assert was.logits is not None
    assert own.features is not None
    assert was.features is not None
    said, before = torch.log_softmax(own.logits, -1), torch.log_softmax(was.logits, -1)
    moved = float((said.exp() * (said - before)).sum(-1).mean())
    torch.testing.assert_close(float(divergence(own.logits, was.logits)), moved, rtol=1e-4, atol=0)
    assert moved > 0
    assert 0.5 * float((own.features - was.features).square().sum(-1).mean()) == pytest.approx(moved, rel=0.2)
    assert Predictor(ExpertSet.open(base, {"one": one}), "one").directions is None
