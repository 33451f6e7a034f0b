"""Do published folders get their special ids from their own files, and else from the catalog, and never wrong ones?"""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from gmask.checkpoints.special_ids import TOKEN_SPELLINGS, special_ids
from gmask.checkpoints.zoo import find_family
from gmask.errors import GmaskError

SHARED = Path(__file__).parents[2] / "shared" / "golden" / "tokenizers"
VOCABULARIES = {"bert": "bert-large-uncased-vocab.txt", "gpt2": "gpt2-vocab.json", "roberta": "roberta-vocab.json"}
FAMILIES = {"bert": "GLM-Large", "gpt2": "GLM-2B", "roberta": "GLM-RoBERTa", "chinese": "GLM-Large-Chinese"}
CHINESE_TOKENS = {
    "<|endoftext|>": 50000, "[SEP]": 50001, "[CLS]": 50002, "[MASK]": 50003, "[UNUSED1]": 50004, "[UNUSED2]": 50005,
    "<|startofpiece|>": 50006, "<|endofpiece|>": 50007, "[sMASK]": 50008, "[gMASK]": 50009,
}  # fmt: skip


def write_folder(folder: Path, **files: Any) -> Path:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def config_of(name: str, **changes: Any) -> dict[str, Any]:
    """A published config: no special ids in it."""
    family = find_family(name)
    assert family is not None
    shape = {
        "num_layers": family.layers,
        "hidden_size": family.hidden_size,
        "vocab_size": family.vocab_size,
        "max_sequence_length": family.positions,
    }
    return {"model_type": "glm", **shape, **changes}


def roles_of(name: str) -> dict[str, int]:
    family = find_family(name)
    assert family is not None
    return {role: token_id for role, token_id in family.special_ids.items() if role in TOKEN_SPELLINGS}


@pytest.mark.parametrize("kind", ["bert", "gpt2", "roberta", "chinese"])
def test_published_folders_of_all_four_tokenizers_say_their_ids_themselves(kind: str, tmp_path: Path) -> None:
    source = SHARED / f"hf-{kind}.json"
    if not source.is_file():
        pytest.skip("the golden tokenizers are not here")
    golden = json.loads(source.read_text(encoding="utf-8"))
    folder = write_folder(tmp_path, tokenizer_config=golden["config"], added_tokens=golden["added_tokens"])
    if kind in VOCABULARIES:
        name = "vocab.txt" if kind == "bert" else "vocab.json"
        (folder / name).write_bytes(gzip.decompress((SHARED / "vocab" / f"{VOCABULARIES[kind]}.gz").read_bytes()))
    anonymous = {"model_type": "glm", "vocab_size": 60000}  # fits no row: the files alone have to do
    found = special_ids(folder, anonymous)
    expected = {f"{role}_token_id": pair[1] for role, pair in golden["special"].items() if isinstance(pair, list)}
    assert found == {role: expected[role] for role in TOKEN_SPELLINGS if role in expected}
    (folder / "tokenizer_config.json").unlink()
    guessed = special_ids(folder, {**anonymous, "pad_token_id": None})
    assert guessed == roles_of(FAMILIES[kind]), "without the tokenizer's settings, as the training code had them"


def test_the_row_helps_where_the_vocabulary_is_missing(tmp_path: Path) -> None:
    for kind, name in FAMILIES.items():
        by_shape = special_ids(None, config_of(name))
        tokenizer_class = {"bert": "GLMBertTokenizer", "gpt2": "GLMGPT2Tokenizer"}.get(
            kind, f"GLM{kind.title()}Tokenizer"
        )
        folder = write_folder(tmp_path, tokenizer_config={"tokenizer_class": tokenizer_class})
        by_class = special_ids(folder, config_of(name, num_layers=3))
        by_name = special_ids(None, config_of(name, num_layers=3, _name_or_path=name.lower()))
        assert by_shape == by_class == by_name == roles_of(name)


def test_what_the_config_states_stays(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, added_tokens=CHINESE_TOKENS)
    found = special_ids(folder, config_of("GLM-Large-Chinese", pad_token_id=0, gmask_token_id=7, sop_token_id=None))
    assert found == {
        r: i for r, i in roles_of("GLM-Large-Chinese").items() if r not in ("pad_token_id", "gmask_token_id")
    }
    stated = {role: 1 for role in TOKEN_SPELLINGS}
    assert special_ids(folder, config_of("GLM-Large-Chinese", **stated)) == {}


def test_the_folder_comes_before_the_catalog_and_a_row_that_contradicts_it_is_not_used(tmp_path: Path) -> None:
    published = {"<|startofpiece|>": 50265, "<|endofpiece|>": 50266, "[MASK]": 50267}  # THUDM/glm-roberta-large
    settings = {
        "tokenizer_class": "GLMRobertaTokenizer",
        "name_or_path": "THUDM/glm-roberta-large",
        "mask_token": "[MASK]",
    }
    folder = write_folder(tmp_path, added_tokens=published, tokenizer_config=settings)
    found = special_ids(folder, config_of("GLM-RoBERTa"))
    assert found == {"sop_token_id": 50265, "eop_token_id": 50266, "mask_token_id": 50267}


def test_nothing_certain_is_nothing_at_all(tmp_path: Path) -> None:
    assert special_ids(None, {}) == {}
    assert special_ids(tmp_path, {"model_type": "glm", "vocab_size": 512}) == {}
    chinese = {"tokenizer_class": "GLMChineseTokenizer", "name_or_path": "THUDM/glm-large-chinese"}
    assert special_ids(write_folder(tmp_path, tokenizer_config=chinese), {"vocab_size": 512}) == {}
    assert special_ids(tmp_path, {"vocab_size": 60000}) == {}


def test_tokens_of_a_saved_tokenizer_are_read_in_every_form_that_transformers_writes(tmp_path: Path) -> None:
    spelled = {"content": "[MASK]", "lstrip": True}
    decoder = {"11": {"content": "[MASK]"}, "12": {"content": "<|endoftext|>"}}
    folder = write_folder(tmp_path, tokenizer_config={"mask_token": spelled, "added_tokens_decoder": decoder})
    assert special_ids(folder, {"vocab_size": 20}) == {"mask_token_id": 11, "eos_token_id": 12, "pad_token_id": 12}
    write_folder(folder, tokenizer={"added_tokens": [{"content": "<|startofpiece|>", "id": 13}]})
    assert special_ids(folder, {"vocab_size": 20})["sop_token_id"] == 13


def test_another_models_vocabulary_and_damaged_files_are_named(tmp_path: Path) -> None:
    write_folder(tmp_path, added_tokens=CHINESE_TOKENS)
    with pytest.raises(GmaskError, match=r"the id 50009.*vocab_size of 30592"):
        special_ids(tmp_path, config_of("GLM-Large"))
    (tmp_path / "added_tokens.json").write_text('{"[MASK]": ')
    with pytest.raises(GmaskError, match=r"added_tokens\.json, line 1: not JSON"):
        special_ids(tmp_path, config_of("GLM-Large"))
