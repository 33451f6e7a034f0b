"""Does our ChatGLM tokenizer give every id and text that the published one gives?"""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gmask
from gmask.tokenizers.chatglm import ChatGLMTokenizer, ChatGLMTokenizerV0, restore_white_space, spell_white_space

SHARED = Path(__file__).parents[2] / "shared" / "golden"
VOCABULARY = SHARED / "chatglm-tiny" / "model" / "ice_text.model"
needs_vocabulary = pytest.mark.skipif(not VOCABULARY.is_file(), reason="the tiny vocabulary is not here")


@pytest.fixture(scope="module")
def tokenizer() -> ChatGLMTokenizer:
    return ChatGLMTokenizer(str(VOCABULARY))


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return json.loads((SHARED / "tokenizers" / "chatglm" / "v1.1.json").read_text("utf-8"))


@needs_vocabulary
def test_every_published_string(tokenizer: ChatGLMTokenizer, golden: dict[str, Any]) -> None:
    wrong = []
    for record in golden["strings"]:
        text = record["text"]
        ours = {
            "preprocessed": spell_white_space(text),
            "tokens": tokenizer.tokenize(text),
            "ids": tokenizer(text)["input_ids"],
            "ids_no_special": tokenizer(text, add_special_tokens=False)["input_ids"],
            "decode": tokenizer.decode(record["ids"], clean_up_tokenization_spaces=True),
            "decode_skip_special": tokenizer.decode(
                record["ids"], skip_special_tokens=True, clean_up_tokenization_spaces=True
            ),
        }
        wrong += [(text, field) for field, value in ours.items() if value != record[field]]
    assert len(golden["strings"]) == 68
    assert wrong == []


@needs_vocabulary
def test_every_published_pair_batch_and_odd_decoding(tokenizer: ChatGLMTokenizer, golden: dict[str, Any]) -> None:
    for record in golden["pairs"]:
        assert tokenizer(*record["pair"])["input_ids"] == record["ids"]
    for record in golden["decode_cases"]:
        assert tokenizer.decode(record["ids"]) == record["decode"]
        assert tokenizer.decode(record["ids"], skip_special_tokens=True) == record["decode_skip_special"]
    for record in golden["padding"]:
        if "texts" in record:
            batch = tokenizer(record["texts"], **{**record["kwargs"], "return_tensors": None})
            assert batch["input_ids"] == record["out"]["input_ids"], record["texts"]
            tokens = [[int(index != 3) for index in row] for row in batch["input_ids"]]
            assert batch["attention_mask"] == tokens


@needs_vocabulary
def test_special_ids_and_sizes(tokenizer: ChatGLMTokenizer, golden: dict[str, Any]) -> None:
    assert {name: getattr(tokenizer, name) for name in golden["ids"]} == golden["ids"]
    assert (len(tokenizer), tokenizer.vocab_size) == (golden["len"], golden["vocab_size"])
    assert tokenizer.all_special_tokens == golden["all_special_tokens"]
    assert tokenizer.padding_side == golden["padding_side"]


@needs_vocabulary
def test_a_saved_tokenizer_comes_back_the_same(tokenizer: ChatGLMTokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    again = ChatGLMTokenizer.from_pretrained(tmp_path)
    text = "你好 [MASK]  def f(x):\n\treturn [gMASK] <eop>"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.gmask_token_id == tokenizer.gmask_token_id
    assert again.all_special_tokens == tokenizer.all_special_tokens


@needs_vocabulary
def test_ids_beyond_the_vocabulary_are_silent(tokenizer: ChatGLMTokenizer) -> None:
    assert tokenizer.decode([5, 74, 860, 75]) == tokenizer.decode([5, 74, 75])


@needs_vocabulary
def test_every_record_of_the_first_published_vocabulary(tmp_path: Path) -> None:
    folder = SHARED / "tokenizers" / "chatglm"
    golden = json.loads((folder / "v0.json").read_text("utf-8"))
    first = ChatGLMTokenizerV0(str(folder / "ice_text.base.model"))
    first.save_pretrained(tmp_path)
    for tokenizer in (first, ChatGLMTokenizerV0.from_pretrained(tmp_path)):
        for record in golden["strings"]:
            assert tokenizer(record["text"])["input_ids"] == record["ids"], record["text"]
            assert tokenizer(record["text"], add_special_tokens=False)["input_ids"] == record["ids_no_special"]
            text = tokenizer.decode(record["ids"], skip_special_tokens=True)
            assert text == record["decode_skip_special"].replace(" ⁇ ", "")  # <unk> is special, here as everywhere
        for record in golden["pairs"]:
            assert tokenizer(*record["pair"])["input_ids"] == record["ids"]
        for record in golden["padding"]:
            assert tokenizer(record["texts"], padding=True)["input_ids"] == record["out"]["input_ids"]
        assert tokenizer.vocab_size == golden["vocab_size"]
        assert tokenizer.all_special_tokens == golden["all_special_tokens"]
        ours = [tokenizer.convert_tokens_to_ids(name.split()[-1]) for name in golden["ids"] if "<" in name]
        assert ours == [index for name, index in golden["ids"].items() if "<" in name]


def test_a_missing_or_damaged_vocabulary_is_named(tmp_path: Path) -> None:
    with pytest.raises(gmask.GmaskError, match=r"ice_text\.model.*published"):
        ChatGLMTokenizer(str(tmp_path / "ice_text.model"))
    for content, message in (("no pieces", r"again"), ("version https://git-lfs.github.com/spec/v1\n", "git lfs pull")):
        (tmp_path / "ice_text.model").write_text(content)
        with pytest.raises(gmask.GmaskError, match=rf"ice_text\.model.*{message}"):
            ChatGLMTokenizer(str(tmp_path / "ice_text.model"))


@given(st.text(alphabet="a \n\t你", max_size=400))
@settings(max_examples=60, deadline=None)
def test_white_space_survives_its_spelling(text: str) -> None:
    spelt = spell_white_space(text)
    assert restore_white_space(spelt) == text
    assert "\n" not in spelt and "\t" not in spelt and "  " not in spelt.replace("<|blank_80|> ", "")
