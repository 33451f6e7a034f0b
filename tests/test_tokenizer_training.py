"""Does a tokenizer of ours keep every text whole, and does it have the special tokens of a GLM?"""

import errno
import json
import re
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from gmask.errors import GmaskError
from gmask.tasks.records import Source
from gmask.training.tokenizer import (
    BYTE_TOKENS,
    SPECIAL_TOKENS,
    save_tokenizer,
    train_from_sources,
    train_tokenizer,
)

VOCAB_SIZE = 500
TEXTS = [
    "The capital of France is Paris, on the river Seine. The river is wide, and the capital is old.",
    "She didn't know that they'd gone to the river; the others didn't know it either.",
    "法国的首都是巴黎，巴黎在塞纳河上。中国的首都是北京，北京在中国的北方。",
    "中华人民共和国的首都是北京。中华人民共和国的法律。中华人民共和国的历史——很长……",
    "In 1984 there were 2048 rooms.\n\n    x = f(y) + 1  # a line of code\n\tand a tab\n",
] * 4


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, vocab_size=VOCAB_SIZE)


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(tokenizer, folder, max_length=512)
    return folder


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.id_to_token(token) for token in tokenizer.encode(text, add_special_tokens=False).ids]


ODD_TEXT = st.lists(
    st.sampled_from(["the river", " 首都", "龘", "𠮷", "👩‍👩‍👧", "é", "<0x41>", "<0xE4>"])
    | st.sampled_from(["  ", "   \n", "\n\n\n", "\r\n", "\t", "\u3000"])
    | st.text(max_size=8)
).map("".join)


@given(ODD_TEXT)
@example("a literal <0x41> and the bytes <0xE4><0xBD><0xA0>")
@example(" two  three   spaces at the end   ")
def test_decoding_what_was_encoded_gives_the_same_text(tokenizer: Tokenizer, text: str) -> None:
    text = unicodedata.normalize("NFC", text)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_the_byte_tokens_are_in_the_vocabulary_but_text_never_matches_them(tokenizer: Tokenizer) -> None:
    vocabulary = tokenizer.get_vocab()
    assert [vocabulary[token] for token in BYTE_TOKENS] == list(range(16, 272))
    assert pieces(tokenizer, "<0x41>") == ["<", "0", "x", "4", "1", ">"]
    assert pieces(tokenizer, "龘") == ["<0xE9>", "<0xBE>", "<0x98>"]


def test_the_special_tokens_come_first_in_the_agreed_order(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(16))


def test_tokens_carry_the_space_before_a_word_and_stay_inside_words(tokenizer: Tokenizer) -> None:
    assert pieces(tokenizer, " the river") == [" the", " river"]
    assert pieces(tokenizer, "they didn't")[-1] == "'t"
    assert pieces(tokenizer, "1984") == ["1", "9", "8", "4"]
    assert "".join(pieces(tokenizer, "的首都是")) == "的首都是"
    assert not [token for token in tokenizer.get_vocab() if len(token) > 1 and "，" in token]


def test_no_chinese_token_is_longer_than_four_characters(tokenizer: Tokenizer) -> None:
    chinese = [token for token in tokenizer.get_vocab() if "\u4e00" <= token[0] <= "\u9fff"]
    assert max(map(len, chinese)) in range(2, 5)


def test_a_blank_takes_the_space_at_its_left_and_only_that(tokenizer: Tokenizer) -> None:
    assert pieces(tokenizer, " the [MASK] river") == [" the", "[MASK]", " river"]
    assert tokenizer.encode("of[gMASK]").ids[-2:] == [7, 1]


def test_special_tokens_can_be_read_as_plain_text(tokenizer: Tokenizer) -> None:
    literal = Tokenizer.from_str(tokenizer.to_str())
    literal.encode_special_tokens = True
    ids = literal.encode("a [MASK] in a text", add_special_tokens=False).ids
    assert min(ids) >= len(SPECIAL_TOKENS)
    assert literal.decode(ids) == "a [MASK] in a text"


def test_transformers_loads_the_folder_with_every_role_set(tokenizer: Tokenizer, folder: Path) -> None:
    loaded = AutoTokenizer.from_pretrained(folder)
    roles = ("pad", "eos", "cls", "sep", "unk", "mask", "smask", "gmask", "sop", "eop", "dblock")
    assert [getattr(loaded, f"{role}_token_id") for role in roles] == list(range(11))
    assert len(loaded) == VOCAB_SIZE
    assert loaded.model_max_length == 512
    ids = loaded("of the [sMASK] river")["input_ids"]
    assert ids[0] == loaded.cls_token_id and ids[-1] == loaded.eos_token_id and loaded.smask_token_id in ids
    assert ids == tokenizer.encode("of the [sMASK] river").ids
    assert loaded.decode(ids, skip_special_tokens=True) == "of the river"
    assert loaded.decode(loaded("a , b .", add_special_tokens=False)["input_ids"]) == "a , b ."


def test_a_tokenizer_saved_by_transformers_is_the_same(folder: Path, tmp_path: Path) -> None:
    first = AutoTokenizer.from_pretrained(folder)
    first.save_pretrained(tmp_path)
    second = AutoTokenizer.from_pretrained(tmp_path)
    assert second.sop_token_id == first.sop_token_id
    assert second("河 [MASK] river")["input_ids"] == first("河 [MASK] river")["input_ids"]


def test_the_same_texts_give_the_same_file(folder: Path, tmp_path: Path) -> None:
    save_tokenizer(train_tokenizer(iter(TEXTS), vocab_size=VOCAB_SIZE), tmp_path, max_length=512)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def test_a_vocabulary_that_the_texts_cannot_fill_is_refused_with_the_number_they_give() -> None:
    with pytest.raises(GmaskError, match=r"only 3\d\d tokens: ask for fewer"):
        train_tokenizer(["only a few words"], vocab_size=20_000)
    with pytest.raises(GmaskError, match="no room"):
        train_tokenizer(TEXTS, vocab_size=300)


def test_sources_are_sampled_by_weight_and_the_sample_is_repeatable(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"{text} {index}"}) for index, text in enumerate(TEXTS * 20)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.txt").write_text("\n".join(TEXTS))
    sources = [
        Source("a", str(tmp_path / "a.jsonl"), weight=3),
        Source("b", str(tmp_path / "*.txt"), weight=1),
    ]
    first, second = (
        train_from_sources(
            sources, vocab_size=VOCAB_SIZE, out=tmp_path / out, sample_bytes=9_000, seed=1, progress=False
        )
        for out in ("one", "two")
    )
    assert first.to_str() == second.to_str()
    assert (tmp_path / "one" / "tokenizer.json").exists()


def test_a_source_has_a_weight_or_epochs_but_not_both() -> None:
    assert Source("a", "a.txt", weight=2).share_of(10) == 2
    assert Source("a", "a.txt", epochs=2).share_of(10) == 20
    assert Source("a", "a.txt").share_of(10) == 10
    with pytest.raises(GmaskError, match="not both"):
        Source("a", "a.txt", weight=1, epochs=1)
    with pytest.raises(GmaskError, match="above 0"):
        Source("a", "a.txt", weight=0)


def test_no_token_has_more_han_characters_than_asked_for() -> None:
    tokenizer = train_tokenizer(TEXTS * 3, vocab_size=480, alphabet_size=60, max_han_chars=1)
    assert all(len(re.findall(r"[\u4e00-\u9fff]", token)) <= 1 for token in tokenizer.get_vocab())
    whole, part = (tokenizer.encode(text, add_special_tokens=False).tokens for text in ("今天天气很好", "今天天"))
    assert whole[: len(part)] == part


def test_a_disk_that_fills_leaves_no_half_of_a_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = train_tokenizer(["The cat sat on the mat. " * 50], vocab_size=380)
    write_text = Path.write_text

    def fail(path: Path, *given: Any, **options: Any) -> int:
        if path.name == "tokenizer_config.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_text(path, *given, **options)

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(GmaskError, match=r"made: cannot be written \(No space left on device\)$"):
        save_tokenizer(tokenizer, tmp_path / "made")
    assert list(tmp_path.iterdir()) == []
