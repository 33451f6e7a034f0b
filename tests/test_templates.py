"""A template makes one text of a record, and nothing in the record can add a blank to it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from gmask.errors import GmaskError
from gmask.generation.encoding import TextReader
from gmask.tasks.templates import count_blanks, parse_template, split_final_blank, split_marks
from gmask.training.tokenizer import GLM_TOKEN_ROLES, TOKEN_ROLES
from tiny_folder import train_tiny_tokenizer

TRICKY = st.text(alphabet="\\[]{}MASKsgmask x字", max_size=12) | st.sampled_from(
    ["[MASK]", "\\[MASK]", "\\\\[gMASK]", "x\\", "[mask]", "[sMASK", "MASK]"]
)


TOKENIZER = PreTrainedTokenizerFast(
    tokenizer_object=train_tiny_tokenizer(), extra_special_tokens=GLM_TOKEN_ROLES, **TOKEN_ROLES
)
READER = TextReader(TOKENIZER)


@pytest.mark.parametrize(
    ("template", "values", "text"),
    [
        ("{a} and {b}", {"a": "x", "b": 2}, "x and 2"),
        ("{{{a}}}", {"a": "x"}, "{x}"),
        ("{a?}|{b?}", {"a": None}, "|"),
        ("{a?}|{b?}", {"a": float("nan"), "b": 2.5}, "|2.5"),
        ("{a|unpunctuated|lower-first}", {"a": "The END?! "}, "the END"),
        ("{a|unpunctuated}", {"a": "好吗？"}, "好吗"),
        ("{a|strip?}.", {"a": " "}, "."),
        ("{a}", {"a": True}, "true"),
        ("{a}", {"a": "e\u0301"}, "\u00e9"),
        ("{a b}", {"a b": "a name with a space"}, "a name with a space"),
        ("{a}", {"a": "It is [MASK]."}, "It is [MASK]."),
        ("{a} [MASK].", {"a": "[MASK] \\[gMASK]"}, "\\[MASK] \\\\\\[gMASK] [MASK]."),
        ("{a}[MASK]", {"a": "C:\\"}, "C:\\\\[MASK]"),
        ("\\[MASK] is [MASK] {a}", {"a": "x"}, "\\[MASK] is [MASK] x"),
    ],
)
def test_fields_are_filled(template: str, values: dict[str, object], text: str) -> None:
    assert parse_template(template).fill(values) == text


@given(before=TRICKY, between=TRICKY, after=TRICKY)
def test_the_blanks_of_a_template_are_the_only_ones(before: str, between: str, after: str) -> None:
    values = {"a": before, "b": between, "c": after}
    text = parse_template("{a?}[MASK]{b?}{a?}[gMASK]{c?}").fill(values)
    assert READER.read(text).pieces == (before, between + before, after)
    assert count_blanks(text) == 2


@pytest.mark.parametrize(
    ("marked", "text", "answers"),
    [
        ("It is [MASK=sunny] in [sMASK=May, or June].", "It is [MASK] in [sMASK].", ("sunny", "May, or June")),
        ("[gMASK=a\\]b\\\\]", "[gMASK]", ("a]b\\",)),
        ("[MASK=a=b|c][MASK=[]", "[MASK][MASK]", ("a=b|c", "[")),
        ("[MASK=] [MASK] [mask=a]", "[MASK=] [MASK] [mask=a]", ()),
    ],
)
def test_marked_answers_are_taken_out_of_their_blanks(marked: str, text: str, answers: tuple[str, ...]) -> None:
    assert split_marks(marked) == (text, answers)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{a", "has a single {: write {{ for a brace"),
        ("a}", "has a single }: write }}"),
        ("{}", "is not of the form"),
        ("{a|}", "is not of the form"),
        ("{a|stripp}", "no filter 'stripp'; the nearest is 'strip'"),
    ],
)
def test_a_bad_template_is_refused(template: str, message: str) -> None:
    with pytest.raises(GmaskError) as caught:
        parse_template(template)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"txt": "x", "label": 1}, "no column 'text', the columns are txt, label; the nearest is 'txt'"),
        ({}, "no column 'text', the columns are none"),
        ({"text": " \n"}, "column 'text' is empty"),
        ({"text": None}, "column 'text' is empty"),
        ({"text": float("nan")}, "column 'text' is empty"),
        ({"text": ["x"]}, "column 'text' holds a list, not a text"),
    ],
)
def test_a_record_that_does_not_fit_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(GmaskError) as caught:
        parse_template("{text}").fill(values)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Who? [MASK]", ("Who? ", "[MASK]")),
        ("问：谁？答：[gMASK] \n", ("问：谁？答：", "[gMASK]")),
        (r"a \[MASK] \\[sMASK]", ("a [MASK] \\", "[sMASK]")),
        (r"a \[mask] [MASK]", ("a [mask] ", "[MASK]")),
        ("[MASK]", ("", "[MASK]")),
        ("It is [MASK].", None),
        (r"It is [MASK] \[MASK]", None),
        ("[MASK] and [MASK]", None),
        ("no blank", None),
    ],
)
def test_the_text_before_a_blank_that_ends_it(text: str, found: tuple[str, str] | None) -> None:
    assert split_final_blank(text) == found
