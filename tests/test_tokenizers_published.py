"""Do the tokenizers give what the published ones gave, record by record, and what their slow forms give on any text?"""

import copy
import json
import pickle
import unicodedata
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import regex
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BatchEncoding
from transformers.models.auto.tokenization_auto import REGISTERED_TOKENIZER_CLASSES, AutoTokenizer
from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

from gmask.checkpoints.hub import BUNDLED
from gmask.errors import GmaskError
from gmask.tokenizers.folder import CLASS_NAMES, CLASSES, read_tokenizer
from gmask.tokenizers.glm_build_inputs import GLMBatchEncoding
from gmask.tokenizers.special_tokens import TRAINING_TOKENS
from published_vocabularies import FILES, SHARED, copy_vocabulary, needs_vocabularies

pytestmark = needs_vocabularies

HF_FILES = {f"hf-{kind}.json": kind for kind in CLASSES}
THUDM_FILES = {
    "thudm-cog-pretrain-fix.json": "chinese", "thudm-cog-pretrain-nofix.json": "chinese-nofix",
    "thudm-cog-pretrain-nofix-dblock.json": "chinese-nofix-dblock", "thudm-gpt2-taskmask.json": "gpt2",
    "thudm-gpt2-taskmask-dblock.json": "gpt2-dblock", "thudm-bert-uncased.json": "bert",
    "thudm-bert-uncased-taskmask.json": "bert-taskmask", "thudm-roberta.json": "roberta",
    "thudm-roberta-taskmask.json": "roberta-taskmask",
}  # fmt: skip
"""Which row of `TRAINING_TOKENS` each of the training code's records is of."""

DIFFERENT = {
    ("hf-chinese.json", "padding", "token_type_ids"): "the reference's are shorter than input_ids; none are returned",
    ("hf-chinese.json", "model_input_names"): "without token_type_ids, for the same reason; no model takes them",
}
"""What is not as recorded, and why."""

NOT_COMPARED = {"name", "reference", "source", "model_type", "flags", "used_by", "order_of_splitting"}
"""Where a record comes from; the order of splitting shows in the ids."""

GLM_ROLES = {"pad", "eos", "bos", "unk", "sep", "cls", "mask", "sop", "eop", "smask", "gmask"}


@cache
def golden(name: str) -> dict[str, Any]:
    return json.loads((SHARED / "tokenizers" / name).read_text("utf-8"))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Vocabulary files alone, by kind."""
    return {kind: copy_vocabulary(kind, tmp_path_factory.mktemp(kind)) for kind in FILES}


@pytest.fixture(scope="module")
def published(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Tokenizers of folders in the Hugging Face form, by kind."""
    tokenizers = {}
    for name, kind in HF_FILES.items():
        folder = copy_vocabulary(kind, tmp_path_factory.mktemp(f"hf-{kind}"))
        (folder / "tokenizer_config.json").write_text(json.dumps(golden(name)["config"]), "utf-8")
        (folder / "added_tokens.json").write_text(json.dumps(golden(name)["added_tokens"]), "utf-8")
        tokenizers[kind] = read_tokenizer(folder)
    return tokenizers


def test_every_record_is_compared_or_listed() -> None:
    """A new file, or a new key in one, makes this fail."""
    files = {path.name for path in (SHARED / "tokenizers").glob("*.json")} - {"case.json"}
    assert files == HF_FILES.keys() | THUDM_FILES.keys()
    of_hf = {"special", "vocab_size", "len", "model_input_names", "truncation_side", "padding_side", "strings", "pairs"}
    of_hf |= {"padding", "build_inputs_for_generation", "build_inputs_for_multiple_choice", "config", "added_tokens"}
    of_thudm = {"num_tokens", "padded_vocab_size_128", "command_tokens", "strings"}
    for name in files:
        assert golden(name).keys() - NOT_COMPARED == (of_hf if name in HF_FILES else of_thudm), name
        assert len(golden(name)["strings"]) == 68
        keys = {"text", "ids", "decoded"} | ({"ids_no_special", "decoded_skip_special"} if name in HF_FILES else set())
        assert all(record.keys() == keys for record in golden(name)["strings"]), name
    for name in HF_FILES:
        assert golden(name)["special"].keys() == GLM_ROLES
        for record in golden(name)["padding"]:
            assert record.keys() - {"max_length", "truncation_max_length"} == {"padding_side", "texts", "out"}
        for record in golden(name)["pairs"]:
            assert record.keys() in ({"pair", "ids"}, {"pair", "error"})
    for name, *keys in DIFFERENT:
        assert keys[0] in golden(name)


@pytest.mark.parametrize("name", HF_FILES)
def test_published_texts(name: str, published: dict[str, Any]) -> None:
    tokenizer = published[HF_FILES[name]]
    for record in golden(name)["strings"]:
        text, ids = record["text"], record["ids"]
        assert tokenizer(text)["input_ids"] == ids, text
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == record["ids_no_special"], text
        assert tokenizer.decode(ids) == record["decoded"], text
        assert tokenizer.decode(ids, skip_special_tokens=True) == record["decoded_skip_special"], text


@pytest.mark.parametrize("name", HF_FILES)
def test_published_vocabulary(name: str, published: dict[str, Any]) -> None:
    tokenizer, record = published[HF_FILES[name]], golden(name)
    assert type(tokenizer).__name__ == record["config"]["tokenizer_class"]
    for role, expected in record["special"].items():
        if isinstance(expected, str):
            for attribute in (f"{role}_token", f"{role}_token_id"):
                with pytest.raises(NotImplementedError) as caught:
                    getattr(tokenizer, attribute)
                assert f"NotImplementedError: {caught.value}" == expected
        else:
            assert [getattr(tokenizer, f"{role}_token"), getattr(tokenizer, f"{role}_token_id")] == expected
    assert (len(tokenizer), tokenizer.vocab_size) == (record["len"], record["vocab_size"])
    assert record["added_tokens"].items() <= tokenizer.get_added_vocab().items()
    assert (tokenizer.truncation_side, tokenizer.padding_side) == (record["truncation_side"], record["padding_side"])
    if (name, "model_input_names") not in DIFFERENT:
        assert tokenizer.model_input_names == record["model_input_names"]
    else:
        assert "token_type_ids" not in tokenizer.model_input_names


@pytest.mark.parametrize("name", HF_FILES)
def test_published_pairs_and_padding(name: str, published: dict[str, Any]) -> None:
    tokenizer = copy.deepcopy(published[HF_FILES[name]])
    for record in golden(name)["pairs"]:
        if "error" in record:
            with pytest.raises(GmaskError, match="join the two"):
                tokenizer(*record["pair"])
        else:
            assert tokenizer(*record["pair"])["input_ids"] == record["ids"]
    for record in golden(name)["padding"]:
        tokenizer.padding_side = record["padding_side"]
        if "max_length" in record:
            length = {"padding": "max_length", "max_length": record["max_length"]}
        elif "truncation_max_length" in record:
            length = {"truncation": True, "max_length": record["truncation_max_length"]}
        else:
            length = {"padding": True}
        ignored = {key for *place, key in DIFFERENT if place == [name, "padding"]}
        expected = {key: value for key, value in record["out"].items() if key not in ignored}
        assert dict(tokenizer(record["texts"], **length)) == expected


def described(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return {"dtype": dtype, "shape": list(value.shape), "value": value.tolist()}
    return [described(part) for part in value]


@pytest.mark.parametrize("method", ["build_inputs_for_generation", "build_inputs_for_multiple_choice"])
@pytest.mark.parametrize("name", HF_FILES)
def test_published_model_inputs(name: str, method: str, published: dict[str, Any]) -> None:
    tokenizer = copy.deepcopy(published[HF_FILES[name]])
    for record in golden(name)[method]:
        tokenizer.padding_side = record["padding_side"]
        settings = record.get("kwargs") or {"choices": record["choices"]}
        encoded = tokenizer(record["texts"], return_tensors="pt", padding=True, **record.get("tokenizer_kwargs", {}))
        if "error" in record:
            with pytest.raises(GmaskError, match="mask token"):
                getattr(tokenizer, method)(encoded, **settings)
        else:
            inputs = getattr(tokenizer, method)(encoded, **settings)
            assert {key: described(value) for key, value in inputs.items()} == record["out"]


@pytest.mark.parametrize("name", THUDM_FILES)
def test_texts_as_the_training_code_read_them(name: str, folders: dict[str, Path]) -> None:
    kind, record = THUDM_FILES[name], golden(name)
    tokenizer = read_tokenizer(folders[kind.split("-")[0]], kind=kind)
    for string in record["strings"]:
        assert tokenizer(string["text"], add_special_tokens=False)["input_ids"] == string["ids"], string["text"]
        assert tokenizer.decode(string["ids"]) == string["decoded"], string["text"]
    table = tokenizer.get_added_vocab()
    for role, token in record["command_tokens"].items():
        assert table[token["token"]] == token["id"], role
        sides = tokenizer.rule.sides_of(token["token"])
        assert (sides.left, sides.right) == (token["lstrip"], token["rstrip"]), role
    assert len(tokenizer) == record["num_tokens"]
    assert len(tokenizer) <= record["padded_vocab_size_128"] < len(tokenizer) + 128


def slow_bert(folder: Path) -> Callable[[str], list[int]]:
    slow = BertTokenizerLegacy(str(folder / "vocab.txt"))
    return lambda text: slow.convert_tokens_to_ids(slow.tokenize(text, split_special_tokens=True))


def slow_gpt2(folder: Path) -> Callable[[str], list[int]]:
    """Byte-level BPE by its definition: the pair of the lowest rank is merged, until there is none."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = {byte: chr(byte) for byte in plain} | {byte: chr(256 + place) for place, byte in enumerate(others)}
    words = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    ids = json.loads((folder / "vocab.json").read_text("utf-8"))
    lines = (folder / "merges.txt").read_text("utf-8").split("\n")[1:]
    ranks = {tuple(line.split(" ")): rank for rank, line in enumerate(lines) if line}

    def merge(parts: list[str]) -> list[str]:
        while known := [pair for pair in pairwise(parts) if pair in ranks]:
            best = min(known, key=lambda pair: ranks[pair])
            merged: list[str] = []
            for part in parts:
                if merged and not merged[-1].endswith("\n") and (merged[-1], part) == best:
                    merged[-1] += part + "\n"  # done: not to be merged with what follows in this round
                else:
                    merged.append(part)
            parts = [part.removesuffix("\n") for part in merged]
        return parts

    return lambda text: [
        ids[part] for word in words.findall(text) for part in merge([letters[byte] for byte in word.encode()])
    ]


def slow_chinese(folder: Path) -> Callable[[str], list[int]]:
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "cog-pretrain.model"))
    return model.encode  # type: ignore[no-any-return]


SLOW = {"bert": slow_bert, "gpt2": slow_gpt2, "roberta": slow_gpt2, "chinese": slow_chinese}
OLD_CHARACTERS = st.characters(exclude_categories=["Cs", "Cn", "Co"]).filter(
    lambda char: unicodedata.ucd_3_2_0.category(char) == unicodedata.category(char)
)
"""BERT's text is cut by tables of Unicode; about newer characters those of Python and of `tokenizers` disagree."""


@pytest.mark.parametrize("kind", SLOW)
def test_any_text_has_the_ids_of_the_slow_path(kind: str, folders: dict[str, Path], published: dict[str, Any]) -> None:
    slow, tokenizer = SLOW[kind](folders[kind]), published[kind]

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]  # type: ignore[no-any-return]

    @settings(max_examples=150, deadline=None)
    @given(st.text(OLD_CHARACTERS if kind == "bert" else st.characters(exclude_categories=["Cs"]), max_size=40))
    def check(text: str) -> None:
        assert encode(text) == slow(text)

    check()
    for record in golden("hf-gpt2.json")["strings"]:
        if "[" not in record["text"]:  # special tokens, which the slow BERT leaves whole
            assert encode(record["text"]) == slow(record["text"])


@pytest.mark.parametrize("kind", ["gpt2", "roberta"])
def test_byte_level_text_comes_back(kind: str, published: dict[str, Any]) -> None:
    @given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
    def check(text: str) -> None:
        ids = published[kind](text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert published[kind].decode(ids, clean_up_tokenization_spaces=False) == text

    check()


def assert_same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    assert len(one) == len(other)
    assert one.get_added_vocab() == other.get_added_vocab()
    assert set(one.all_special_ids) == set(other.all_special_ids)
    assert one.special_tokens_map == other.special_tokens_map
    for record in golden("hf-chinese.json")["strings"]:
        ids = one(record["text"])["input_ids"]
        assert other(record["text"])["input_ids"] == ids
        for skips in (True, False):
            assert other.decode(ids, skip_special_tokens=skips) == one.decode(ids, skip_special_tokens=skips)


@pytest.mark.parametrize("form", [*HF_FILES, *TRAINING_TOKENS, "bundled"])
def test_a_saved_tokenizer_is_the_same(
    form: str, folders: dict[str, Path], published: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read by gmask, by AutoTokenizer once the class is registered by its name, and pickled."""
    if form == "bundled":
        tokenizer: Any = read_tokenizer(BUNDLED)
    elif form in HF_FILES:
        tokenizer = published[HF_FILES[form]]
    else:
        tokenizer = read_tokenizer(folders[form.split("-")[0]], kind=form)
    tokenizer.save_pretrained(tmp_path)
    assert_same(tokenizer, read_tokenizer(tmp_path))
    name = type(tokenizer).__name__
    monkeypatch.setitem(REGISTERED_TOKENIZER_CLASSES, name, CLASS_NAMES[name])
    assert_same(tokenizer, AutoTokenizer.from_pretrained(tmp_path))
    assert_same(tokenizer, pickle.loads(pickle.dumps(tokenizer)))


@pytest.mark.parametrize("kind", CLASSES)
def test_tokens_that_a_user_adds_are_saved(kind: str, published: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(published[kind])
    tokenizer.add_tokens(["added word"])
    tokenizer.save_pretrained(tmp_path)
    ids = tokenizer("x added word y")["input_ids"]
    assert len(published[kind]) in ids
    again = read_tokenizer(tmp_path)
    assert again("x added word y")["input_ids"] == ids
    assert "added word" in again.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", CLASSES)
def test_ids_that_pad_the_vocabulary_are_no_text(kind: str, published: dict[str, Any]) -> None:
    """The reference raises IndexError; the model has rows for them, so they may be drawn."""
    tokenizer = published[kind]
    ids = tokenizer("hello", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode([*ids, len(tokenizer), len(tokenizer) + 37, *ids]) == tokenizer.decode(ids * 2)


def test_a_question_is_cut_at_its_start_and_its_mask_kept(published: dict[str, Any]) -> None:
    """The published example of GLM-350M-chinese."""
    tokenizer = published["chinese"]
    prompt, prefix = "我不能确定对方是不是喜欢我,我却想分分秒秒跟他在一起" * 3, "回答：" + tokenizer.mask_token
    whole = tokenizer(prompt, prefix)["input_ids"]
    cut = tokenizer(
        prompt, prefix, max_length=20, truncation="only_first", return_tensors="pt", return_token_type_ids=False
    )
    first, second = whole[1 : whole.index(tokenizer.sep_token_id)], whole[whole.index(tokenizer.sep_token_id) :]
    kept = 20 - 1 - len(second)
    assert cut["input_ids"].tolist() == [[tokenizer.cls_token_id, *first[-kept:], *second]]
    inputs = tokenizer.build_inputs_for_generation(cut, max_gen_length=5, padding=True)
    assert inputs["input_ids"][0, -1] == tokenizer.sop_token_id


def test_model_inputs_move_as_a_whole(published: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = published["gpt2"]
    inputs = tokenizer.build_inputs_for_multiple_choice(tokenizer("a [MASK]", return_tensors="pt"), [["b", "c d"]])
    assert isinstance(inputs, BatchEncoding) and isinstance(inputs, GLMBatchEncoding)
    assert inputs.to("meta") is inputs
    assert {tensor.device.type for key in ("input_ids", "attention_mask") for tensor in inputs[key]} == {"meta"}
    assert {ids.device.type for key in ("choice_ids", "choice_indices") for ids in inputs[key][0]} == {"meta"}
    moved: list[Any] = []
    monkeypatch.setattr(inputs, "to", lambda device: moved.append(device) or inputs)
    assert inputs.cuda() is inputs
    assert moved == [torch.device("cuda")]


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("build_inputs_for_generation", {"targets": ["a", "b"]}, "2 targets for 1 texts"),
        ("build_inputs_for_multiple_choice", {"choices": [["a"], ["b"]]}, "2 lists of choices for 1 texts"),
        ("build_inputs_for_multiple_choice", {"choices": [["a", ""]]}, "a choice is empty"),
        ("build_inputs_for_multiple_choice", {"choices": [["a"]], "max_length": 3}, "more than max_length=3"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(
    method: str, arguments: dict[str, Any], message: str, published: dict[str, Any]
) -> None:
    tokenizer = published["gpt2"]
    with pytest.raises(GmaskError, match=message):
        getattr(tokenizer, method)(tokenizer("a [MASK]", return_tensors="pt"), **arguments)


def test_rows_of_different_lengths_are_refused(published: dict[str, Any]) -> None:
    tokenizer = published["gpt2"]
    with pytest.raises(GmaskError, match="padding=True"):
        tokenizer.build_inputs_for_generation(tokenizer(["a [MASK]", "[MASK]"]))
