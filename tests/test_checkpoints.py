"""Reading and writing safetensors, digests, and how full experts meet their base."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from poemerge.checkpoints import (
    Checkpoint,
    ExpertSet,
    ShardFile,
    compatibility,
    file_digest,
    folder_digest,
    layer_group,
    plan_shards,
    save_tensors,
    write_index,
)
from poemerge.checkpoints.names import match_names, rule_of
from poemerge.errors import CheckpointError
from tests.tiny import make_base, make_full_expert


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("checkpoints") / "base")


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


def _tensors() -> dict[str, torch.Tensor]:
    found = {f"t{i}": (torch.arange(24).reshape(4, 6) % 5).to(dtype) for i, dtype in enumerate(DTYPES)}
    return {**found, "scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4), "vector": torch.randn(7)}


def test_reads_what_safetensors_wrote(tmp_path: Path) -> None:
    save_file(_tensors(), tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    assert set(checkpoint.names()) == set(_tensors())
    for name, value in load_file(tmp_path / "model.safetensors").items():
        assert checkpoint.dtype(name) == value.dtype
        assert checkpoint.shape(name) == tuple(value.shape)
        assert torch.equal(checkpoint.read(name), value)
        if value.ndim == 2:
            assert torch.equal(checkpoint.read(name, slice(1, 3)), value[1:3])


def test_safetensors_reads_what_we_wrote(tmp_path: Path) -> None:
    digest = save_tensors(tmp_path / "ours.safetensors", _tensors())
    theirs = load_file(tmp_path / "ours.safetensors")
    assert all(torch.equal(theirs[name], value) for name, value in _tensors().items() if name != "vector")
    assert digest == hashlib.sha256((tmp_path / "ours.safetensors").read_bytes()).hexdigest()
    assert list(tmp_path.iterdir()) == [tmp_path / "ours.safetensors"]


def test_shards_with_index_load_in_transformers(base: Path, tmp_path: Path) -> None:
    from transformers import AutoModel

    tensors = load_file(base / "model.safetensors")
    shards = plan_shards([(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()], 20_000)
    assert len(shards) > 3
    assert all(shard.nbytes <= 20_000 or len(shard.tensors) == 1 for shard in shards)
    shutil.copy(base / "config.json", tmp_path)
    for shard in shards:
        file = ShardFile(tmp_path, shard)
        for name, _, _ in reversed(shard.tensors):  # any order will do
            file.write(name, tensors[name])
        assert not (tmp_path / shard.file).exists()
        assert file.finish() == file_digest(tmp_path / shard.file)
    write_index(tmp_path, shards)
    loaded = AutoModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items())
    ours = Checkpoint.open(tmp_path)
    assert all(torch.equal(ours.read(name), value) for name, value in tensors.items())


def test_a_single_file_goes_before_a_stale_index_as_in_transformers(base: Path, tmp_path: Path) -> None:
    from transformers import AutoModel

    AutoModel.from_pretrained(base).save_pretrained(tmp_path, max_shard_size="30KB")
    tensors = {name: value + 1 for name, value in load_file(base / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert (tmp_path / "model.safetensors.index.json").is_file()
    ours, loaded = Checkpoint.open(tmp_path), AutoModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(ours.read(name), value) for name, value in tensors.items())
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items())


def test_a_shard_is_hashed_alike_in_rows_and_whole(tmp_path: Path) -> None:
    value = torch.randn(10, 4)
    shard = plan_shards([("a", torch.float32, (10, 4)), ("b", torch.float32, (4,))], 1000)[0]
    file = ShardFile(tmp_path, shard)
    with pytest.raises(ValueError, match="lacks"):
        file.finish()
    for first in (0, 3, 6, 9):
        file.write("a", value[first : first + 3], first)
    file.write("b", value[0])
    with pytest.raises(ValueError, match="planned"):
        file.write("b", value)
    assert file.finish() == file_digest(tmp_path / shard.file)
    assert torch.equal(load_file(tmp_path / shard.file)["a"], value)


def test_folder_digest_is_of_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.txt").write_text("b")
    (tmp_path / "a.txt").write_text("a")
    lines = "".join(f"{n}\0{hashlib.sha256(c).hexdigest()}\n" for n, c in (("a.txt", b"a"), ("sub/b.txt", b"b")))
    expected = hashlib.sha256(lines.encode()).hexdigest()
    assert folder_digest(tmp_path) == expected
    (tmp_path / "source.json").write_text("{}")
    assert folder_digest(tmp_path) == expected
    (tmp_path / "a.txt").write_text("c")
    assert folder_digest(tmp_path) != expected


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "rule"),
    [
        ("encoder.layer.0.attention.self.query.weight", (4, 4), torch.float32, "matrix"),
        ("encoder.layer.0.attention.self.query.bias", (4,), torch.float32, "vector"),
        ("model.layers.3.input_layernorm.weight", (4,), torch.bfloat16, "vector"),
        ("model.embed_tokens.weight", (9, 4), torch.bfloat16, "embedding"),
        ("lm_head.weight", (9, 4), torch.bfloat16, "embedding"),
        ("transformer.wte.weight", (9, 4), torch.float32, "embedding"),
        ("shared.weight", (9, 4), torch.float32, "embedding"),
        ("vit.embeddings.cls_token", (1, 1, 4), torch.float32, "vector"),
        ("vit.embeddings.position_embeddings", (1, 5, 4), torch.float32, "embedding"),
        ("vit.embeddings.patch_embeddings.projection.weight", (4, 3, 2, 2), torch.float32, "vector"),
        ("vision_model.embeddings.patch_embedding.weight", (8, 12), torch.float32, "matrix"),
        ("encoder.patch_embed.pos_embedding", (1, 5, 4), torch.float32, "embedding"),
        ("conv.weight", (4, 3, 2, 2), torch.float32, "vector"),
        ("model.layers.0.mlp.experts.gate_up_proj", (2, 4, 8), torch.bfloat16, "matrix"),
        ("embeddings.position_ids", (1, 5), torch.int64, "base"),
    ],
)
def test_rules(name: str, shape: tuple[int, ...], dtype: torch.dtype, rule: str) -> None:
    assert rule_of(name, shape, dtype) == rule


def test_names_meet_across_prefixes() -> None:
    base = ["encoder.layer.0.w", "embeddings.w", "pooler.w"]
    assert match_names(base, ["bert.encoder.layer.0.w", "bert.embeddings.w", "classifier.w"]) == {
        "bert.encoder.layer.0.w": "encoder.layer.0.w",
        "bert.embeddings.w": "embeddings.w",
    }
    assert match_names(["model.layers.0.w", "lm_head.w"], ["layers.0.w"]) == {"layers.0.w": "model.layers.0.w"}
    assert match_names(["a.w", "a.a.w"], ["a.w", "a.a.w"]) == {"a.w": "a.w", "a.a.w": "a.a.w"}


def test_norms_meet_under_their_old_names_and_their_new() -> None:
    old = ["bert.layer.0.w", "bert.layer.0.LayerNorm.gamma", "bert.layer.0.LayerNorm.beta"]
    new = ["layer.0.w", "layer.0.LayerNorm.weight", "layer.0.LayerNorm.bias", "classifier.w"]
    assert match_names(old, new) == dict(zip(new, old, strict=False))
    assert match_names(new, old) == dict(zip(old, new, strict=False))
    assert match_names(old, old) == dict(zip(old, old, strict=True))
    both = ["w", "norm.gamma", "norm.weight"]
    assert match_names(both, ["w", "norm.weight"]) == {"w": "w", "norm.weight": "norm.weight"}
    assert match_names(both, ["w", "norm.gamma"]) == {"w": "w", "norm.gamma": "norm.gamma"}


def test_layer_groups_leave_numbers_out() -> None:
    assert layer_group("encoder.layer.11.attention.self.query.weight") == "encoder.layer.attention.self.query"


def test_a_classifier_of_the_bare_base(base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    model.save_pretrained(tmp_path / "e")
    experts = ExpertSet.open(base, {"e": tmp_path / "e"})
    after, before = model.state_dict(), load_file(base / "model.safetensors")
    for name, value in before.items():
        assert experts.touching(name) == ["e"]
        torch.testing.assert_close(experts.deltas(name)[0], after[f"bert.{name}"] - value)
    assert set(experts.experts["e"].private_names()) == {"classifier.weight", "classifier.bias"}


def test_dtypes_and_shard_layouts_may_differ(base: Path, tmp_path: Path) -> None:
    from transformers import AutoModel

    full = make_full_expert(base, tmp_path / "one", seed=1)
    (full / "config.json").write_bytes((base / "config.json").read_bytes())
    AutoModel.from_pretrained(full).to(torch.bfloat16).save_pretrained(tmp_path / "other", max_shard_size="30KB")
    assert len(list((tmp_path / "other").glob("*.safetensors"))) > 1
    experts = ExpertSet.open(base, {"f32": full, "bf16": tmp_path / "other"})
    for name in experts.names():
        low, high = experts.deltas(name)
        torch.testing.assert_close(low, high, atol=2e-2, rtol=0)
        assert low.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_rounding_to_the_dtype_of_its_file_has_not_moved_a_parameter(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(compatibility, "_BLOCK_BYTES", 1000)  # several blocks in most parameters
    query, bias = "encoder.layer.0.attention.self.query.weight", "encoder.layer.1.output.dense.bias"
    tensors = {name: value.to(dtype) for name, value in load_file(base / "model.safetensors").items()}
    tensors[query][-1, -1] += 1
    tensors[bias][0] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    experts = ExpertSet.open(base, {"e": tmp_path})
    assert [name for name in experts.names() if experts.moved(name) != [False]] == [query, bias]
    assert bool(experts.deltas("embeddings.word_embeddings.weight").any()) == (dtype != torch.float64)


def test_tied_weights_stored_once_or_twice_are_one(tmp_path: Path) -> None:
    base = {"model.embed_tokens.weight": torch.randn(9, 4), "model.layers.0.w.weight": torch.randn(4, 4)}
    moved = {name: value + 0.1 for name, value in base.items()}

    def save(name: str, tensors: dict[str, torch.Tensor]) -> Path:
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
        return tmp_path / name

    def twice(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}

    experts = ExpertSet.open(save("base1", base), {"twice": save("e2", twice(moved)), "once": save("e1", moved)})
    assert all(not expert.private_names() for expert in experts.experts.values())
    experts = ExpertSet.open(save("base2", twice(base)), {"once": tmp_path / "e1"})
    torch.testing.assert_close(experts.deltas("lm_head.weight")[0], torch.full((9, 4), 0.1))
    assert not experts.experts["once"].lacks
    untied = {**moved, "lm_head.weight": torch.randn(9, 4)}
    experts = ExpertSet.open(tmp_path / "base1", {"untied": save("e3", untied)})
    assert experts.experts["untied"].private_names() == ["lm_head.weight"]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("shared.weight", ["encoder.embed_tokens.weight"]),
        ("shared.weight", ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]),
        ("model.embed_tokens.weight", ["lm_head.weight"]),
        ("lm_head.weight", ["transformer.wte.weight"]),
    ],
)
def test_a_tied_embedding_may_be_stored_under_another_name(tmp_path: Path, ours: str, theirs: list[str]) -> None:
    block = {"block.0.w.weight": torch.randn(4, 4)}
    embedding = torch.randn(90, 4)  # most of the model: without it the expert is a foreign one
    for folder in ("base", "expert"):
        (tmp_path / folder).mkdir()
    save_file({**block, ours: embedding}, tmp_path / "base" / "model.safetensors")
    head = {"lm_head.bias": torch.zeros(90)}
    own = {name: embedding.add(0.1) for name in theirs}
    save_file({**block, **head, **own}, tmp_path / "expert" / "model.safetensors")
    for exclude in ((), (ours,)):
        expert = ExpertSet.open(tmp_path / "base", {"e": tmp_path / "expert"}, exclude=exclude).experts["e"]
        assert expert.private_names() == ["lm_head.bias"]
        assert not expert.lacks
    experts = ExpertSet.open(tmp_path / "base", {"e": tmp_path / "expert"})
    torch.testing.assert_close(experts.deltas(ours)[0], torch.full((90, 4), 0.1))


def test_another_tensor_is_not_taken_for_a_tied_embedding(tmp_path: Path) -> None:
    block = {f"block.{i}.w.weight": torch.randn(4, 4) for i in range(9)}
    embedding = torch.randn(9, 4)

    def private(own: dict[str, torch.Tensor], ours: str = "model.embed_tokens.weight", config: str = "{}") -> list[str]:
        for folder, tensors in (("base", {ours: embedding}), ("expert", own)):
            (tmp_path / folder).mkdir(exist_ok=True)
            save_file({**block, **tensors}, tmp_path / folder / "model.safetensors")
        (tmp_path / "base" / "config.json").write_text(config)
        expert = ExpertSet.open(tmp_path / "base", {"e": tmp_path / "expert"}).experts["e"]
        assert expert.lacks == ([ours] if expert.private else [])
        return sorted(expert.private_names())

    near, nearer, untied = embedding + 0.1, embedding + 0.01, '{"tie_word_embeddings": false}'
    assert private({"lm_head.weight": near}) == []
    assert private({"lm_head.weight": near}, config=untied) == ["lm_head.weight"]
    assert private({"encoder.embed_tokens.weight": near}, "shared.weight", untied) == []
    assert private({"lm_head.weight": -near}) == ["lm_head.weight"]
    assert private({"lm_head.weight": near[1:].clone()}) == ["lm_head.weight"]
    assert private({"projection.weight": near}) == ["projection.weight"]
    assert private({"lm_head.weight": near, "wte.weight": nearer}) == ["lm_head.weight", "wte.weight"]


def test_what_an_expert_lacks_is_listed_not_hidden(base: Path, tmp_path: Path) -> None:
    expert = make_full_expert(base, tmp_path / "e", seed=1)
    tensors = {n: t for n, t in load_file(expert / "model.safetensors").items() if not n.startswith("pooler")}
    save_file(tensors, expert / "model.safetensors")
    experts = ExpertSet.open(base, {"e": expert})
    assert experts.experts["e"].lacks == ["pooler.dense.bias", "pooler.dense.weight"]
    assert experts.rule("pooler.dense.weight") == "base"


def test_every_problem_of_every_expert_is_told_at_once(base: Path, tmp_path: Path) -> None:
    shapes = make_full_expert(base, tmp_path / "shapes", seed=1)
    tensors = load_file(shapes / "model.safetensors")
    for name in ("encoder.layer.0.output.dense.weight", "embeddings.word_embeddings.weight"):
        tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, shapes / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        ExpertSet.open(base, {"shapes": shapes, "missing": tmp_path / "nowhere"})
    assert len(caught.value.problems) == 3
    assert {problem.expert for problem in caught.value.problems} == {"shapes", "missing"}
    assert "vocabulary" in str(caught.value)
