"""Does every tokenizer class do what transformers' common tests ask of a tokenizer?

Restated from ``tests/test_tokenization_common.py`` and its mixins of transformers, whose package leaves them out. Added
tokens are in test_added_tokens.py. What cannot hold is refused or shown below, and listed in
docs/explanation/differences.md.
"""

from pathlib import Path
from typing import Any

import pytest

from gmask.errors import GmaskError
from gmask.tokenizers.folder import read_tokenizer
from tiny_vocabularies import KINDS, make_tokenizer

TEXTS = ["the old man went down", "a", "我今天早上去市场", "the  dog.\nthe river"]
PAIRED = [kind for kind in KINDS if not kind.startswith("gpt2")]
ALIGNED = [kind for kind in KINDS if "chinese" not in kind and "chatglm" not in kind]
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }};{% endfor %}"

each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def tokenizer(kind: str) -> Any:
    return make_tokenizer(kind)


@each_kind
def test_a_batch_gives_what_single_texts_give(tokenizer: Any) -> None:
    for options in ({}, {"add_special_tokens": False}):
        assert tokenizer(TEXTS, **options)["input_ids"] == [tokenizer(text, **options)["input_ids"] for text in TEXTS]
        assert tokenizer(TEXTS, **options)["input_ids"] == [tokenizer.encode(text, **options) for text in TEXTS]
    assert [tokenizer.decode(ids) for ids in tokenizer(TEXTS)["input_ids"]] == tokenizer.batch_decode(
        tokenizer(TEXTS)["input_ids"]
    )


@each_kind
def test_tokens_are_the_ids_by_name(tokenizer: Any) -> None:
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        tokens = tokenizer.tokenize(text)
        assert tokenizer.convert_tokens_to_ids(tokens) == ids
        assert tokenizer.convert_ids_to_tokens(ids) == tokens
        told = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        assert tokenizer.convert_tokens_to_string(tokens).split() == told.split()


@each_kind
def test_the_vocabulary_says_what_each_id_is(tokenizer: Any) -> None:
    vocabulary = tokenizer.get_vocab()
    assert max(vocabulary.values()) == len(tokenizer) - 1
    assert tokenizer.vocab_size <= len(tokenizer)
    for token in [*list(vocabulary)[:40], *list(vocabulary)[-40:], *tokenizer.all_special_tokens]:
        assert tokenizer.convert_tokens_to_ids(token) == vocabulary[token]
    assert tokenizer.all_special_ids == [vocabulary[token] for token in tokenizer.all_special_tokens]
    assert all(0 <= index < len(tokenizer) for index in tokenizer.all_special_ids)


@each_kind
def test_the_mask_of_special_tokens_has_their_number(kind: str, tokenizer: Any) -> None:
    """What is added to a text, which is counted without reading one."""
    added = tokenizer.num_special_tokens_to_add(pair=False)
    for text in TEXTS:
        plain = tokenizer(text, add_special_tokens=False)["input_ids"]
        whole = tokenizer(text, return_special_tokens_mask=True)
        mask = whole["special_tokens_mask"]
        assert len(mask) == len(whole["input_ids"]) == len(plain) + added
        assert [index for index, special in zip(whole["input_ids"], mask, strict=True) if not special] == plain
    if kind in PAIRED:
        pair = tokenizer("the old", "man", return_special_tokens_mask=True)
        parts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("the old", "man")]
        mask = pair["special_tokens_mask"]
        kept = [index for index, special in zip(pair["input_ids"], mask, strict=True) if not special]
        assert kept == [*parts[0], *parts[1]]
        assert sum(mask) == tokenizer.num_special_tokens_to_add(pair=True)


@pytest.mark.parametrize("kind", ["gpt2", "gpt2-training"])
def test_the_vocabulary_of_gpt2_has_no_form_for_pairs(tokenizer: Any) -> None:
    with pytest.raises(GmaskError, match="no form for pairs"):
        tokenizer("the old", "man")


@each_kind
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_stands_on_the_side_that_is_asked_for(tokenizer: Any, side: str) -> None:
    alone = tokenizer(TEXTS)["input_ids"]
    longest = max(map(len, alone))
    for options, width in (
        (dict(padding=True), longest),
        (dict(padding="max_length", max_length=longest + 3), longest + 3),
        (dict(padding=True, pad_to_multiple_of=8), -(-longest // 8) * 8),
    ):
        batch = tokenizer(TEXTS, padding_side=side, **options)
        for row, ids, mask in zip(alone, batch["input_ids"], batch["attention_mask"], strict=True):
            filler, ones = [tokenizer.pad_token_id] * (width - len(row)), [1] * len(row)
            assert ids == (filler + row if side == "left" else row + filler)
            assert mask == ([0] * len(filler) + ones if side == "left" else ones + [0] * len(filler))
    tokenizer.padding_side = side
    assert tokenizer(TEXTS, padding=True) == tokenizer(TEXTS, padding=True, padding_side=side)
    later = tokenizer.pad({"input_ids": alone})
    assert later["input_ids"] == tokenizer(TEXTS, padding=True)["input_ids"]
    assert tokenizer(TEXTS, padding=True, return_tensors="pt")["input_ids"].tolist() == later["input_ids"]


@each_kind
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_long_text_is_cut_on_the_side_that_is_asked_for(tokenizer: Any, side: str) -> None:
    tokenizer.truncation_side = side
    plain = tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"]
    added = tokenizer.num_special_tokens_to_add()
    kept = plain[-3:] if side == "left" else plain[:3]
    cut = tokenizer(TEXTS[0], truncation=True, max_length=3 + added, return_special_tokens_mask=True)
    mask = cut["special_tokens_mask"]
    assert len(cut["input_ids"]) == 3 + added
    assert [index for index, special in zip(cut["input_ids"], mask, strict=True) if not special] == kept
    assert tokenizer(TEXTS[0], add_special_tokens=False, truncation=True, max_length=3)["input_ids"] == kept
    tokenizer.model_max_length = 3 + added
    assert tokenizer(TEXTS[0], truncation=True)["input_ids"] == cut["input_ids"]


@each_kind
def test_words_may_be_given_apart(tokenizer: Any) -> None:
    words = ["the", "old", "man"]
    apart = tokenizer(words, is_split_into_words=True, add_special_tokens=False)["input_ids"]
    assert "".join(tokenizer.decode(apart).split()) == "theoldman"
    batch = tokenizer([words, ["a"]], is_split_into_words=True, add_special_tokens=False)["input_ids"]
    assert batch[0] == apart


@each_kind
def test_ids_can_be_prepared_by_hand(kind: str, tokenizer: Any) -> None:
    """By the classes on the `tokenizers` library as well as by the others."""
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not tokenizer.is_fast:
            assert tokenizer.prepare_for_model(ids)["input_ids"] == tokenizer(text)["input_ids"]
            assert tokenizer.build_inputs_with_special_tokens(ids) == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("kind", ALIGNED)
def test_a_token_knows_its_place_in_the_text(tokenizer: Any) -> None:
    for text in TEXTS:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        for index, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            spelt = tokenizer.decode([index]).removeprefix("##").strip()
            if "�" not in spelt and index not in tokenizer.all_special_ids:
                assert spelt == text[start:end].strip()
        assert encoded.char_to_token(0) == 0


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ALIGNED])
def test_sentencepiece_gives_no_places(tokenizer: Any) -> None:
    assert not tokenizer.is_fast
    assert "offset_mapping" not in tokenizer("a", return_offsets_mapping=True)


@each_kind
def test_settings_and_chat_templates_are_saved(tokenizer: Any, tmp_path: Path) -> None:
    sides = {
        name: "left" if getattr(tokenizer, name) == "right" else "right" for name in ("padding_side", "truncation_side")
    }
    tokenizer.save_pretrained(tmp_path)
    tokenizer = type(tokenizer).from_pretrained(tmp_path, **sides)
    assert {name: getattr(tokenizer, name) for name in sides} == sides
    tokenizer.model_max_length, tokenizer.chat_template = 42, TEMPLATE
    tokenizer.save_pretrained(tmp_path)
    again = read_tokenizer(tmp_path)
    for name in ("padding_side", "truncation_side", "model_max_length", "chat_template", "model_input_names"):
        assert getattr(again, name) == getattr(tokenizer, name), name
    messages = [{"role": "user", "content": "the man"}, {"role": "assistant", "content": "a dog"}]
    told = again.apply_chat_template(messages, tokenize=False)
    assert told == "user: the man;assistant: a dog;"
    ids = again.apply_chat_template(messages, tokenize=True)["input_ids"]
    assert ids == again(told, add_special_tokens=False)["input_ids"]


@each_kind
def test_an_empty_text_is_a_text(tokenizer: Any) -> None:
    empty = tokenizer("")["input_ids"]
    assert len(empty) == tokenizer.num_special_tokens_to_add()
    assert tokenizer("", add_special_tokens=False)["input_ids"] == []
    assert tokenizer(["", "a"])["input_ids"] == [empty, tokenizer("a")["input_ids"]]
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize("kind", [kind for kind in ALIGNED if kind != "ours"])
def test_a_published_vocabulary_is_not_trained_anew(tokenizer: Any) -> None:
    with pytest.raises(GmaskError, match="train-tokenizer"):
        tokenizer.train_new_from_iterator([TEXTS], 300)


@pytest.mark.parametrize("kind", ["chinese", "roberta-training"])
def test_an_id_may_have_two_names(tokenizer: Any) -> None:
    assert len(tokenizer.get_vocab()) > len(set(tokenizer.get_vocab().values()))
