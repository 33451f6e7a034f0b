"""Are tokens that a user adds counted, read, written, saved and loaded again, by every tokenizer class?"""

import copy
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import AutoTokenizer

import gmask
from gmask.checkpoints.save import write_tokenizer
from gmask.errors import GmaskError
from gmask.generation.encoding import TextReader
from gmask.models.chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration
from gmask.models.glm import GLMConfig, GLMForConditionalGeneration
from gmask.tokenizers.folder import read_tokenizer
from tiny_vocabularies import KINDS, make_tokenizer

WORDS = [
    "<ENTITY>", "<a b>", "<a", "the", "man", "他", "小猫x", "[X]", "▁x", "##x", "é", "\\", "(a|b)*", "<|im_end|>", "<n",
    "1", "😀",
]  # fmt: skip
texts = st.one_of(
    st.sampled_from(WORDS),
    st.text("ab<> 猫é_[]|", min_size=1, max_size=6).filter(lambda text: text == text.strip()),
)
flags = st.fixed_dictionaries({}, optional={name: st.booleans() for name in ("lstrip", "rstrip", "single_word")})
SENTENCES = ["The old man", "went  home.", "", "我今天", "\n\nx", " a", "b "]


@st.composite
def additions(draw: st.DrawFn) -> tuple[list[Any], bool]:
    """Tokens as `add_tokens` takes them, and whether they are special."""
    chosen, special = draw(st.lists(texts, min_size=1, max_size=4, unique=True)), draw(st.booleans())
    as_objects = draw(st.booleans())
    return [AddedToken(text, special=special, **draw(flags)) if as_objects else text for text in chosen], special


def describe(tokenizer: Any, samples: list[str]) -> list[Any]:
    """All that a saved tokenizer must give back."""
    told: list[Any] = [len(tokenizer), tokenizer.get_vocab(), set(tokenizer.all_special_tokens)]
    for text in samples:
        for options in ({}, {"add_special_tokens": False}, {"split_special_tokens": True}):
            ids = tokenizer(text, **options)["input_ids"]
            told += [ids, tokenizer.decode(ids), tokenizer.decode(ids, skip_special_tokens=True)]
            told.append(tokenizer.convert_ids_to_tokens(ids))
    return told


@pytest.mark.parametrize("kind", KINDS)
@given(addition=additions(), parts=st.lists(st.sampled_from(SENTENCES), min_size=2, max_size=3))
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_added_tokens_are_tokens_like_any_other(
    kind: str, addition: tuple[list[Any], bool], parts: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    tokenizer, (tokens, special) = make_tokenizer(kind), addition
    before = len(tokenizer)
    added = tokenizer.add_tokens(tokens, special_tokens=special)
    names = [str(token) for token in tokens]
    ids = tokenizer.convert_tokens_to_ids(names)

    assert len(tokenizer) == before + added
    assert sorted(index for index in ids if index >= before) == list(range(before, before + added))
    assert tokenizer.convert_ids_to_tokens(ids) == names
    assert {name: tokenizer.get_vocab()[name] for name in names} == dict(zip(names, ids, strict=True))
    assert tokenizer.add_tokens(tokens, special_tokens=special) == 0

    samples = [name.join(parts) for name in names]
    read = [index for text in samples for index in tokenizer(text)["input_ids"]]
    assert max(read) < len(tokenizer)
    torch.nn.Embedding(len(tokenizer), 1)(torch.tensor(read))  # what resize_token_embeddings(len(tokenizer)) makes

    told = describe(tokenizer, samples)
    folder = tmp_path_factory.mktemp(kind)
    tokenizer.save_pretrained(folder)
    ways = {
        "gmask": read_tokenizer(folder),
        "AutoTokenizer": AutoTokenizer.from_pretrained(folder),
        "pickle": pickle.loads(pickle.dumps(tokenizer)),
        "deepcopy": copy.deepcopy(tokenizer),
    }
    for way, again in ways.items():
        assert type(again) is type(tokenizer), way
        assert describe(again, samples) == told, way
        count = len(again)
        assert again.add_tokens(["<one more>"]) == 1
        assert again.convert_tokens_to_ids("<one more>") == count == len(again) - 1
    ways["gmask"].save_pretrained(folder)
    assert describe(read_tokenizer(folder), samples) == describe(ways["gmask"], samples)


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_an_added_token_is_read_and_written_wherever_it_stands(kind: str, special: bool) -> None:
    tokenizer = make_tokenizer(kind)
    tokenizer.add_tokens(["<ENTITY>", "<two words>"], special_tokens=special)
    for name in ("<ENTITY>", "<two words>"):
        token = tokenizer.convert_tokens_to_ids(name)
        around = ("{}", "a{}b", "a {} b", "我{}今天", "a\n{}\n b", "{0}{0}", "the  {}.")
        for text in (form.format(name) for form in around):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert ids.count(token) == text.count(name), text
            assert tokenizer.decode(ids).count(name) == text.count(name), text
            again = tokenizer(tokenizer.decode(ids), add_special_tokens=False)["input_ids"]
            assert again.count(token) == text.count(name), text
            shown = 0 if special else text.count(name)
            assert tokenizer.decode(ids, skip_special_tokens=True).count(name) == shown, text
            plain = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            assert plain.count(token) == shown, text


@pytest.mark.parametrize("kind", KINDS)
def test_a_role_may_get_another_token(kind: str, tmp_path: Path) -> None:
    """Set on a tokenizer, or named when it is read; what is saved comes back."""
    tokenizer = make_tokenizer(kind)
    tokenizer.save_pretrained(tmp_path / "before")
    before = len(tokenizer)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "pad_token": "<filler>"})
    tokenizer.save_pretrained(tmp_path / "after")
    named = {"eos_token": "<|im_end|>", "pad_token": "<filler>"}
    for again in (
        tokenizer,
        read_tokenizer(tmp_path / "after"),
        AutoTokenizer.from_pretrained(tmp_path / "before", **named),
    ):
        assert {again.eos_token_id, again.pad_token_id} == {before, before + 1}
        assert len(again) == before + 2
        batch = again(["the man", "a"], padding=True)["input_ids"]
        assert batch[1].count(again.pad_token_id) == len(batch[1]) - len(again("a")["input_ids"])
        assert again.decode([again.eos_token_id]) == "<|im_end|>"
        assert again.decode([again.eos_token_id], skip_special_tokens=True) == ""
    assert read_tokenizer(tmp_path / "after")("the man")["input_ids"] == tokenizer("the man")["input_ids"]


@pytest.mark.parametrize("kind", ["chatglm", "chatglm-v0"])
def test_an_added_token_whose_id_the_vocabulary_cannot_give_is_refused(kind: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(kind)
    tokenizer.add_tokens(["<ENTITY>"])
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    for wrong in ("30", "99999999"):
        path.write_text(path.read_text("utf-8").replace(f'"{len(tokenizer) - 1}": {{', f'"{wrong}": {{'), "utf-8")
        with pytest.raises(GmaskError, match=f"<ENTITY>.*{wrong}") as caught:
            read_tokenizer(tmp_path)
        assert "\n" not in str(caught.value)
        tokenizer.save_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["chatglm", "chatglm-v0"])
def test_tokens_beside_a_published_vocabulary_are_read_from_the_older_table(kind: str, tmp_path: Path) -> None:
    """``added_tokens.json`` alone, as transformers wrote it until 4.33."""
    tokenizer = make_tokenizer(kind)
    tokenizer.add_tokens(["<ENTITY>"])
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ChatGLMTokenizer"}', "utf-8")
    again = read_tokenizer(tmp_path)
    assert len(again) == len(tokenizer)
    assert again("a<ENTITY>b")["input_ids"] == tokenizer("a<ENTITY>b")["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_whose_files_are_gone_says_so_when_it_is_saved(kind: str, tmp_path: Path) -> None:
    make_tokenizer(kind).save_pretrained(tmp_path / "one")
    tokenizer = read_tokenizer(tmp_path / "one")
    shutil.rmtree(tmp_path / "one")
    if kind == "ours":  # has all that it was read from
        tokenizer.save_pretrained(tmp_path / "two")
        assert tokenizer.get_vocab() == read_tokenizer(tmp_path / "two").get_vocab()
        return
    with pytest.raises(GmaskError, match=r"gone.*copy it back"):
        tokenizer.save_pretrained(tmp_path / "two")


def grown(tokenizer: Any, model: Any) -> Any:
    """A model with room for the tokens that the tokenizer has got."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.resize_token_embeddings(len(tokenizer))
    return model.eval()


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "chatglm" not in kind])
def test_a_blank_beside_an_added_token_is_filled(kind: str, special: bool, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(kind)
    tokenizer.add_tokens(["<ENTITY>"], special_tokens=special)
    token = tokenizer.convert_tokens_to_ids("<ENTITY>")
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "mask", "sop", "eop", "eos")}
    shape = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64)
    config = GLMConfig(vocab_size=token, **shape, **ids)
    model = grown(tokenizer, GLMForConditionalGeneration(config))
    reader = TextReader(tokenizer)
    if special:
        with pytest.raises(GmaskError, match="<ENTITY>"):
            reader.read("the <ENTITY> [MASK] man")
        text = "the \\<ENTITY> [MASK] man"
        assert token not in reader.read(text).context.ids
    else:
        text = "the <ENTITY> [MASK] man"
        assert reader.read(text).context.ids.count(token) == 1
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, words = gmask.load(tmp_path)
    filled = gmask.infill(loaded, words, text, max_tokens=3, seed=0)
    assert filled.text.startswith("the <ENTITY>")
    assert filled.text == gmask.infill(model, tokenizer, text, max_tokens=3, seed=0).text


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("kind", ["chatglm", "chatglm-v0"])
def test_a_chat_reads_and_writes_added_tokens(kind: str, special: bool, tmp_path: Path) -> None:
    """Special ones are text in a question, as all special tokens are, and no part of a reply."""
    tokenizer = make_tokenizer(kind)
    tokenizer.add_tokens(["<ENTITY>"], special_tokens=special)
    token = tokenizer.convert_tokens_to_ids("<ENTITY>")
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "mask", "gmask")}
    ids["eos_token_id"] = tokenizer.convert_tokens_to_ids("<eop>")
    shape = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    model = grown(tokenizer, ChatGLMForConditionalGeneration(ChatGLMConfig(vocab_size=token, **shape, **ids)))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for one, words in ((model, tokenizer), gmask.load(tmp_path)):
        asked = one.encode_chat(words, "the <ENTITY> man", [], max_length=None)["input_ids"][0].tolist()
        assert (token in asked) != special
        bias = {(token,): 1e4}
        reply, _ = one.chat(words, "the", [], do_sample=False, max_new_tokens=2, sequence_bias=bias)
        assert reply == ("" if special else "<ENTITY> <ENTITY>")


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "ours"])
def test_the_published_form_keeps_added_tokens(kind: str, special: bool, tmp_path: Path) -> None:
    """What `gmask convert` writes for the published code, which knows names and ids alone."""
    tokenizer = make_tokenizer(kind)
    tokenizer.add_tokens(["<ENTITY>", "<two words>"], special_tokens=special)
    write_tokenizer(tokenizer, tmp_path, published=True)
    assert "token_flags" not in (tmp_path / "tokenizer_config.json").read_text("utf-8")
    again = read_tokenizer(tmp_path)
    samples = ["a<ENTITY>b <two words>", "the man"]
    assert describe(again, samples) == describe(tokenizer, samples)


@pytest.mark.parametrize("kind", KINDS)
def test_an_added_token_removes_white_space_where_it_says_so(kind: str) -> None:
    """By the rule of the vocabulary for its special tokens, and more if an `AddedToken` asks for it."""
    tokenizer = make_tokenizer(kind)
    tokenizer.add_tokens(
        ["<plain>", AddedToken("<tight>", lstrip=True, rstrip=True), AddedToken("lone", single_word=True)]
    )
    flags = {str(token): token for token in tokenizer.added_tokens_decoder.values()}
    both = kind in ("chinese", "gpt2", "bert", "roberta")
    assert (flags["<plain>"].lstrip, flags["<plain>"].rstrip) == (both, both)
    assert (flags["<tight>"].lstrip, flags["<tight>"].rstrip) == (True, True)
    lone = tokenizer.convert_tokens_to_ids("lone")
    counts = [tokenizer(text)["input_ids"].count(lone) for text in ("a lone man", "alone", "lones", "lone")]
    assert counts == [1, 0, 0, 1]


def test_a_tokenizer_alone_is_read_by_the_auto_class_in_a_new_process(tmp_path: Path) -> None:
    """No config beside it, no class of ours imported."""
    for kind in KINDS:
        make_tokenizer(kind).save_pretrained(tmp_path / kind)
    program = """
import sys
from pathlib import Path
import gmask
from transformers import AutoTokenizer
for folder in sys.argv[1:]:
    print(type(AutoTokenizer.from_pretrained(folder)).__name__)
"""
    run = [sys.executable, "-c", program, *(str(tmp_path / kind) for kind in KINDS)]
    names = subprocess.run(run, capture_output=True, text=True, check=True, timeout=600).stdout.split()
    assert names == [type(make_tokenizer(kind)).__name__ for kind in KINDS]
