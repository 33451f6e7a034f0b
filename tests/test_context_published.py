"""Are texts with blanks read, and answers put back, with each of the published vocabularies?"""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmask.errors import GmaskError
from gmask.generation.answers import token_texts
from gmask.generation.encoding import TextReader
from gmask.generation.predict import SampleReader
from gmask.models.glm import GLMConfig
from gmask.recipes.pretraining import find_blank_tokens
from gmask.tasks.records import Record
from gmask.tasks.task import load_task
from gmask.tokenizers.folder import CLASSES, read_tokenizer
from published_vocabularies import SHARED, copy_vocabulary, needs_vocabularies

pytestmark = needs_vocabularies


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By form, ``published`` or ``training``, and kind."""
    made = {}
    for kind in CLASSES:
        folder = copy_vocabulary(kind, tmp_path_factory.mktemp(kind))
        made[f"training {kind}"] = read_tokenizer(folder)
        config = json.loads((SHARED / "tokenizers" / f"hf-{kind}.json").read_text("utf-8"))
        (folder / "tokenizer_config.json").write_text(json.dumps(config["config"]), "utf-8")
        (folder / "added_tokens.json").write_text(json.dumps(config["added_tokens"]), "utf-8")
        made[f"published {kind}"] = read_tokenizer(folder)
    return made


FORMS = [f"{spacing} {kind}" for spacing in ("published", "training") for kind in CLASSES]


@pytest.mark.parametrize("form", FORMS)
def test_mask_stands_for_the_mask_of_every_vocabulary(form: str, tokenizers: dict[str, Any]) -> None:
    """RoBERTa's is spelt <mask> in the Hugging Face form, which may be written, too."""
    tokenizer = tokenizers[form]
    reader = TextReader(tokenizer)
    context = reader.read("Paris is [MASK] of France.").context
    assert context.ids[0] == tokenizer.cls_token_id
    assert context.ids[-1] == tokenizer.eos_token_id
    assert [context.ids[place] for place in context.blanks] == [tokenizer.mask_token_id]
    assert reader.read(f"Paris is {tokenizer.mask_token} of France.").context == context
    plain = reader.encode_plain("Paris is"), reader.encode_plain(" of France.")
    assert context.ids[1 : context.blanks[0]] == tuple(plain[0])
    assert context.ids[context.blanks[0] + 1 : -1] == tuple(plain[1])


@pytest.mark.parametrize("kind", CLASSES)
@given(parts=st.lists(st.sampled_from(["x", " y", "  ", "\n", "[MASK]", "[MASK] ", "。"]), max_size=6))
def test_the_rule_of_the_training_code_holds_whatever_the_tokenizers_own(
    kind: str, parts: list[str], tokenizers: dict[str, Any]
) -> None:
    """Its own tokenizer reads the text in one piece, as the training code did; the reader reads it in pieces."""
    text = "[MASK]" + "".join(parts)
    trained = tokenizers[f"training {kind}"]
    body = trained(text, add_special_tokens=False)["input_ids"]
    expected = (trained.cls_token_id, *body, trained.eos_token_id)
    assert TextReader(trained).read(text).context.ids == expected
    assert TextReader(tokenizers[f"published {kind}"]).read(text).context.ids == expected


@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize("blank", ["[sMASK]", "[gMASK]"])
def test_a_blank_that_the_model_does_not_know_is_refused(kind: str, blank: str, tokenizers: dict[str, Any]) -> None:
    reader = TextReader(tokenizers[f"training {kind}"])
    with pytest.raises(GmaskError) as caught:
        reader.read(f"a {blank} b")
    assert str(caught.value) == rf"this model was not trained with {blank}: write [MASK]"
    assert reader.read(rf"a \{blank} [MASK]").pieces == (f"a {blank} ", "")
    assert find_blank_tokens(reader.tokenizer).gmask == reader.tokenizer.mask_token_id


@pytest.mark.parametrize("form", FORMS)
def test_only_gmask_leaves_a_text_open(form: str, tokenizers: dict[str, Any]) -> None:
    reader = TextReader(tokenizers[form])
    ends = {blank: reader.read(f"a {blank}").context.ids[-1] for blank in reader.blank_ids}
    eos = reader.tokenizer.eos_token_id
    assert ends == {blank: reader.tokenizer.gmask_token_id if blank == "[gMASK]" else eos for blank in reader.blank_ids}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("text", ["Beijing, the capital", "unbelievable snowboarders", "北京 and 清华大学"])
def test_the_texts_of_tokens_join_to_the_answer(form: str, text: str, tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers[form]
    ids = TextReader(tokenizer).encode_plain(text)
    joined = "".join(token_texts(ids, tokenizer))
    assert joined == tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert "##" not in joined


def test_an_answer_may_continue_a_word(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["training bert"]
    reader = TextReader(tokenizer)
    answer = "".join(token_texts(tokenizer.convert_tokens_to_ids(["##board", "##er", "won"]), tokenizer))
    assert reader.read("The snow[MASK].").splice([answer]).text == "The snowboarder won."


def test_a_gmask_with_the_id_of_the_end_is_still_a_blank(tmp_path: Path) -> None:
    """GLM-10B-Chinese was trained so."""
    reader = TextReader(read_tokenizer(copy_vocabulary("chinese", tmp_path), kind="chinese-nofix"))
    context = reader.read("北京[MASK]，上海[gMASK]").context
    assert [context.ids[place] for place in context.blanks] == [50003, 50007]
    assert reader.special.gmask == reader.special.eop == context.ids[-1]


@pytest.mark.parametrize("form", FORMS)
def test_a_last_word_has_the_published_tokens(form: str, tokenizers: dict[str, Any]) -> None:
    """Those of the text before it, without the space at its end, and of the word with one space."""
    tokenizer = tokenizers[form]
    reader = SampleReader(tokenizer, GLMConfig(), "likelihood", max_source=512)
    (sample,) = load_task("language-model/lambada").samples([Record({"text": "He saw\nsigns of life"}, Path("a"), 1)])
    read = reader.read(sample)
    before, word = (tuple(reader.blanks.encode_plain(text)) for text in ("He saw\nsigns of", " life"))
    mask, eos = tokenizer.mask_token_id, tokenizer.eos_token_id
    assert read.context.ids == (tokenizer.cls_token_id, *before, mask, eos)
    assert (read.answers, read.unscored) == ((word,), 0)
    spelled = tokenizer.convert_ids_to_tokens(word)
    expected = {"gpt2": ["Ġlife"], "roberta": ["Ġlife"], "bert": ["life"], "chinese": ["▁life"]}
    assert spelled == expected[form.split()[1]]
    bare = tokenizer.convert_ids_to_tokens(reader.blanks.encode_plain("life"))
    assert (bare == spelled) == (form.split()[1] in ("bert", "chinese")), "where a space before a word says nothing"
