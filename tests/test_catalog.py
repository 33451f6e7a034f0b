"""Does the catalog say what the published files say?"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from gmask.checkpoints.zoo import FAMILIES, Family, family_of_shape, find_family
from gmask.cli import main
from gmask.cli.models import COLUMNS, print_zoo, table_row
from gmask.models.glm import GLMConfig, GLMForConditionalGeneration

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
GLM = [family for family in FAMILIES if family.architecture == "glm"]
TOKENIZERS = {
    "BertWordPieceTokenizer": {"bert"},
    "GPT2BPETokenizer": {"gpt2", "roberta"},
    "ChineseSPTokenizer": {"chinese"},
}
ROLES = {"ENC": "cls", "MASK": "mask", "sMASK": "smask", "gMASK": "gmask"}  # the training code's words, and a config's


def named(name: str) -> Family:
    family = find_family(name)
    assert family is not None
    return family


def golden(path: str) -> Any:
    if not (GOLDEN / path).is_file():
        pytest.skip("the golden files are not here")
    return json.loads((GOLDEN / path).read_text(encoding="utf-8"))


@pytest.mark.parametrize("family", GLM, ids=lambda family: family.name)
def test_the_parameters_are_those_of_our_model_of_that_shape(family: Family) -> None:
    config = GLMConfig(
        vocab_size=family.vocab_size,
        hidden_size=family.hidden_size,
        num_hidden_layers=family.layers,
        num_attention_heads=family.heads,
        max_position_embeddings=family.positions,
    )
    with torch.device("meta"):
        assert GLMForConditionalGeneration(config).num_parameters() == family.parameters
    h = family.hidden_size
    tables = family.vocab_size * h + 2 * (family.positions + 1) * h
    assert tables + family.layers * (12 * h * h + 13 * h) + 2 * h == family.parameters
    assert config.head_dim == 64


def test_chatglm_has_rotary_positions_and_so_no_tables_for_them() -> None:
    for family in set(FAMILIES) - set(GLM):
        h = family.hidden_size
        assert family.parameters == family.vocab_size * h + family.layers * (12 * h * h + 13 * h) + 2 * h


def test_every_published_model_has_its_row() -> None:
    rows = golden("zoo.json")["models"]
    published = [row for row in rows if row["readme_params"]]
    assert len(published) == 10
    for row in published:
        family = named(row["readme_name"])
        shape = (family.layers, family.hidden_size, family.heads, family.positions, family.vocab_size)
        assert shape == (
            *(row[k] for k in ("layers", "hidden", "heads", "max_position_embeddings")),
            row["vocab_size_padded_128"],
        )
        assert family.parameters == row["parameters_computed"]
        assert family.language == row["language"]
        assert len(family.objectives) == len(row["objective"].split("+"))
        assert family.tokenizer in TOKENIZERS[row["tokenizer_type"]]
        assert len(family.masks) == (3 if row["task_mask"] else 1)
        if row["hf_name"]:
            assert find_family(f"THUDM/{row['hf_name'].removeprefix('THUDM/')}") is family
        ids = {f"{ROLES.get(role, role)}_token_id": token_id for role, token_id in row["special_ids"].items()}
        moved = {"unk_token_id", "gmask_token_id"} if family.tokenizer == "chinese" else set()
        assert {r: i for r, i in ids.items() if r not in moved} == {
            r: family.special_ids[r] for r in ids if r not in moved
        }


def test_the_special_ids_are_those_of_the_published_tokenizers() -> None:
    names = {"bert": "GLM-Large", "gpt2": "GLM-10B", "roberta": "GLM-RoBERTa", "chinese": "GLM-10B-Chinese"}
    for kind, name in names.items():
        special = golden(f"tokenizers/hf-{kind}.json")["special"]
        ids = {f"{role}_token_id": pair[1] for role, pair in special.items() if isinstance(pair, list)}
        derived = {"unk_token_id"} if kind == "gpt2" else {"pad_token_id"} if kind == "roberta" else set()
        assert {r: ids[r] for r in named(name).special_ids if r not in derived} == {
            r: i for r, i in named(name).special_ids.items() if r not in derived
        }
    known = golden("tokenizers/chatglm/published_known_ids.json")["constants"]
    ids = named("ChatGLM-6B").special_ids
    assert [ids[f"{role}_token_id"] for role in ("mask", "gmask", "smask", "sop", "eop", "pad", "unk")] == [
        known[token] for token in ("[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<pad>", "<unk>")
    ]


def test_the_rows_are_consistent() -> None:
    names = [name.casefold() for family in FAMILIES for name in {family.name, *family.hub_names, *family.aliases}]
    assert len(names) == len(set(names))
    for family in FAMILIES:
        assert max(family.special_ids.values()) < family.vocab_size
        assert family.vocab_size % 32 == 0
        assert set(family.masks) <= {"[MASK]", "[sMASK]", "[gMASK]"}
        assert set(family.objectives) <= {"token", "sentence", "document"}
        assert all(name.count("/") == 1 for name in (*family.hub_names, *family.aliases))
        assert family.hub_names or family.archive


def test_names_are_found_in_any_case_by_hub_and_mirror_but_not_by_their_parts() -> None:
    for name in ("GLM-10B", "glm-10b", "THUDM/glm-10b", "zai-org/GLM-10b", "ZhipuAI/glm-10b", "BAAI/glm-10b"):
        assert named(name).name == "GLM-10B"
    assert named("THUDM/glm-large").name == "GLM-Large"
    assert named("sunzeyeah/glm-10B-chinese").copied_rows == {}
    assert named("THUDM/glm-10b-chinese").copied_rows == {50009: 50007}
    for name in ("", "glm", "10B", "THUDM/", "someone/glm-10b", "THUDM/glm-4-9b", "chatglm2-6b"):
        assert find_family(name) is None


def test_a_shape_finds_its_row_unless_rows_of_that_shape_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    for family in FAMILIES:
        found = family_of_shape(
            layers=family.layers,
            hidden_size=family.hidden_size,
            vocab_size=family.vocab_size,
            positions=family.positions,
        )
        assert found is not None
        assert (found.heads, found.tokenizer) == (family.heads, family.tokenizer)
    large = dict(layers=24, hidden_size=1024, vocab_size=30592, positions=512)
    assert family_of_shape(**large) is named("GLM-Large")
    assert family_of_shape(**{**large, "positions": 513}) is None
    twin = {field: getattr(named("GLM-Large"), field) for field in Family.__slots__} | {"heads": 8}
    monkeypatch.setattr("gmask.checkpoints.zoo.FAMILIES", (*FAMILIES, Family(**twin)))
    assert family_of_shape(**large) is None


def test_memory_is_the_size_of_the_published_files() -> None:
    """Sizes as ModelScope lists them, in GiB with one digit: they were stored as the catalog says."""
    sizes = {"GLM-2B": 3.6, "GLM-10B": 18.4, "ChatGLM-6B-int8": 6.3, "ChatGLM-6B-int4": 3.6, "GLM-RoBERTa": 1.3}
    for name, size in sizes.items():
        family = named(name)
        dtype = family.dtypes[0] if family.bits else family.stored_dtype
        assert dtype is not None
        assert family.memory(dtype) / 2**30 == pytest.approx(size, abs=0.051)
    assert named("ChatGLM-6B-int4-qe").memory("int4") < named("ChatGLM-6B-int4").memory("int4")
    assert named("GLM-Large").dtypes == ("float32", "bfloat16", "float16")


def test_only_chatglm_has_blanks_in_its_vocabulary_that_it_was_not_trained_with() -> None:
    blanks = {"mask_token_id": "[MASK]", "smask_token_id": "[sMASK]", "gmask_token_id": "[gMASK]"}

    def untrained(family: Family) -> set[str]:
        return {blank for role, blank in blanks.items() if role in family.special_ids} - set(family.masks)

    assert [family.name for family in GLM if untrained(family)] == []
    assert untrained(named("ChatGLM-6B")) == {"[MASK]", "[sMASK]"}


@pytest.fixture
def info(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def info(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gmask", "info", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), *capsys.readouterr()

    return info


def test_info_lists_the_zoo_for_programs_and_for_people(info: Any, monkeypatch: Any, capsys: Any) -> None:
    heading, *lines = info("--zoo")[1].splitlines()
    assert heading.split("\t") == list(COLUMNS)
    assert [tuple(line.split("\t")) for line in lines] == [table_row(family) for family in FAMILIES]
    listed = json.loads(info("--zoo", "--json")[1])
    assert [row["parameters"] for row in listed] == [family.parameters for family in FAMILIES]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for columns in (90, 120):
        monkeypatch.setenv("COLUMNS", str(columns))
        print_zoo(FAMILIES)
        table = capsys.readouterr().out
        assert max(map(len, table.splitlines())) <= columns
        assert table.count("[sMASK]") == sum("[sMASK]" in family.masks for family in FAMILIES), "brackets are no markup"
    for shown in ("THUDM/glm-10b-chinese", "39.5 GB float32", "The ChatGLM-6B License", "glm-base-blank.tar.bz2"):
        assert shown in table


def test_info_knows_a_published_model_that_is_not_here_and_says_how_to_get_it(info: Any) -> None:
    row = json.loads(info("thudm/glm-10b", "--json")[1])
    assert (row["name"], row["memory_bytes"]["bfloat16"]) == ("GLM-10B", 19761364992)
    assert "gmask infill --model THUDM/glm-10b" in row["to_get_it"]
    assert "glm-base-blank.tar.bz2" in info("GLM-Base")[1]
    assert "(12.3 GB) when you name it: gmask chat --model THUDM/chatglm-6b" in info("chatglm-6b")[1]
    assert "early revisions of THUDM/chatglm-6b" in info("ChatGLM-6B-v0")[1]
    code, out, err = info("THUDM/glm-11b")
    assert (code, out) == (2, "")
    assert err.startswith("gmask: THUDM/glm-11b: no such folder, and no published model")
    assert info("GLM-Base", "--zoo")[0] == 2


def write_config(folder: Path, **shape: int) -> None:
    """A folder in the published form, with a tensor for weights: info reads their header alone."""
    config = {"model_type": "glm", "block_position_encoding": True, **shape}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"word_embeddings.weight": torch.zeros(1, dtype=torch.float16)}, folder / "model.safetensors")


def test_info_finds_what_was_fetched_before_without_a_network(info: Any, monkeypatch: Any, tmp_path: Path) -> None:
    for name in ("THUDM/glm-10b", "someone/tuned"):
        repository = tmp_path / f"models--{name.replace('/', '--')}"
        (repository / "snapshots" / "abc").mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("abc")
        shape = dict(num_layers=2, hidden_size=32, num_attention_heads=4, max_sequence_length=64, vocab_size=48)
        write_config(repository / "snapshots" / "abc", **shape)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert json.loads(info("ZhipuAI/glm-10b", "--json")[1])["folder"].endswith("models--THUDM--glm-10b/snapshots/abc")
    assert json.loads(info("someone/tuned", "--json")[1])["shape"]["hidden_size"] == 32
    assert info("someone/else")[0] == 2


def test_info_says_which_published_models_have_the_shape_of_a_folder(info: Any, tmp_path: Path) -> None:
    shape = dict(num_layers=24, hidden_size=1024, num_attention_heads=16, max_sequence_length=512, vocab_size=30592)
    write_config(tmp_path, **shape)
    folder = json.loads(info(str(tmp_path), "--json")[1])
    assert folder["same_shape_as"] == ["GLM-Large", "GLM-Doc"]
    assert (folder["parameters"], folder["stored_as"]) == (334688256, ["float16"])
    write_config(tmp_path, **shape | {"num_attention_heads": 8})
    assert json.loads(info(str(tmp_path), "--json")[1])["same_shape_as"] == []


def test_info_tells_what_a_checkpoint_of_the_training_code_shows(info: Any) -> None:
    checkpoint = Path(__file__).parent / "golden" / "thudm-glm-tiny" / "ckpt"
    if not (checkpoint / "1234" / "mp_rank_00_model_states.pt").is_file():
        pytest.skip("the golden checkpoint is not here")
    about = json.loads(info(str(checkpoint), "--json")[1])
    assert (about["form"], about["parallel_size"], about["same_shape_as"]) == ("megatron", 1, [])
    assert about["shape"] == {"layers": 2, "hidden_size": 48, "positions": 96, "vocabulary": 512}
    assert "special ids     not known" in info(str(checkpoint))[1]


def test_the_page_of_the_documentation_shows_the_catalog() -> None:
    page = (Path(__file__).parents[1] / "docs" / "reference" / "zoo.md").read_text(encoding="utf-8")
    shown = [
        [cell.strip(" `") for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")
    ]
    assert shown[0] == list(COLUMNS)
    assert shown[1 : len(FAMILIES) + 1] == [list(table_row(family)) for family in FAMILIES]
