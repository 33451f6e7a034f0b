"""Does a checkpoint come through every conversion with every bit, and as the original tools have it?"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import gmask
from conversions import GOLDEN, RANKS, assert_same, tensors_of, write_checkpoint
from gmask.checkpoints import save, zoo
from gmask.checkpoints.convert import ConversionReport, convert
from gmask.checkpoints.folder import read_config
from gmask.checkpoints.formats import open_checkpoint
from gmask.cli import models
from gmask.models.glm import GLMConfig, GLMForConditionalGeneration
from gmask.models.glm_heads import GLMForSequenceClassification
from gmask.tokenizers.folder import read_tokenizer
from published_vocabularies import SHARED, needs_vocabularies
from tiny_folder import SPECIAL, make_folder

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of ours with its tokenizer."""
    return make_folder(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture
def ranks(folder: Path, tmp_path: Path) -> Path:
    """The same as a checkpoint of the training code."""
    convert(folder, tmp_path / "ranks", to="megatron", parts=2)
    return tmp_path / "ranks"


# --- as the original does it


def test_dividing_gives_the_files_of_the_original_tool(tmp_path: Path) -> None:
    convert(GOLDEN / "ckpt", tmp_path / "mine", to="megatron", parts=2)
    theirs = GOLDEN / "ckpt_MP2"
    for name in ("latest", "latest_checkpointed_iteration.txt"):
        assert (tmp_path / "mine" / name).read_text() == (theirs / name).read_text()
    for rank in range(2):
        mine, expected = (
            torch.load(place / "1234" / RANKS.format(rank), weights_only=True) for place in (tmp_path / "mine", theirs)
        )
        assert list(mine.pop("module")) == list(expected["module"])
        assert_same(
            torch.load(tmp_path / "mine" / "1234" / RANKS.format(rank), weights_only=True)["module"],
            expected.pop("module"),
        )
        assert mine == expected


def test_merging_undoes_what_the_original_tool_divided(tmp_path: Path) -> None:
    convert(GOLDEN / "ckpt_MP2", tmp_path / "mine", to="megatron", parts=1)
    expected = torch.load(GOLDEN / "ckpt" / "1234" / RANKS.format(0), weights_only=True)
    found = torch.load(tmp_path / "mine" / "1234" / RANKS.format(0), weights_only=True)
    assert_same(found["module"], expected["module"])


def test_the_bookkeeping_of_deepspeed_is_kept_as_the_original_tool_keeps_it(tmp_path: Path) -> None:
    convert(GOLDEN / "ckpt_ds", tmp_path / "mine", to="megatron", parts=2)
    expected = json.loads((GOLDEN / "case.json").read_text())["checkpoint"]["top_level_keys"]["ckpt_ds_MP2"]
    for rank in range(2):
        found = torch.load(tmp_path / "mine" / "77" / RANKS.format(rank), weights_only=True)
        assert {**found, "module": "..."} == expected


def test_the_name_of_an_iteration_may_be_release_or_missing(tmp_path: Path) -> None:
    release = tmp_path / "b" / "release"
    release.mkdir(parents=True)
    (release / RANKS.format(0)).write_bytes((GOLDEN / "ckpt" / "1234" / RANKS.format(0)).read_bytes())
    (tmp_path / "b" / "latest").write_text("release")
    convert(tmp_path / "b", tmp_path / "c", to="megatron", parts=4)
    assert (tmp_path / "c" / "latest").read_text() == "release\n"
    assert (tmp_path / "c" / "release" / RANKS.format(3)).is_file()
    release.rename(tmp_path / "blocklm-base")  # an iteration under another name, without a tracker
    convert(tmp_path / "blocklm-base", tmp_path / "d", to="megatron", parts=2)
    assert (tmp_path / "d" / "latest").read_text() == "1234\n"


# --- every bit through every form


def make_weights(shape: dict[str, int], dtype: torch.dtype, labels: int | None, seed: int) -> dict[str, torch.Tensor]:
    """Any finite numbers, under the names of the training code."""
    config = GLMConfig(**shape, num_labels=labels or 2)
    with torch.device("meta"):
        model = (GLMForSequenceClassification if labels else GLMForConditionalGeneration)(config)
    generator = torch.Generator().manual_seed(seed)
    theirs = {"dense": "pool_layer", "out_proj": "multichoice_head"}
    weights = {}
    for key, tensor in model.state_dict().items():
        if key != "lm_head.weight":
            layer, _, parameter = key.partition(".")
            name = f"{theirs[layer]}.{parameter}" if layer in theirs else "model." * bool(labels) + parameter
            weights[name] = torch.randn(tensor.shape, generator=generator).to(dtype)
    return weights


@settings(max_examples=8, deadline=None)
@given(
    heads=st.sampled_from([4, 8, 12]),
    head_dim=st.integers(1, 4),
    layers=st.integers(1, 2),
    vocab_size=st.sampled_from([448, 452, 480]),
    positions=st.integers(3, 9),
    dtype=st.sampled_from(DTYPES),
    labels=st.sampled_from([None, None, 1, 3]),
    parts=st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4])),
    forms=st.lists(st.sampled_from(["gmask", "huggingface", "megatron"]), max_size=3),
    seed=st.integers(0, 2**20),
)
def test_weights_come_through_any_conversions_with_every_bit_and_their_names(
    heads, head_dim, layers, vocab_size, positions, dtype, labels, parts, forms, seed, folder, tmp_path_factory
) -> None:
    shape = {
        "vocab_size": vocab_size,
        "hidden_size": heads * head_dim,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": positions,
    }
    base = tmp_path_factory.mktemp("chain")
    weights = make_weights(shape, dtype, labels, seed)
    place, form = write_checkpoint(base / "start", weights), "megatron"
    known = tensors_of(place)
    for number, (to, count) in enumerate(zip([*forms, "gmask", "megatron"], [*parts, 4, 2, 1], strict=False)):
        options: dict[str, Any] = {"parts": count} if to == "megatron" else {}
        if form == "megatron" and to != "megatron":
            options |= {"heads": heads, "tokenizer": folder}
        convert(place, base / str(number), to=to, **options)
        place, form = base / str(number), to
        assert_same(tensors_of(place), known)
        if form != "megatron":
            config = read_config(place)
            assert config.hidden_act == "gelu_pytorch_tanh" and config.num_attention_heads == heads
            assert {role: getattr(config, role) for role in SPECIAL} == SPECIAL
            assert (config.num_labels == labels) or labels is None
    convert(place, base / "end", to="megatron")
    (path,) = (base / "end").glob("*/*.pt")
    assert_same(torch.load(path, weights_only=True)["module"], weights)


@pytest.mark.parametrize("to", ["gmask", "huggingface", "megatron"])
def test_a_converted_model_answers_as_its_source(to: str, folder: Path, tmp_path: Path) -> None:
    ids = torch.tensor([[11, 12, 5, 13, 1, 8, 14]])
    model, tokenizer = gmask.load(folder)
    expected = model(ids).logits
    convert(folder, tmp_path / "new", to=to, **({"parts": 4} if to == "megatron" else {}))
    if to == "megatron":
        convert(tmp_path / "new", tmp_path / "back", heads=4, tokenizer=folder)
    found, words = gmask.load(tmp_path / ("back" if to == "megatron" else "new"))
    assert torch.equal(found(ids).logits, expected)
    assert words.get_vocab() == tokenizer.get_vocab()
    assert words("The river.").input_ids == tokenizer("The river.").input_ids


def test_the_published_form_has_the_published_names(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "new", to="huggingface")
    values = json.loads((tmp_path / "new" / "config.json").read_text())
    published = json.loads((GOLDEN.parent / "hf-glm-tiny" / "model" / "config.json").read_text())
    assert published.keys() - values.keys() == {"auto_map", "model_name_or_path"}
    assert (values["model_type"], values["architectures"]) == ("glm", ["GLMModel"])
    with open_checkpoint(tmp_path / "new") as checkpoint:
        assert all(checkpoint.stored_name(key) == key for key in checkpoint)
    convert(tmp_path / "new", tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["model_type"] == "glm_blank"
    assert_same(tensors_of(tmp_path / "ours"), tensors_of(folder))


def test_a_classifier_keeps_its_head_and_its_names(folder: Path, tmp_path: Path) -> None:
    config = read_config(folder)
    config.num_labels, config.pool_token = 3, "start"
    GLMForSequenceClassification(config).save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "hf", to="huggingface", tokenizer=folder)
    found = read_config(tmp_path / "hf")
    assert (found.architectures, found.num_labels) == (["GLMForSequenceClassification"], 3)
    assert found.pool_token == "start"
    with open_checkpoint(tmp_path / "hf") as checkpoint:
        assert checkpoint.stored_name("out_proj.weight") == "out_proj.weight"
        assert checkpoint.stored_name("word_embeddings.weight") == "glm.word_embeddings.weight"
    convert(tmp_path / "hf", tmp_path / "ranks", to="megatron", parts=2)
    names = torch.load(tmp_path / "ranks" / "1" / RANKS.format(1), weights_only=True)["module"].keys()
    assert {"pool_layer.weight", "multichoice_head.bias", "model.word_embeddings.weight"} <= names
    assert_same(tensors_of(tmp_path / "ranks"), tensors_of(tmp_path / "source"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_chosen_dtype_is_what_torch_makes_of_each_tensor(dtype: str, ranks: Path, folder: Path, tmp_path) -> None:
    report = convert(folder, tmp_path / "new", dtype=dtype)
    assert report.dtypes == (dtype,)
    assert_same(
        tensors_of(tmp_path / "new"), {key: t.to(getattr(torch, dtype)) for key, t in tensors_of(folder).items()}
    )
    assert str(read_config(tmp_path / "new").dtype).endswith(dtype)
    convert(ranks, tmp_path / "ranks-new", to="megatron", parts=4, dtype=dtype)
    assert_same(tensors_of(tmp_path / "ranks-new"), tensors_of(tmp_path / "new"))


def test_the_activation_of_the_training_code_is_stated_and_another_one_told(
    folder: Path, ranks: Path, tmp_path
) -> None:
    report = convert(ranks, tmp_path / "new", heads=4, tokenizer=folder)
    assert read_config(tmp_path / "new").hidden_act == "gelu_pytorch_tanh"
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    (tmp_path / "new" / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    report = convert(tmp_path / "new", tmp_path / "back", to="megatron")
    assert any("the source computes gelu, the training code gelu_pytorch_tanh" in note for note in report.notes)


# --- the row of [gMASK]


@pytest.fixture
def chinese_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A published model of the tests' shape, of the kind of GLM-10B-Chinese: id 7 was 9 in training."""
    row = replace(
        zoo.find_family("GLM-10B-Chinese"),
        name="Tiny-Chinese", hub_names=(), layers=2, hidden_size=32, heads=4, positions=96, vocab_size=448,
        special_ids=SPECIAL, copied_rows={SPECIAL["gmask_token_id"]: SPECIAL["eop_token_id"]},
    )  # fmt: skip
    monkeypatch.setattr(zoo, "FAMILIES", (*zoo.FAMILIES, row))


@pytest.mark.parametrize("to", ["gmask", "huggingface"])
def test_a_row_that_training_did_not_know_is_copied_and_put_back(to, folder, ranks, chinese_row, tmp_path) -> None:
    original = tensors_of(ranks)["word_embeddings.weight"]
    report = convert(ranks, tmp_path / "new", to=to, tokenizer=folder)
    embedding = tensors_of(tmp_path / "new")["word_embeddings.weight"]
    assert torch.equal(embedding[7], original[9]) and not torch.equal(original[7], original[9])
    assert any("row 7 of the word embedding, [gMASK], is a copy of row 9" in note for note in report.notes)
    assert torch.equal(gmask.load(ranks, tokenizer=folder)[0].glm.word_embeddings.weight, embedding)
    convert(tmp_path / "new", tmp_path / "again", to="gmask")  # the rows of training go along
    convert(tmp_path / "again", tmp_path / "back", to="megatron", parts=4)
    assert_same(tensors_of(tmp_path / "back"), tensors_of(ranks))


def test_a_row_that_was_trained_since_is_kept_both_ways(chinese_row, folder: Path, tmp_path: Path) -> None:
    report = convert(folder, tmp_path / "tuned", to="megatron", parts=2)  # rows 7 and 9 of this one differ
    assert any("--fix-command-token" in note for note in report.notes)
    convert(tmp_path / "tuned", tmp_path / "other", to="megatron", parts=4)
    report = convert(tmp_path / "other", tmp_path / "back", tokenizer=folder)
    assert not any("row" in note for note in report.notes)
    assert_same(tensors_of(tmp_path / "back"), tensors_of(folder))
    found, _ = gmask.load(tmp_path / "other", tokenizer=folder)
    assert torch.equal(found.glm.word_embeddings.weight, tensors_of(folder)["word_embeddings.weight"])


def test_large_weights_are_spread_over_files_that_transformers_reads(folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(save, "SHARD_BYTES", 30_000)
    report = convert(folder, tmp_path / "new")
    shards = [name for name in report.files if name.startswith("model-")]
    index = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())
    assert len(shards) > 2 and set(index["weight_map"].values()) == set(shards)
    assert_same(tensors_of(tmp_path / "new"), tensors_of(folder))
    found = GLMForConditionalGeneration.from_pretrained(tmp_path / "new")
    assert torch.equal(found.glm.word_embeddings.weight, tensors_of(folder)["word_embeddings.weight"])


def test_what_says_whose_the_weights_are_goes_along(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "source")
    for name in ("README.md", "LICENSE", "generation_config.json", "modeling_glm.py"):
        (tmp_path / "source" / name).write_text("{}")
    for to in ("gmask", "huggingface", "megatron"):
        names = set(convert(tmp_path / "source", tmp_path / to, to=to).files)
        assert {"README.md", "LICENSE"} <= names and "modeling_glm.py" not in names


@needs_vocabularies
@pytest.mark.parametrize("to", ["gmask", "huggingface"])
def test_a_published_vocabulary_goes_along_as_it_was_in_training(to: str, tmp_path: Path) -> None:
    (tmp_path / "words").mkdir()
    source = SHARED / "hf-glm-tiny" / "model" / "cog-pretrain.model"
    (tmp_path / "words" / source.name).write_bytes(source.read_bytes())
    convert(GOLDEN / "ckpt_MP2", tmp_path / "new", to=to, heads=4, tokenizer=tmp_path / "words")
    found, expected = read_tokenizer(tmp_path / "new"), read_tokenizer(tmp_path / "words")
    assert (type(found), found.spacing) == (type(expected), "training")
    text = "凯旋门位于 [MASK] 市。<|startofpiece|> [gMASK]"
    assert found(text).input_ids == expected(text).input_ids
    assert read_config(tmp_path / "new").gmask_token_id == expected.gmask_token_id == 479
    settings_names = json.loads((tmp_path / "new" / "tokenizer_config.json").read_text())
    assert ("additional_special_tokens" in settings_names) == (to == "huggingface")
    convert(tmp_path / "new", tmp_path / "again", to=to)
    for path in (tmp_path / "new").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


# --- the verb


def test_the_verb_prints_what_was_done_or_json(folder: Path, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(models.convert)
    done = CliRunner().invoke(app, [str(folder), str(tmp_path / "a"), "--to", "megatron", "--parts", "2"])
    lines = dict(line.split(None, 1) for line in done.stdout.splitlines() if not line.startswith("note"))
    assert lines["read"] == f"{folder} (safetensors)"
    assert lines["written"] == f"{tmp_path / 'a'} (megatron, 2 ranks)"
    count = sum(tensor.numel() for tensor in tensors_of(folder).values())
    assert lines["parameters"] == f"{count:,} in {len(tensors_of(folder))} tensors, float32"
    assert lines["compared"] == "every tensor, bit by bit"
    assert "1/mp_rank_01_model_states.pt" in lines["files"]
    arguments = [str(tmp_path / "a"), str(tmp_path / "b"), "--heads", "4", "--tokenizer", str(folder), "--json"]
    values = json.loads(CliRunner().invoke(app, arguments).stdout)
    assert ConversionReport(**values).parameters == count and values["source_parts"] == 2
    assert values["files"]["model.safetensors"] == (tmp_path / "b" / "model.safetensors").stat().st_size


def test_no_place_on_this_machine_is_written_down(folder: Path, ranks: Path, tmp_path: Path) -> None:
    for number, to in enumerate(("gmask", "huggingface")):
        convert(ranks, tmp_path / str(number), to=to, heads=4, tokenizer=folder)
        for path in (tmp_path / str(number)).glob("*.json"):
            assert str(folder.parent) not in path.read_text() and str(tmp_path) not in path.read_text()
