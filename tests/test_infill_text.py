"""Do blanks, escapes and white space go in and out of a text as the user means them?"""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from gmask.errors import GmaskError
from gmask.files import check_characters
from gmask.generation.answers import TextAssembler, cut_at_stop, token_texts
from gmask.generation.encoding import TextReader
from gmask.training.tokenizer import GLM_TOKEN_ROLES, TOKEN_ROLES
from tiny_folder import CHINESE, ENGLISH, train_tiny_tokenizer

TOKENIZER = PreTrainedTokenizerFast(
    tokenizer_object=train_tiny_tokenizer(), extra_special_tokens=GLM_TOKEN_ROLES, **TOKEN_ROLES
)
READER = TextReader(TOKENIZER)


@pytest.mark.parametrize(
    "text",
    [
        "The [MASK] dog.",
        "我[MASK]苹果[sMASK]。",
        "[MASK]",
        "a\n[sMASK]\nb",
        "two  [MASK]  [MASK] x",
        "[gMASK] and then",
    ],
)
def test_a_context_is_what_the_tokenizer_makes_of_the_text(text: str) -> None:
    context = READER.read(text).context
    assert list(context.ids) == TOKENIZER(text)["input_ids"]
    assert [context.ids[place] for place in context.blanks] == [i for i in context.ids if i in (5, 6, 7)]


def test_a_text_that_ends_with_gmask_is_left_open_as_published() -> None:
    assert READER.read("The [gMASK]").context.ids[-1] == TOKENIZER.gmask_token_id
    assert READER.read("The [MASK]").context.ids[-1] == TOKENIZER.eos_token_id


@pytest.mark.parametrize(
    ("text", "answers", "filled"),
    [
        ("The [MASK] ran.", [" dog"], "The dog ran."),  # the user's space stays, the answer's goes
        ("The [MASK] ran.", ["dog"], "The dog ran."),
        ("The[MASK] ran.", [" dog"], "The dog ran."),  # without one, the answer's stays
        ("我[MASK]你。", ["爱"], "我爱你。"),
        ("[MASK] ran.", [" The dog"], "The dog ran."),  # not at the start of the text
        ("The [MASK] ran.", [" dog "], "The dog ran."),  # nor two at the end of the answer
        ("a\n[sMASK]\nb", ["\nx"], "a\nx\nb"),
        ("a  [MASK]", [" b"], "a  b"),  # the user's text is not altered
        ("[MASK] [MASK]", [" a", " b"], "a b"),
        ("[MASK][MASK]", [" a", " b"], "a b"),
    ],
)
def test_answers_go_into_the_text_without_doubled_spaces(text: str, answers: list[str], filled: str) -> None:
    spliced = READER.read(text).splice(answers)
    assert spliced.text == filled
    assert tuple(filled[start:end] for start, end in spliced.spans) == spliced.answers


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        (r"a \[MASK] b [MASK]", ("a [MASK] b ", "")),
        (r"\[CLS]\<|endofpiece|>[MASK]", ("[CLS]<|endofpiece|>", "")),
        (r"\[XMASK] [MASK]", ("[XMASK] ", "")),
        (r"C:\\[MASK]", ("C:\\", "")),  # a backslash before a blank
        (r"\\\[MASK][MASK]", (r"\[MASK]", "")),
        (r"a\b [MASK]", (r"a\b ", "")),  # other backslashes are text
        ("[a mask] [MASK]", ("[a mask] ", "")),  # and so are other brackets
    ],
)
def test_escaped_special_tokens_are_text(text: str, pieces: tuple[str, ...]) -> None:
    blanked = READER.read(text)
    assert blanked.pieces == pieces
    assert len(blanked.context.blanks) == 1
    assert sum(token_id < 16 for token_id in blanked.context.ids) == 3  # [CLS], the blank, <|endoftext|>


@pytest.mark.parametrize("token", ["[mask]", "[Mask]", "[XMASK]", "[SMASK]", "[CLS]", "<|endofpiece|>", "[UNUSED3]"])
def test_other_special_tokens_are_refused_by_name(token: str) -> None:
    with pytest.raises(GmaskError) as caught:
        READER.read(f"a {token} b [MASK]")
    assert f"special token {token}" in str(caught.value)
    assert f"\\{token}" in str(caught.value)


@pytest.mark.parametrize("text", ["", "no blank", r"only \[MASK]"])
def test_a_text_without_a_blank_is_refused(text: str) -> None:
    with pytest.raises(GmaskError, match="no blank"):
        READER.read(text)


def is_plain(text: str) -> bool:
    """Whether a text holds no special token and no escape."""
    tokens = ("mask]", *(token.lower() for token in READER.special_ids))
    return "\\" not in text and not any(token in text.lower() for token in tokens)


@given(st.text(max_size=30).filter(is_plain))
def test_any_text_around_a_blank_comes_back_unaltered(text: str) -> None:
    blanked = READER.read(f"x{text}[MASK]{text}")
    assert blanked.splice([""]).text == f"x{text}{text}"


@given(st.lists(st.integers(16, 439), max_size=12))
def test_token_texts_join_to_the_answer_and_never_split_a_character(ids: list[int]) -> None:
    assembler = TextAssembler(TOKENIZER)
    streamed = [assembler.push(token_id) for token_id in ids]
    assert "".join(streamed) + assembler.finish() == "".join(token_texts(ids, TOKENIZER))


@given(st.text(alphabet=ENGLISH + CHINESE + "é🙂𠮷龘", max_size=30))
def test_characters_spelt_in_bytes_come_out_whole(text: str) -> None:
    ids = READER.encode_plain(text)
    parts = token_texts(ids, TOKENIZER)
    assert "".join(parts) == TOKENIZER.decode(ids)
    assert "\ufffd" not in "".join(parts)


def test_bytes_that_make_no_character_are_told_at_the_end() -> None:
    first = TOKENIZER.convert_tokens_to_ids("<0xE4>")
    assembler = TextAssembler(TOKENIZER)
    assert assembler.push(first) == ""
    assert assembler.finish() == "\ufffd"


def test_the_first_stop_text_cuts() -> None:
    assert cut_at_stop("one. two! three", ["!", "."]) == "one"
    assert cut_at_stop("one", ["!"]) == "one"


def test_a_piece_of_white_space_alone_is_not_lost() -> None:
    words = Tokenizer(WordLevel({"x": 0, "▁": 1, "▁x": 2}, unk_token="x"))
    words.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    for ids in ([0, 1, 2], [2, 1, 1, 2, 0], [0, 2, 1, 2]):
        assert "".join(token_texts(ids, tokenizer)) == tokenizer.decode(ids)


class Vocabulary:
    def __init__(self, *tokens: str) -> None:
        self.tokens = tokens

    def get_vocab(self) -> dict[str, int]:
        return {token: index for index, token in enumerate(self.tokens)}


@pytest.mark.parametrize(("vocabulary", "longest"), [(Vocabulary("a", "b"), 128), (Vocabulary("a", "b" * 200), 200)])
def test_a_text_is_too_long_where_not_even_the_longest_tokens_hold_it(vocabulary: Vocabulary, longest: int) -> None:
    check_characters("b" * longest * 4, 4, vocabulary)
    with pytest.raises(GmaskError, match=f"^it has {longest * 4 + 1} characters, and there is room for 4 tokens"):
        check_characters("b" * (longest * 4 + 1), 4, vocabulary, name="it")


SLASHES = """
from gmask.tasks.templates import BLANK, LIKE_A_BLANK
from test_infill_text import READER
row = chr(92) * 1_000_000
for pattern in (READER.pattern, BLANK, LIKE_A_BLANK):
    print(*(len(match[1]) for match in pattern.finditer(row + "a" + row + "[MASK]")))
"""


def test_a_row_of_backslashes_is_searched_once() -> None:
    """Where each of them began a search of its own, a million took half an hour."""
    searched = subprocess.run(
        [sys.executable, "-c", SLASHES], cwd=Path(__file__).parent, check=True, timeout=300, stdout=subprocess.PIPE
    )
    assert searched.stdout.split() == [b"1000000"] * 3
