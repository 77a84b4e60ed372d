"""PEFT adapters read by ExpertSet agree with what PEFT itself merges, and what is no plain LoRA is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from poemerge.checkpoints import Adapter, ExpertSet
from poemerge.checkpoints.compatibility import transposed_layout
from poemerge.errors import CheckpointError
from tests.tiny import make_base, make_lora_expert

LAYER0_QUERY = "encoder.layer.0.attention.self.query.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("adapters") / "base")


_GPT2: dict[str, Any] = {
    "vocab_size": 60, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 0
}  # fmt: skip


def _gpt2(path: Path, tied: bool = True) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(**_GPT2, tie_word_embeddings=tied)).save_pretrained(path)
    return path


def _train(model: Any, path: Path, seed: int = 1) -> dict[str, torch.Tensor]:
    """Give every trainable parameter of a PEFT model other values, save it, and return PEFT's own merge."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(path)
    merged: dict[str, torch.Tensor] = model.merge_and_unload().state_dict()
    return merged


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["query", "value"]},
    "all linear": {"target_modules": "all-linear", "r": 3},
    "rslora": {"target_modules": ["query"], "use_rslora": True, "lora_alpha": 5},
    "patterns": {
        "target_modules": ["query", "key"],
        "rank_pattern": {"layer.0.attention.self.query": 2, "key": 3},
        "alpha_pattern": {"layer.1.*query": 3, "layer.0.attention.self.key": 11},
    },
    "trained biases": {"target_modules": ["query"], "bias": "all"},
    "biases of adapted layers": {"target_modules": ["query"], "bias": "lora_only"},
    "embeddings": {"target_modules": ["word_embeddings", "query"]},
    "saved whole": {"target_modules": ["query"], "modules_to_save": ["pooler"]},
    "one layer": {"target_modules": ["query"], "layers_to_transform": [1]},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_deltas_are_those_of_peft(base: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel

    model = get_peft_model(AutoModel.from_pretrained(base), LoraConfig(**{"r": 4, "lora_alpha": 7, **options}))
    merged = _train(model, tmp_path / "expert")
    experts = ExpertSet.open(base, {"e": tmp_path / "expert"})
    before = load_file(base / "model.safetensors")
    assert any(experts.touching(name) for name in before)
    for name, value in before.items():
        torch.testing.assert_close(experts.delta("e", name), merged[name] - value, atol=2e-6, rtol=0, msg=name)
        if experts.is_factored(name):
            (b, a, scaling), shape = experts.factors(name)[0], value.shape
            assert (b.shape[0], a.shape[1]) == tuple(shape)
            torch.testing.assert_close(scaling * b @ a, merged[name] - value, atol=2e-6, rtol=0)


def test_conv1d_layers_are_transposed(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = _gpt2(tmp_path / "gpt2")
    # c_attn is [16, 48], attn.c_proj a square whose shape does not tell; mlp.c_fc is [16, 64].
    config = LoraConfig(r=3, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    merged = _train(get_peft_model(AutoModelForCausalLM.from_pretrained(base), config), tmp_path / "expert")
    experts = ExpertSet.open(base, {"e": tmp_path / "expert"})
    for name, value in load_file(base / "model.safetensors").items():
        torch.testing.assert_close(experts.delta("e", name), merged[name] - value, atol=2e-6, rtol=0, msg=name)
    assert experts.transposed("transformer.h.0.attn.c_proj.weight")


def test_conv1d_layers_are_transposed_whatever_else_is_adapted(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = _gpt2(tmp_path / "gpt2", tied=False)
    config = LoraConfig(r=3, target_modules=["c_attn", "c_proj", "lm_head"])
    merged = _train(get_peft_model(AutoModelForCausalLM.from_pretrained(base), config), tmp_path / "expert")
    saved = json.loads((tmp_path / "expert" / "adapter_config.json").read_text())
    assert not saved["fan_in_fan_out"], "PEFT saves what its last module needed, a Linear here"
    experts = ExpertSet.open(base, {"e": tmp_path / "expert"})
    for name, value in load_file(base / "model.safetensors").items():
        torch.testing.assert_close(experts.delta("e", name), merged[name] - value, atol=2e-6, rtol=0, msg=name)


@pytest.mark.parametrize(
    "kind", ["gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "captions", "gpt_bigcode"]
)
def test_every_layer_that_transformers_transposes_is_known(kind: str) -> None:
    from transformers import (
        AutoConfig,
        AutoModel,
        GPT2Config,
        VisionEncoderDecoderConfig,
        VisionEncoderDecoderModel,
        ViTConfig,
    )
    from transformers.pytorch_utils import Conv1D

    if kind == "captions":
        config: Any = VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(), GPT2Config(**_GPT2))
    else:
        config = AutoConfig.for_model(kind)
    with torch.device("meta"):
        model = VisionEncoderDecoderModel(config) if kind == "captions" else AutoModel.from_config(config)
    conv = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
    assert bool(conv) == (kind != "gpt_bigcode")
    assert {name for name in model.state_dict() if transposed_layout(name, config.to_dict())} == conv


def test_prefix_and_classifier_of_a_sequence_classifier(base: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    merged = _train(
        get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])), tmp_path / "e"
    )
    experts = ExpertSet.open(base, {"e": tmp_path / "e"})
    before = load_file(base / "model.safetensors")
    torch.testing.assert_close(
        experts.delta("e", LAYER0_QUERY), merged["bert." + LAYER0_QUERY] - before[LAYER0_QUERY], atol=2e-6, rtol=0
    )
    private = experts.experts["e"].read_private()
    assert set(private) == {"classifier.weight", "classifier.bias"}
    torch.testing.assert_close(private["classifier.weight"], merged["classifier.weight"])


def test_head_beside_the_adapter_is_private(base: Path, tmp_path: Path) -> None:
    expert = make_lora_expert(base, tmp_path / "e", seed=3)
    experts = ExpertSet.open(base, {"e": expert})
    assert list(experts.experts["e"].read_private()) == ["head.weight"]
    assert not any("head" in name for name in experts.experts["e"].full)


@pytest.mark.parametrize("shape", [(32, 32), (3, 32)])
def test_a_head_that_would_be_read_for_a_merged_weight_is_refused(
    base: Path, tmp_path: Path, shape: tuple[int, ...]
) -> None:
    from tests.tiny import make_full_expert

    experts = {"full": make_full_expert(base, tmp_path / "f", 1), "lora": make_lora_expert(base, tmp_path / "l", 2)}
    for folder in experts.values():
        save_file({LAYER0_QUERY: torch.zeros(shape), "head.bias": torch.zeros(3)}, folder / "head.safetensors")
    with pytest.raises(CheckpointError) as caught:
        ExpertSet.open(base, experts)
    assert [(one.where, one.expert, one.tensor) for one in caught.value.problems] == [
        (str(folder / "head.safetensors"), name, LAYER0_QUERY) for name, folder in experts.items()
    ]


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_a_head_that_would_be_read_for_a_weight_of_the_base_that_the_adapter_leaves_alone_is_refused(
    base: Path, tmp_path: Path, prefix: str
) -> None:
    expert = make_lora_expert(base, tmp_path / "e", seed=3)
    key = "encoder.layer.1.attention.self.key.weight"
    factors = load_file(expert / "adapter_model.safetensors")
    under = "base_model.model."
    save_file(
        {name.replace(under, under + prefix): factor for name, factor in factors.items()},
        expert / "adapter_model.safetensors",
    )

    def open_with(tensor: str, *shape: int, exclude: tuple[str, ...] = ()) -> set[str]:
        save_file({"head.weight": torch.zeros(3, 32), tensor: torch.zeros(shape)}, expert / "head.safetensors")
        return set(ExpertSet.open(base, {"mine": expert}, exclude=exclude).experts["mine"].private_names())

    pooler = prefix + "pooler.dense.weight"
    for tensor, shape in ((prefix + key, (32, 32)), (prefix + key, (3, 32)), (key, (32, 32)), (pooler, (32, 32))):
        with pytest.raises(CheckpointError, match="the name of a weight that is merged") as caught:
            open_with(tensor, *shape)
        (problem,) = caught.value.problems
        assert (problem.where, problem.expert, problem.tensor) == (str(expert / "head.safetensors"), "mine", tensor)
    # A task's own layer in place of the base's, as in a full model; and a weight that is not merged.
    assert open_with(pooler, 3, 32) == {"head.weight", pooler}
    assert open_with(prefix + key, 32, 32, exclude=(key,)) == {"head.weight", prefix + key}


def test_mixed_with_a_full_expert_only_shared_matrices_are_dense(base: Path, tmp_path: Path) -> None:
    from tests.tiny import make_full_expert

    experts = ExpertSet.open(
        base,
        {"full": make_full_expert(base, tmp_path / "f", 1), "lora": make_lora_expert(base, tmp_path / "l", 2)},
        exclude=("encoder.layer.1.*",),
    )
    assert experts.touching(LAYER0_QUERY) == ["full", "lora"]
    assert not experts.is_factored(LAYER0_QUERY)
    deltas = experts.deltas(LAYER0_QUERY)
    b, a, scaling = experts._factors(experts.experts["lora"], LAYER0_QUERY)
    torch.testing.assert_close(deltas[1], scaling * b @ a)
    assert experts.rule("encoder.layer.1.attention.self.query.weight") == "base"
    with pytest.raises(ValueError, match="not factored"):
        experts.factors(LAYER0_QUERY)


def _edit(path: Path, **changes: Any) -> None:
    file = path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"layer_replication": [[0, 1], [0, 1]]}, "replicated layers"),
        ({"trainable_token_indices": [1, 2]}, "trainable tokens"),
        ({"target_parameters": ["mlp.w"]}, "bare parameters"),
        ({"lora_bias": True}, "lora_B"),
        ({"some_new_option": 3}, "some_new_option"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"alpha_pattern": {"(": 3}}, "alpha_pattern"),
    ],
)
def test_other_adapters_are_refused_by_name(base: Path, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    expert = make_lora_expert(base, tmp_path / "e", seed=3)
    _edit(expert, **changes)
    with pytest.raises(CheckpointError) as caught:
        ExpertSet.open(base, {"mine": expert})
    assert said in str(caught.value)
    assert "mine" in str(caught.value)


def _without_b(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[next(name for name in tensors if "lora_B" in name)]


def _magnitudes(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.encoder.layer.0.attention.self.query.lora_magnitude_vector"] = torch.ones(32)


def _ranks_apart(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name in tensors if "lora_A" in name)
    tensors[name] = torch.cat([tensors[name], tensors[name]])


def _other_module(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if ".query." in name]:
        tensors[name.replace(".query.", ".quux.")] = tensors.pop(name)


def _other_width(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name in tensors if "lora_A" in name)
    tensors[name] = tensors[name][:, :-1].contiguous()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_without_b, "both lora_A and lora_B"),
        (_magnitudes, "plain LoRA factors"),
        (_ranks_apart, "one rank"),
        (_other_module, "quux"),
        (_other_width, "(32, 31)"),
        (dict.clear, "no tensors"),
    ],
)
def test_factors_that_fit_nothing_are_named(
    base: Path, tmp_path: Path, damage: Callable[[dict[str, torch.Tensor]], None], said: str
) -> None:
    expert = make_lora_expert(base, tmp_path / "e", seed=3)
    (expert / "head.safetensors").unlink()
    tensors = load_file(expert / "adapter_model.safetensors")
    damage(tensors)
    save_file(tensors, expert / "adapter_model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        ExpertSet.open(base, {"mine": expert})
    assert said in str(caught.value)


def test_a_config_may_stand_beside_an_adapter(base: Path, tmp_path: Path) -> None:
    expert = make_lora_expert(base, tmp_path / "e", seed=3)
    (expert / "config.json").write_bytes((base / "config.json").read_bytes())
    assert ExpertSet.open(base, {"e": expert}).experts["e"].kind == "adapter"


def test_adapter_alone_tells_rank_and_scaling(base: Path, tmp_path: Path) -> None:
    adapter = Adapter.open(make_lora_expert(base, tmp_path / "e", seed=3, rank=2))
    assert adapter.rank(LAYER0_QUERY) == 2
    assert adapter.factors(LAYER0_QUERY)[2] == 2.0
