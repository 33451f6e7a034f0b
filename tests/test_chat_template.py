"""Do chat templates give the ids of `gmask chat`, for every vocabulary and any conversation?"""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer

import gmask
from gmask.checkpoints.load import load_tokenizer
from gmask.checkpoints.save import write_tokenizer
from gmask.conversation import read_conversation
from gmask.files import read_json_lines
from gmask.generation.encoding import ChatGLMFormat, QuestionAnswerFormat, encode_plain
from gmask.tasks.formats import samples_of
from gmask.tokenizers.chatglm import ChatGLMTokenizer
from gmask.tokenizers.folder import read_tokenizer
from tiny_vocabularies import KINDS, make_tokenizer

SFT = Path(__file__).parents[2] / "shared" / "corpus" / "sft"
BUNDLED_CHAT = Path(gmask.__file__).parent / "pretrained" / "chat"


def expected_ids(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """The ids of a prompt, or of a prompt and its reply, as `gmask chat` and training make them."""
    chat_format = (ChatGLMFormat if isinstance(tokenizer, ChatGLMTokenizer) else QuestionAnswerFormat)(tokenizer)
    conversation = read_conversation(messages)
    if conversation.query is not None:
        return [*chat_format.encode(conversation.query, conversation.rounds).ids, chat_format.special.sop]
    *rounds, (query, reply) = conversation.rounds
    ids = [*chat_format.encode(query, rounds).ids, chat_format.special.sop]
    return [*ids, *encode_plain(tokenizer, reply.strip()), chat_format.special.eop]


def template_ids(tokenizer: Any, messages: list[dict[str, Any]]) -> list[int]:
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
    return list(encoded["input_ids"])


LETTERS = "abc theXY019 今天去买苹果 .,!?，。\n\t[]<>|_"
texts = st.text(alphabet=LETTERS, max_size=24)
messages = st.lists(
    st.builds(lambda role, content: {"role": role, "content": content}, st.sampled_from(("user", "assistant")), texts),
    min_size=1,
    max_size=6,
)


@pytest.mark.parametrize("kind", KINDS)
@given(said=messages)
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
def test_any_conversation_has_the_ids_of_the_chat(kind: str, said: list[dict[str, str]]) -> None:
    tokenizer = make_tokenizer_of(kind)
    assert template_ids(tokenizer, said) == expected_ids(tokenizer, said)


made: dict[str, Any] = {}


def make_tokenizer_of(kind: str) -> Any:
    return made.setdefault(kind, make_tokenizer(kind))


@pytest.mark.parametrize("kind", ["ours", "chatglm"])
def test_system_messages_parts_and_other_names_are_folded_as_in_the_chat(kind: str) -> None:
    tokenizer = make_tokenizer_of(kind)
    said = [
        {"role": "system", "content": "be brief"},
        {"role": "human", "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "river"}]},
        {"role": "developer", "content": "in English"},
        {"role": "gpt", "content": " the old man "},
        {"role": "user", "content": "dog"},
    ]
    assert template_ids(tokenizer, said) == expected_ids(tokenizer, said)
    assert template_ids(tokenizer, said[:4]) == expected_ids(tokenizer, said[:4])


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_begins_prompt_and_reply(kind: str) -> None:
    tokenizer = make_tokenizer_of(kind)
    said = [{"role": "user", "content": "the old man"}, {"role": "assistant", "content": "took his dog"}]
    prompt, whole = template_ids(tokenizer, said[:1]), template_ids(tokenizer, said)
    assert whole[: len(prompt)] == prompt


@pytest.mark.parametrize("kind", KINDS)
def test_control_words_are_text_to_the_chat_and_refused_by_the_template(kind: str) -> None:
    tokenizer = make_tokenizer_of(kind)
    for word in tokenizer.all_special_tokens:
        said = [{"role": "user", "content": f"the {word} man"}]
        with pytest.raises(TemplateError, match="control word"):
            template_ids(tokenizer, said)
        ids = expected_ids(tokenizer, said)
        without = expected_ids(tokenizer, [{"role": "user", "content": "the man"}])
        index = tokenizer.convert_tokens_to_ids(word)
        assert ids.count(index) == without.count(index) or index == tokenizer.unk_token_id


def test_what_is_no_conversation_is_refused() -> None:
    tokenizer = make_tokenizer_of("ours")
    for said, reason in (
        ([{"role": "tool", "content": "the"}], "the role tool is none of"),
        ([{"role": "user", "content": [{"type": "image"}]}], "text alone"),
        ([{"role": "system", "content": "the"}], "no message of the user follows"),
    ):
        with pytest.raises(TemplateError, match=reason):
            template_ids(tokenizer, said)


def test_each_reply_of_a_conversation_is_a_sample() -> None:
    said = [
        {"role": role, "content": text}
        for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    ]
    assert [(one.history, one.text, one.answers) for one in samples_of(said, require_answers=True)] == [
        ((), "a", ("b",)),
        ((("a", "b"),), "c", ("d",)),
    ]


@pytest.mark.parametrize("kind", ["ours", "chatglm", "chinese"])
def test_a_saved_tokenizer_brings_its_template(kind: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer_of(kind)
    write_tokenizer(tokenizer, tmp_path, published=False)
    said = [{"role": "user", "content": "the old man"}, {"role": "assistant", "content": "took his dog"}]
    for again in (read_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert again.chat_template == tokenizer.chat_template
        assert template_ids(again, said) == template_ids(tokenizer, said)
        assert again.decode(template_ids(again, said), skip_special_tokens=True) == tokenizer.decode(
            template_ids(tokenizer, said), skip_special_tokens=True
        )


def test_a_template_of_the_users_stays(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("ours")
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(tmp_path)
    assert read_tokenizer(tmp_path).chat_template == tokenizer.chat_template


def test_registering_the_blank_changes_neither_ids_nor_size_nor_decoded_text(tmp_path: Path) -> None:
    tokenizer = make_tokenizer_of("chatglm")
    bare = ChatGLMTokenizer(tokenizer.vocab_file)
    assert len(bare) == len(tokenizer)
    ids = [bare.gmask_token_id, *bare("the old man", add_special_tokens=False)["input_ids"]]
    assert tokenizer.gmask_token_id == bare.gmask_token_id
    assert tokenizer.decode(ids) == bare.decode(ids)


@pytest.mark.skipif(not SFT.is_dir(), reason="the corpus is not here")
def test_every_kind_of_the_corpus_has_the_ids_of_the_chat() -> None:
    tokenizer = load_tokenizer(BUNDLED_CHAT)
    files = sorted(SFT.glob("*.val.jsonl")) + sorted(SFT.glob("multiturn.train.jsonl"))
    assert files
    for path in files:
        for _, record in list(read_json_lines(path))[:20]:
            said = messages_of(record)
            if not any(word in json.dumps(said) for word in tokenizer.all_special_tokens):
                assert template_ids(tokenizer, said) == expected_ids(tokenizer, said), path.name


def messages_of(record: dict[str, Any]) -> list[dict[str, str]]:
    if "messages" in record:
        return list(record["messages"])
    asked = "\n".join(filter(None, (record["instruction"], record.get("input"))))
    pairs = [*record.get("history", []), (asked, record["output"])]
    return [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
