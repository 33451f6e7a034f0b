"""Does every answer under a constraint match it, in every kind of vocabulary?"""

import gc
import json
import re
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

import gmask
from gmask.generation.constraints import Constraint, choices, json_schema, regex
from gmask.tokenizers.bytes import read_spelling
from gmask.tokenizers.chatglm import ChatGLMTokenizer, ChatGLMTokenizerV0
from gmask.tokenizers.glm import (
    GLMBertTokenizer,
    GLMChineseTokenizer,
    GLMGPT2Tokenizer,
    GLMRobertaTokenizer,
    GLMTokenizer,
)
from published_vocabularies import SHARED, copy_vocabulary

pytest.importorskip("llguidance")

PUBLISHED = {
    "bert": GLMBertTokenizer,
    "chinese": GLMChineseTokenizer,
    "gpt2": GLMGPT2Tokenizer,
    "roberta": GLMRobertaTokenizer,
}
CHATGLM = {
    "chatglm": (ChatGLMTokenizer, SHARED / "chatglm-tiny" / "model" / "ice_text.model"),
    "chatglm-v0": (ChatGLMTokenizerV0, SHARED / "tokenizers" / "chatglm" / "ice_text.base.model"),
}
KINDS = ["bundled", *PUBLISHED, *CHATGLM]
BYTES = ["bundled", "gpt2", "roberta", *CHATGLM]  # can spell any text
DROPPING = ["bert", "chinese", *CHATGLM]  # the space of an answer's first token is dropped

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["x", "yz", None]}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}

Find = Callable[[str], PreTrainedTokenizerBase]


@pytest.fixture(scope="module")
def find_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Find:
    """The tokenizer of a kind; skips where its files are not here."""
    made: dict[str, PreTrainedTokenizerBase] = {}

    def make(kind: str) -> PreTrainedTokenizerBase:
        if kind == "bundled":
            return GLMTokenizer.from_pretrained(Path(gmask.__file__).parent / "pretrained")
        if not (SHARED / "tokenizers").is_dir():
            pytest.skip("the published vocabulary files are not beside this checkout")
        if kind in CHATGLM:
            tokenizer_class, path = CHATGLM[kind]
            return tokenizer_class(str(path))
        return PUBLISHED[kind].from_pretrained(copy_vocabulary(kind, tmp_path_factory.mktemp(kind)))

    def find(kind: str) -> PreTrainedTokenizerBase:
        if kind not in made:
            made[kind] = make(kind)
        return made[kind]

    return find


def text_of(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text.removeprefix(getattr(tokenizer, "continuation", ""))


def write(constraint: Constraint, tokenizer: PreTrainedTokenizerBase, *, seed: int, end_chance: float = 0.1) -> str:
    """The answer of a model whose scores are random: the best of the allowed tokens, until an end that it draws."""
    generator = torch.Generator().manual_seed(seed)
    mask, ids = constraint.start(), []
    while len(ids) < 2000:
        allowed = mask.allowed()
        wants_end = torch.rand((), generator=generator).item() < end_chance
        if mask.is_complete() and (wants_end or not allowed.any()):
            return text_of(ids, tokenizer)
        scores = torch.rand(len(allowed), generator=generator)
        ids.append(int(scores.masked_fill(~allowed, -1).argmax()))
        mask.accept(ids[-1])
    raise AssertionError(f"no end in sight: {text_of(ids, tokenizer)[:200]}")


def may_spell(text: str, constraint: Constraint, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokens that the tokenizer itself gives for a text are allowed, each of them, and may end there."""
    mask = constraint.start()
    for token_id in tokenizer(text, add_special_tokens=False)["input_ids"]:
        if not mask.allowed()[token_id]:
            return False
        mask.accept(token_id)
    return mask.is_complete()


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_of_tokens_are_what_the_decoder_writes(kind: str, find_tokenizer: Find) -> None:
    tokenizer = find_tokenizer(kind)
    tokens = read_spelling(tokenizer).tokens
    start = next(token_id for token_id, token in enumerate(tokens) if token.removeprefix(b" ") == b"a")
    before = text_of([start], tokenizer)
    spelt = [token_id for token_id, token in enumerate(tokens) if token]
    whole = [token_id for token_id in spelt if "\ufffd" not in tokens[token_id].decode(errors="replace")]
    assert len(whole) > 500
    for token_id in whole[:: 1 + len(whole) // 1000]:
        assert text_of([start, token_id], tokenizer) == before + tokens[token_id].decode()
    assert all(tokens[token_id] == b"" for token_id in tokenizer.all_special_ids)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_an_answer_is_one_of_the_choices(kind: str, find_tokenizer: Find, seed: int) -> None:
    tokenizer = find_tokenizer(kind)
    texts = ["new", "new york", "no; never!", 'a "quote" \\ and /slash/']
    assert write(choices(tokenizer, texts), tokenizer, seed=seed).removeprefix(" ") in texts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "pattern",
    [
        r"[a-z]{2,8}( [a-z]{1,5}){0,3}",
        r"^\d{4}-\d\d$",
        r"(?s:.{0,12})",
        "(?i:yes|no)[.!]?",
        "a/b|#\\\\|",
        "<[a-z|_0-9]{1,9}>",
    ],
)
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_an_answer_matches_the_regex(kind: str, pattern: str, find_tokenizer: Find, seed: int) -> None:
    tokenizer = find_tokenizer(kind)
    answer = write(regex(tokenizer, pattern), tokenizer, seed=seed)
    assert any(re.fullmatch(pattern, text) for text in (answer, answer.removeprefix(" "))), answer


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_an_answer_fits_the_json_schema(kind: str, find_tokenizer: Find, seed: int) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    tokenizer = find_tokenizer(kind)
    answer = json.loads(write(json_schema(tokenizer, PERSON), tokenizer, seed=seed))
    assert jsonschema.Draft202012Validator(PERSON).is_valid(answer), answer


JSON_SCHEMAS = st.recursive(
    st.sampled_from([{"type": "integer"}, {"type": "boolean"}, {"type": "null"}, {"type": "string", "maxLength": 4}])
    | st.builds(lambda texts: {"enum": texts}, st.lists(st.text(max_size=5), min_size=1, max_size=3, unique=True)),
    lambda inner: (
        st.builds(lambda items: {"type": "array", "items": items, "maxItems": 2}, inner)
        | st.builds(
            lambda properties: {
                "type": "object",
                "properties": properties,
                "required": sorted(properties)[:1],
                "additionalProperties": False,
            },
            st.dictionaries(st.text(min_size=1, max_size=4), inner, max_size=3),
        )
    ),
    max_leaves=4,
)


@settings(max_examples=40, deadline=None)
@given(schema=JSON_SCHEMAS, seed=st.integers(0, 2**32))
def test_any_schema_is_kept_to(find_tokenizer: Find, schema: dict[str, Any], seed: int) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    tokenizer = find_tokenizer("bundled")
    answer = write(json_schema(tokenizer, schema), tokenizer, seed=seed)
    assert jsonschema.Draft202012Validator(schema).is_valid(json.loads(answer)), answer


@settings(max_examples=40, deadline=None)
@example(texts=["\x7f\x00/*"], seed=0)
@given(texts=st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=4), seed=st.integers(0, 2**32))
def test_any_text_may_be_a_choice(find_tokenizer: Find, texts: list[str], seed: int) -> None:
    tokenizer = find_tokenizer("bundled")
    answer = write(choices(tokenizer, texts), tokenizer, seed=seed)
    assert answer in texts or answer.removeprefix(" ") in texts


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokenizers_own_spelling_is_allowed(kind: str, find_tokenizer: Find) -> None:
    tokenizer = find_tokenizer(kind)
    texts = ["united states", "it is 3 o", *(["中国北京", "价 5 元"] if kind != "bert" else [])]
    for text in texts:
        assert may_spell(text, choices(tokenizer, texts), tokenizer)
        assert may_spell(text, regex(tokenizer, r"[^!]+"), tokenizer)
        assert may_spell(f" {text}", choices(tokenizer, texts), tokenizer)  # as words stand inside a text
    assert may_spell("[1, 20, 300]", json_schema(tokenizer, {"type": "array", "items": {"type": "integer"}}), tokenizer)


@pytest.mark.parametrize("kind", BYTES)
def test_characters_that_are_no_tokens_are_spelt_in_bytes(kind: str, find_tokenizer: Find) -> None:
    tokenizer = find_tokenizer(kind)
    assert write(choices(tokenizer, ["\U0001f9a4𓂀\n\t!"]), tokenizer, seed=0).removeprefix(" ") == "\U0001f9a4𓂀\n\t!"


def test_the_end_is_open_where_a_choice_begins_another(find_tokenizer: Find) -> None:
    tokenizer = find_tokenizer("bundled")
    mask = choices(tokenizer, ["a", "ab"]).start()
    assert not mask.is_complete()
    mask.accept(tokenizer.convert_tokens_to_ids("a"))
    assert mask.is_complete()
    assert mask.allowed().nonzero().flatten().tolist() == [
        tokenizer.convert_tokens_to_ids(piece) for piece in ("<0x62>", "b")
    ]
    mask.accept(tokenizer.convert_tokens_to_ids("b"))
    assert mask.is_complete()
    assert not mask.allowed().any()


def test_answers_of_one_constraint_do_not_disturb_each_other(find_tokenizer: Find) -> None:
    tokenizer = find_tokenizer("bundled")
    constraint = choices(tokenizer, ["ax", "by"])
    first, second = constraint.start(), constraint.start()
    first.accept(tokenizer.convert_tokens_to_ids("a"))
    second.accept(tokenizer.convert_tokens_to_ids("b"))
    assert first.allowed()[tokenizer.convert_tokens_to_ids("x")]
    assert not second.allowed()[tokenizer.convert_tokens_to_ids("x")]


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_and_rows_without_a_token_are_never_allowed(kind: str, find_tokenizer: Find) -> None:
    tokenizer = find_tokenizer(kind)
    tokens = read_spelling(tokenizer).tokens
    allowed = regex(tokenizer, "(?s:.*)", vocabulary_size=len(tokens) + 500).start().allowed()
    assert allowed.shape == (len(tokens) + 500,)
    assert allowed.sum() > 300
    assert not allowed[len(tokens) :].any()
    assert not allowed[[*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()]].any()
    if kind == "chatglm-v0":
        assert not allowed[: tokenizer.num_image_tokens].any()


@pytest.mark.parametrize("kind", DROPPING)
def test_what_a_decoder_drops_cannot_be_asked_for(kind: str, find_tokenizer: Find) -> None:
    tokenizer = find_tokenizer(kind)
    with pytest.raises(gmask.GmaskError, match=r"regex ' x' matches nothing that the tokens"):
        regex(tokenizer, " x")
    with pytest.raises(gmask.GmaskError, match=r"choice ' x'.*it reads 'x'"):
        choices(tokenizer, [" x"])


@pytest.mark.parametrize("kind", CHATGLM)
def test_text_that_chatglm_would_read_as_white_space_is_not_written(kind: str, find_tokenizer: Find) -> None:
    tokenizer = find_tokenizer(kind)
    with pytest.raises(gmask.GmaskError, match="matches nothing"):
        regex(tokenizer, "<n>")
    with pytest.raises(gmask.GmaskError, match="spell the choice"):
        choices(tokenizer, ["a<|blank_3|>"])
    tokens = list(read_spelling(tokenizer).tokens)
    mask = json_schema(tokenizer, {"type": "string"}).start()
    for token in (b'"', b"<"):
        mask.accept(tokens.index(token))
    assert mask.allowed()[tokens.index(b">")]
    mask.accept(tokens.index(b"n"))
    assert not mask.allowed()[[token_id for token_id, token in enumerate(tokens) if token.startswith(b">")]].any()
    assert mask.allowed()[tokens.index(b"n")]


def test_an_uncased_vocabulary_says_what_it_cannot_spell(find_tokenizer: Find) -> None:
    tokenizer = find_tokenizer("bert")
    with pytest.raises(gmask.GmaskError, match=r"^the vocabulary .* choice 'Paris': it reads 'paris'$"):
        choices(tokenizer, ["rome", "Paris"])
    with pytest.raises(gmask.GmaskError, match=r"matches nothing that the tokens of this vocabulary can spell$"):
        regex(tokenizer, "a[A-Z]")
    assert write(regex(tokenizer, "a[A-Z]|ab"), tokenizer, seed=0) == "ab"  # never led into a word without an end
    mask = json_schema(tokenizer, {"const": {"A": 1}}).start()
    with pytest.raises(gmask.GmaskError, match=r"the JSON schema asks for what the tokens"):
        while not mask.is_complete():
            mask.accept(int(mask.allowed().int().argmax()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda t: choices(t, []), r"choices must be a list of texts that are not empty, not \[\]"),
        (lambda t: choices(t, "yes"), "choices must be a list"),
        (lambda t: choices(t, ["yes", ""]), "choices must be a list"),
        (lambda t: choices(t, ["\ud800"]), "holds half of a character"),
        (lambda t: regex(t, "(a"), r"the regex '\(a' is not valid: unclosed group"),
        (lambda t: regex(t, "a)|(b"), "is not valid: unopened group"),
        (lambda t: regex(t, "(?=a)b"), "look-around, .* is not supported"),
        (lambda t: regex(t, r"(a)\1"), "backreferences are not supported"),
        (lambda t: regex(t, "\ud800"), "holds half of a character"),
        (lambda t: regex(t, 3), "a regex must be a text, not 3"),
        (lambda t: json_schema(t, {"type": "nope"}), "the JSON schema is not valid: Invalid type: nope"),
        (lambda t: json_schema(t, {"not": {}}), r'Unimplemented keys: \["not"\]'),
        (lambda t: json_schema(t, {"not": {}, "x-guidance": {"lenient": True}}), "Unimplemented keys"),
        (lambda t: json_schema(t, {"enum": []}), "Unsatisfiable"),
        (lambda t: json_schema(t, {"$ref": "#/none"}), "does not exist"),
        (lambda t: json_schema(t, {"const": float("nan")}), "is not JSON"),
        (lambda t: json_schema(t, {"const": object()}), "is not JSON"),
        (lambda t: json_schema(t, True), "must be an object, not True"),
    ],
)
def test_a_bad_constraint_is_refused_in_one_line(
    make: Callable[[PreTrainedTokenizerBase], Constraint], message: str, find_tokenizer: Find
) -> None:
    with pytest.raises(gmask.GmaskError, match=message) as caught:
        make(find_tokenizer("bundled"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"allOf": [{"$ref": "#"}]},
        {"oneOf": [{"$ref": "#"}]},
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
        {"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"},
    ],
)
def test_a_schema_that_is_only_itself_is_refused(find_tokenizer: Find, schema: dict[str, Any]) -> None:
    with pytest.raises(gmask.GmaskError, match="the JSON schema matches nothing that the tokens"):
        json_schema(find_tokenizer("bundled"), schema)


def test_a_schema_may_hold_itself(find_tokenizer: Find) -> None:
    tree = {"type": "object", "properties": {"a": {"$ref": "#"}}}
    assert bool(json_schema(find_tokenizer("bundled"), tree).start().allowed().any())
    with pytest.raises(gmask.GmaskError, match=r"a \$ref leads out of it") as refused:
        json_schema(find_tokenizer("bundled"), {"$ref": "http://example.org/schema"})
    assert "http" not in str(refused.value)


@pytest.fixture
def small_tokenizer() -> Iterator[PreTrainedTokenizerFast]:
    backend = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    yield PreTrainedTokenizerFast(tokenizer_object=backend)


def test_a_vocabulary_may_lack_letters(small_tokenizer: PreTrainedTokenizerFast) -> None:
    assert write(regex(small_tokenizer, "a.[^a]"), small_tokenizer, seed=0) in ("aab", "abb")
    with pytest.raises(gmask.GmaskError, match="choice 'abc'"):
        choices(small_tokenizer, ["abc"])


def test_a_table_follows_its_tokenizer_and_goes_with_it(small_tokenizer: PreTrainedTokenizerFast) -> None:
    from gmask.generation import constraints

    first = constraints._find_table(small_tokenizer)
    assert constraints._find_table(small_tokenizer) is first
    small_tokenizer.add_tokens(["b", "c"])
    assert regex(small_tokenizer, "a*").start().allowed().shape == (4,)
    again = weakref.ref(constraints._find_table(small_tokenizer))
    copied = PreTrainedTokenizerFast(tokenizer_object=small_tokenizer.backend_tokenizer)
    regex(copied, "a")
    table = weakref.ref(constraints._find_table(copied))
    del copied
    gc.collect()
    assert table() is None
    assert again() is not None


def test_an_unknown_decoder_is_named(small_tokenizer: PreTrainedTokenizerFast) -> None:
    small_tokenizer.backend_tokenizer.decoder = decoders.CTC()
    with pytest.raises(gmask.GmaskError, match="does not know the bytes of tokens of the decoder CTC"):
        choices(small_tokenizer, ["a"])
