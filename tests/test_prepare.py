"""Does `gmask prepare` drop what it must and nothing else, whoever does the work and wherever it stops?"""

import errno
import gzip
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from corpus_data import PLANTED, check_prepared, make_recipe, read_kept, write_corpus
from gmask.cli import main
from gmask.corpus import documents, duplicates, preparation
from gmask.corpus.documents import Block, CorpusFile, FileRange, find_blocks, find_corpus_files, read_block
from gmask.corpus.duplicates import EXACT, FIRST_BAND, BlockSignatures, match_documents, writing_signatures
from gmask.corpus.filters import cut_units, find_contamination, find_fault, hash_ngrams, identify_language
from gmask.corpus.preparation import open_prepared, run_preparation
from gmask.corpus.shards import hash_tokenizer
from gmask.errors import GmaskError
from gmask.recipes.preparation import (
    DuplicateSettings,
    FilterSettings,
    PreparationDataSettings,
    load_preparation,
)
from gmask.recipes.pretraining import DataSettings
from gmask.tasks.records import Source
from gmask.training.corpus_rows import build_cache, open_texts

ROOT = Path(__file__).parents[1]
BLOCK_BYTES = 60_000


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus with planted faults; not changed by tests."""
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, 0.25)
    write_recipe(folder, folder)
    run_preparation(str(folder / "recipe.yaml"))
    return folder


def write_recipe(corpus: Path, folder: Path, **changes: Any) -> str:
    """A recipe for the corpus whose result is in ``folder/prepared``."""
    tree = make_recipe(corpus)
    tree["data"]["block_bytes"] = BLOCK_BYTES
    tree["run"]["out"] = str(folder / "prepared")
    for key, value in changes.items():
        section, name = key.split("__")
        tree.setdefault(section, {})[name] = value
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree), "utf-8")
    return str(folder / "recipe.yaml")


def files_of(out: Path) -> dict[str, bytes]:
    """All files of a result but the recipe, which names its folder."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name != "recipe.yaml"
    }


def load_tokenizer(corpus: Path) -> Tokenizer:
    return Tokenizer.from_file(str(corpus / "tokenizer" / "tokenizer.json"))


# --- the whole ---


def test_all_that_was_planted_is_dropped_and_nothing_else(corpus: Path) -> None:
    found = check_prepared(corpus, corpus / "prepared")
    assert {name: count for name, count in found.items() if name.startswith(("missed", "lost")) and count} == {}
    for reason in PLANTED:
        assert found[f"reported {reason}"] == found[f"planted {reason}"] > 0, reason


def test_the_report_counts_shows_and_draws(corpus: Path) -> None:
    report = corpus / "prepared" / "report"
    values = json.loads((report / "report.json").read_text("utf-8"))["sources"]
    manifest = json.loads((corpus / "prepared" / "manifest.json").read_text("utf-8"))
    for source in manifest["sources"]:
        found = values[source["name"]]
        dropped = sum(one["documents"] for one in found["dropped"].values())
        assert found["documents"] == found["kept_documents"] + dropped == sum(found["lengths"].values())
        assert found["kept_documents"] == source["train"]["documents"]
        assert found["kept_tokens"] == source["train"]["tokens"]
        assert all(1 <= len(one["samples"]) <= 3 for one in found["dropped"].values())
        assert all(len(sample["text"]) <= 300 for one in found["dropped"].values() for sample in one["samples"])
    page, markdown = (report / "report.html").read_text("utf-8"), (report / "report.md").read_text("utf-8")
    sample = values["en"]["dropped"]["contamination"]["samples"][0]
    assert sample["shared"] in page and sample["shared"] in markdown and page.count("data:image/png") == 2
    assert all((report / name).read_bytes().startswith(b"\x89PNG") for name in ("dropped.png", "lengths.png"))


def test_a_run_that_is_finished_is_left_as_it_is(corpus: Path) -> None:
    before = files_of(corpus / "prepared")
    assert run_preparation(str(corpus / "recipe.yaml")) == corpus / "prepared"
    assert files_of(corpus / "prepared") == before and not (corpus / "prepared" / "work").exists()
    with pytest.raises(GmaskError, match="is prepared already: choose another run"):
        run_preparation(str(corpus / "recipe.yaml"), resume=False)


def test_documents_do_not_depend_on_blocks_and_parts(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicates, "PART_DOCUMENTS", 40)
    monkeypatch.setattr(duplicates, "CHUNK_DOCUMENTS", 7)
    monkeypatch.setattr(duplicates, "PAIRS_AT_ONCE", 3)
    run_preparation(write_recipe(corpus, tmp_path, data__block_bytes=20_000))
    tokenizer = load_tokenizer(corpus)
    assert read_kept(tmp_path / "prepared", tokenizer) == read_kept(corpus / "prepared", tokenizer)


@pytest.mark.parametrize("stage", ["_read", "_match", "_tokenize", "_finish"])
def test_a_run_goes_on_where_it_stopped_and_ends_with_the_same_bytes(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    recipe, whole, calls = write_recipe(corpus, tmp_path), getattr(preparation, stage), []

    def stop(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 3 or stage == "_finish":
            raise KeyboardInterrupt
        whole(*arguments)

    monkeypatch.setattr(preparation, stage, stop)
    with pytest.raises(KeyboardInterrupt):
        run_preparation(recipe)
    done = len(calls) - 1
    monkeypatch.undo()
    counted: list[object] = []
    monkeypatch.setattr(preparation, stage, lambda *arguments: (counted.append(arguments), whole(*arguments)))
    run_preparation(recipe)
    assert files_of(tmp_path / "prepared") == files_of(corpus / "prepared")
    if stage in ("_read", "_tokenize"):
        assert len(counted) == len(find_blocks(load_preparation(recipe).data)[1]) - done, "no task was made twice"


def test_machines_that_share_a_folder_make_what_one_makes(corpus: Path, tmp_path: Path) -> None:
    recipe = write_recipe(corpus, tmp_path, run__machines=2)
    second = threading.Thread(target=run_preparation, args=(recipe, ["run.machine=1"]))
    second.start()
    run_preparation(recipe)
    second.join()
    assert files_of(tmp_path / "prepared") == files_of(corpus / "prepared")


@pytest.mark.slow
def test_a_killed_run_of_two_processes_ends_with_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    recipe, out = write_recipe(corpus, tmp_path, run__processes=2), tmp_path / "prepared"
    command = [sys.executable, "-m", "gmask", "prepare", recipe]
    for wanted in ("*.read.json", "*.tokenized.json"):
        run = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while not list((out / "work").glob(wanted)) and run.poll() is None:
            time.sleep(0.01)
        run.send_signal(signal.SIGKILL)
        run.wait()
        assert not (out / "manifest.json").exists()
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL, timeout=600)
    assert files_of(out) == files_of(corpus / "prepared")


# --- duplicates, beside a plain restatement ---


def write_signatures(folder: Path, texts: list[str], rules: DuplicateSettings, *, sizes: list[int]) -> BlockSignatures:
    left = list(texts)
    for number, size in enumerate(sizes):
        with writing_signatures(folder, documents.block_name(number), rules) as writer:
            for text in left[:size]:
                writer.add(text, cut_units(text))
        del left[:size]
    return BlockSignatures(folder, len(sizes), rules)


def find_all(blocks: BlockSignatures, columns: range, parts: int) -> dict[int, set[int]]:
    """The originals of each duplicate, over all parts of some columns."""
    found: dict[int, set[int]] = {}
    for column in columns:
        for part in range(parts):
            for duplicate, original in match_documents(blocks, column, part, parts).T.tolist():
                found.setdefault(duplicate, set()).add(original)
    return found


def shingles(text: str, n: int) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[at : at + n]) for at in range(len(words) - n + 1)}


def test_near_duplicates_are_those_of_a_comparison_of_all_pairs(tmp_path: Path) -> None:
    rng, rules = np.random.default_rng(0), DuplicateSettings()
    texts = list[str]()
    for number in range(40):
        words = [f"w{word}" for word in rng.integers(0, 10**6, 120)]
        texts.append(" ".join(words))
        for edits in (1, 2, 30):  # Jaccard about 0.92, 0.84 and 0.15
            changed = list(words)
            for at in rng.choice(120, edits, replace=False):
                changed[at] = f"x{number}-{at}".replace("-", "y")
            texts.append(" ".join(changed))
    order = rng.permutation(len(texts))
    texts = [texts[index] for index in order]
    blocks = write_signatures(tmp_path, texts, rules, sizes=[50, 0, 70, 40])
    assert len(blocks) == len(texts)
    for parts in (1, 4):
        found = find_all(blocks, range(FIRST_BAND, FIRST_BAND + rules.bands), parts)
        sets = [shingles(text, rules.ngram) for text in texts]
        for earlier, later in combinations(range(len(texts)), 2):
            similarity = len(sets[earlier] & sets[later]) / len(sets[earlier] | sets[later])
            if similarity >= 0.9:
                assert later in found, "a near duplicate was missed"
            if similarity < 0.5:
                assert earlier not in found.get(later, ()), "two that are not alike were taken for duplicates"
        assert all(max(originals) < duplicate for duplicate, originals in found.items()), "the first one is kept"


@settings(deadline=None, max_examples=25)
@given(texts=st.lists(st.sampled_from(["a b", "A  B", "a\nb ", "ab", "河 水", "河水", "...", "!!!"]), max_size=30))
def test_exact_duplicates_are_those_of_a_dictionary(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    rules = DuplicateSettings(near=False)
    half = len(texts) // 2
    blocks = write_signatures(tmp_path_factory.mktemp("exact"), texts, rules, sizes=[half, len(texts) - half])
    seen = dict[str, int]()
    expected = dict[int, set[int]]()
    for number, text in enumerate(texts):
        normal = " ".join(text.casefold().split())
        if normal in seen:
            expected[number] = {seen[normal]}
        seen.setdefault(normal, number)
    assert find_all(blocks, range(EXACT, EXACT + 1), 3) == expected


def test_hashes_of_ngrams_say_which_sequences_are_equal() -> None:
    words = ["the", "cat", "saw", "the", "cat", "saw", "the", "dog"]
    hashes = hash_ngrams(words, 3).tolist()
    expected = [tuple(words[at : at + 3]) for at in range(len(words) - 2)]
    for one, other in combinations(range(len(hashes)), 2):
        assert (hashes[one] == hashes[other]) == (expected[one] == expected[other])
    assert hash_ngrams(["a", "b"], 5).tolist() == hash_ngrams(["a", "b"], 2).tolist()
    assert hash_ngrams(["a", "b"], 2)[0] != hash_ngrams(["b", "a"], 2)[0]


# --- filters ---

EN = (
    "The river is wide here, and the old town stands on its far side. In spring the water rises over the lower "
    "fields, so nobody builds a house there. My grandfather used to say that a river remembers every road it has "
    "ever taken, and that sooner or later it will walk each of them again, slowly and without asking anyone first."
)
ZH = (
    "河在这里很宽，老城就在对岸。春天水涨起来，淹没低处的田地，所以没有人在那里盖房子。祖父常说，河记得自己走过的每一条路，"
    "迟早还会慢慢地再走一遍，也不会先问任何人。孩子们夏天在岸边钓鱼，冬天等冰结实了再过河。"
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (EN, None),
        (ZH, None),
        (EN[:100], "min_units"),
        (" ".join(["a", "to", "of", "i"] * 20), "mean_word_length"),
        (EN + " #" * 20, "max_symbols"),
        (" ".join(["2034", "1856"] * 30) + " and letters", "min_alphabetic"),
        (EN + "!?" * 150, "min_letters"),
        ("\n".join("- " + part for part in EN.split(" ", 40)), "max_bullet_lines"),
        ("\n".join(EN[at : at + 100] + "…" for at in range(0, len(EN), 100)), "max_ellipsis_lines"),
        (EN + "\nGo on\nGo on\nGo on", "max_repeated_lines"),
        ("\n".join(["one", "two", "three", "four", EN, EN]), "max_repeated_chars"),
        ("buy now " * 40, "max_top_ngrams"),
        (EN + " Lorem IPSUM dolor", "phrases"),
        ("Le fleuve est large ici, et la vieille ville se tient sur l'autre rive. Au printemps, l'eau monte sur "
         "les champs du bas, alors personne n'y construit de maison. Mon grand-père disait qu'un fleuve se "
         "souvient de chaque chemin qu'il a pris, et que tôt ou tard il les reprendra tous, lentement, sans "
         "demander à personne.", "languages"),
    ],
)  # fmt: skip
def test_each_rule_drops_what_it_names(text: str, reason: str | None) -> None:
    rules = FilterSettings(languages=("en", "zh"))
    assert find_fault(text, cut_units(text), rules) == reason
    if reason is not None and reason not in ("phrases",):
        off = FilterSettings(**{"languages": ("en", "zh"), reason: None})
        assert find_fault(text, cut_units(text), off) != reason, "null turns a rule off"


def test_units_are_words_and_single_characters() -> None:
    assert cut_units("Hello, 世界! It's 42。") == ["hello", "世", "界", "it", "s", "42"]
    assert (identify_language(EN), identify_language(ZH)) == ("en", "zh")


def test_contamination_is_thirteen_words_or_characters_in_a_row() -> None:
    for text in (EN, ZH):
        units = cut_units(text)
        known = np.unique(hash_ngrams(units[20:33], 13))
        assert find_contamination(units, 13, known) == " ".join(units[20:33])
        assert find_contamination(units[:32], 13, known) is None
        assert find_contamination(units[20:32], 13, known) is None


# --- reading ---


@settings(deadline=None, max_examples=40)
@given(
    lines=st.lists(st.text("ab河\r", min_size=0, max_size=12), max_size=12),
    ends=st.booleans(),
    block_bytes=st.integers(1024, 1024),
    cuts=st.integers(1, 9),
)
def test_pieces_of_a_file_have_each_line_once(
    lines: list[str], ends: bool, block_bytes: int, cuts: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = "\n".join(json.dumps({"text": f"{number} {line}"}) for number, line in enumerate(lines))
    path = tmp_path_factory.mktemp("pieces") / "a.jsonl"
    path.write_bytes((data + "\n" * ends).encode())
    size = path.stat().st_size
    bounds = [size * at // cuts for at in range(cuts + 1)]
    pieces = tuple(FileRange(str(path), *pair) for pair in pairwise(bounds))
    found = read_block(Block(0, "a", "train", size, pieces), "text", on_bad_line=None, on_bad_file=None)
    assert [int(document.text.split()[0]) for document in found] == list(range(len(lines)))


TEXTS = [EN, "e\u0301tude\n\nzwei", ZH]


def encode(name: str) -> bytes:
    lines = "".join(json.dumps({"text": text, "url": "x"}) + "\n" for text in TEXTS).encode()
    if name.endswith(".parquet"):
        import pyarrow
        from pyarrow import parquet

        file = io.BytesIO()
        parquet.write_table(pyarrow.table({"text": TEXTS, "url": ["x"] * 3}), file, row_group_size=1)
        return file.getvalue()
    if ".wet" in name or ".warc" in name:
        kinds = ["conversion", "metadata", "conversion", "conversion"]
        records = []
        for kind, text in zip(kinds, [TEXTS[0], "no text", *TEXTS[1:]], strict=True):
            head = f"WARC/1.0\r\nWARC-Type: {kind}\r\nContent-Type: text/plain\r\n"
            head += f"WARC-Target-URI: http://a.example/\r\nContent-Length: {len(text.encode())}\r\n\r\n"
            records.append(f"{head}{text}\r\n\r\n".encode())
        return b"".join(map(gzip.compress, records) if name.endswith(".gz") else records)
    if name.endswith(".gz"):
        return gzip.compress(lines)
    return zstandard.compress(lines) if name.endswith(".zst") else lines


@pytest.mark.parametrize(
    "name",
    ["a.jsonl", "a.jsonl.gz", "a.json.gz", "a.jsonl.zst", "a.parquet", "a.warc.wet", "a.warc.wet.gz", "a.warc.gz"],
)
@pytest.mark.parametrize("scheme", ["", "file://", "memory://"])
def test_every_format_is_read_from_any_file_system(tmp_path: Path, name: str, scheme: str) -> None:
    import fsspec

    folder = f"{scheme}{tmp_path}" if scheme != "memory://" else f"memory://{tmp_path.name}-{name}"
    with fsspec.open(f"{folder}/{name}", "wb") as file:
        file.write(encode(name))
    settings = PreparationDataSettings(sources=(Source("a", f"*{name[1:]}"),), root=folder)
    (file,), blocks = find_blocks(settings)
    assert file.size == len(encode(name)) and file.name.startswith(scheme or "/")
    found = [one for block in blocks for one in read_block(block, "text", on_bad_line=None, on_bad_file=None)]
    assert [document.text for document in found] == [EN, "étude\n\nzwei", ZH]


def test_large_tables_are_read_in_row_groups(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    texts = [f"{number} {'x' * 200}" for number in range(200)]
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet", row_group_size=10, compression="none")
    data = PreparationDataSettings(sources=(Source("a", "a.parquet"),), root=str(tmp_path), block_bytes=5000)
    _, blocks = find_blocks(data)
    assert len(blocks) > 3
    found = [one.text for block in blocks for one in read_block(block, "text", on_bad_line=None, on_bad_file=None)]
    assert found == texts


def test_plain_texts_and_small_files_make_one_block(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"{number}.txt").write_text(f"text {number}\n", "utf-8")
    files = find_corpus_files(str(tmp_path / "*.txt"))
    assert [Path(file.name).name for file in files] == [f"{number}.txt" for number in range(5)]
    data = PreparationDataSettings(sources=(Source("a", "*.txt"),), root=str(tmp_path))
    _, (block,) = find_blocks(data)
    found = read_block(block, "text", on_bad_line=None, on_bad_file=None)
    assert [one.text for one in found] == [f"text {number}" for number in range(5)]


# --- splits and pretraining ---

ALL_OFF = dict.fromkeys(
    ["min_units", "mean_word_length", "max_symbols", "min_alphabetic", "min_letters", "max_repeated_lines",
     "max_top_ngrams"]
)  # fmt: skip


def test_prepared_tokens_are_those_of_pretraining_itself(corpus: Path, tmp_path: Path) -> None:
    """Without filters and duplicates both ways give the same documents in the same order."""
    recipe = write_recipe(
        corpus, tmp_path, data__root=str(corpus), filters__min_units=None, duplicates__exact=False,
        duplicates__near=False, decontamination__files=[],
    )  # fmt: skip
    run_preparation(recipe)
    tokenizer = load_tokenizer(corpus)
    data = DataSettings(prepared=str(tmp_path / "prepared"), weights={"zh": 5})
    sources = open_texts(data, tokenizer, split="train")
    assert [(source.name, source.weight) for source in sources] == [("en", 2), ("zh", 5)]
    for source in sources:
        files = sorted(corpus.glob(f"{source.name}.*.jsonl"))
        (cached,) = build_cache(files, tokenizer, tmp_path / "cache" / source.name, progress=False)
        assert len(source.shards) > 1 and len(source) == len(cached.offsets) - 1
        for index in range(len(source)):
            ids = cached.tokens[cached.offsets[index] : cached.offsets[index + 1]]
            assert source.document(index).tolist() == ids.tolist()


def test_validation_is_a_share_or_files_whose_copies_are_not_trained_on(corpus: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(corpus)
    sources = [{"name": "en", "train": "en.*.jsonl", "validation": "en.0.jsonl"}, {"name": "zh", "train": "zh.*.jsonl"}]
    run_preparation(write_recipe(corpus, tmp_path, data__sources=sources, data__validation=0.2))
    train, held_out = (
        {
            source.name: {tuple(source.document(index).tolist()) for index in range(len(source))}
            for source in open_prepared(tmp_path / "prepared", tokenizer, split=split)
        }
        for split in ("train", "validation")
    )
    assert train.keys() == held_out.keys() == {"en", "zh"}
    assert all(not train[name] & held_out[name] and held_out[name] for name in train)
    everything = read_kept(corpus / "prepared", tokenizer)
    assert {name: len(train[name]) + len(held_out[name]) for name in train} == {
        name: len(texts) for name, texts in everything.items()
    }
    assert 0.1 < len(held_out["zh"]) / len(everything["zh"]) < 0.35


def test_pretraining_reads_a_prepared_folder_and_goes_on_exactly(corpus: Path, tmp_path: Path) -> None:
    from gmask.recipes.pretraining import read_recipe
    from gmask.training.pretrain import Pretraining
    from gmask.training.run_folder import read_metrics

    def train(name: str, *, steps: int) -> Path:
        out = tmp_path / name
        tree = {
            "run": {"out": str(out), "threads": 1, "log_every": 1, "save_every": 2, "validate_every": 100},
            "model": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                      "max_position_embeddings": 64, "embedding_dropout": 0.0, "attention_dropout": 0.0,
                      "hidden_dropout": 0.0},
            "optimization": {"steps": steps, "rows_per_step": 2, "rows_per_pass": 2, "warmup_steps": 1,
                             "schedule": "constant", "dtype": "float32"},
            "decay": {"share": 0.0},
            "data": {"prepared": str(corpus / "prepared"), "row_length": 64},
        }  # fmt: skip
        run = Pretraining(read_recipe(tree))
        run.train()
        assert (out / "model" / "tokenizer.json").is_file()
        return out

    whole = train("whole", steps=4)
    train("parts", steps=2)
    parts = train("parts", steps=4)
    losses = [[record["loss"] for record in read_metrics(out / "metrics.jsonl")] for out in (whole, parts)]
    assert losses[0] == losses[1] and len(losses[0]) == 4


# --- mistakes ---


@pytest.fixture
def prepared(corpus: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(corpus / "prepared", tmp_path / "copy"))


def test_another_tokenizer_is_refused(prepared: Path, corpus: Path) -> None:
    tokenizer = load_tokenizer(corpus)
    tokenizer.add_tokens(["river"])
    assert hash_tokenizer(tokenizer) != hash_tokenizer(load_tokenizer(corpus))
    with pytest.raises(GmaskError, match="its texts are tokenized by another tokenizer"):
        open_prepared(prepared, tokenizer)


@pytest.mark.parametrize(
    ("damage", "check", "says"),
    [
        (lambda data: data[:-2], False, "holds .* tokens, not"),
        (lambda data: data[:-2] + bytes([data[-2] ^ 1, data[-1]]), True, r"the hash of 000000\.bin is wrong"),
        (None, False, "No such file"),
    ],
    ids=["cut", "changed", "missing"],
)
def test_a_damaged_shard_is_named(prepared: Path, corpus: Path, damage: Any, check: bool, says: str) -> None:
    path = prepared / "tokens" / "en" / "train" / "000000.bin"
    data = path.read_bytes()
    path.unlink() if damage is None else path.write_bytes(damage(data))
    with pytest.raises(GmaskError, match=rf"tokens/en/train are damaged \(.*{says}.*copy the folder again"):
        open_prepared(prepared, load_tokenizer(corpus), check_hashes=check)


def test_what_is_no_prepared_folder_is_refused(prepared: Path, corpus: Path) -> None:
    tokenizer = load_tokenizer(corpus)
    with pytest.raises(GmaskError, match="has no source 'fr', but en, zh"):
        open_prepared(prepared, tokenizer, weights={"fr": 1})
    manifest = prepared / "tokens" / "en" / "train" / "manifest.json"
    manifest.write_text(manifest.read_text("utf-8").replace('"tokens": ', '"tokens": 1'), "utf-8")
    with pytest.raises(GmaskError, match="is not the one that was prepared"):
        open_prepared(prepared, tokenizer)
    (prepared / "manifest.json").unlink()
    with pytest.raises(GmaskError, match="name a folder that gmask prepare has finished"):
        open_prepared(prepared, tokenizer)


def gmask_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["gmask", *arguments])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main()
    error = capsys.readouterr().err
    assert ended.value.code == 2 and "Traceback" not in error
    return error.splitlines()[-1]


MISTAKES = {
    "no such file": ({"data__sources": [{"name": "a", "train": "none*.jsonl"}]}, "no text file at .*none"),
    "another format": ({"data__sources": [{"name": "a", "train": "recipe.yaml"}]}, "only .* files are read"),
    "unknown scheme": ({"data__sources": [{"name": "a", "train": "nope://a.jsonl"}]}, "cannot be read"),
    "twice": ({"data__sources": [{"name": "a", "train": "a"}] * 2}, "two sources have the same name"),
    "name": ({"data__sources": [{"name": "../a", "train": "a"}]}, "no name of a folder"),
    "tokenizer": ({"tokenizer__path": "/nowhere"}, r"no tokenizer\.json there"),
    "language": ({"filters__languages": ["xx"]}, "'xx' is none of"),
    "evaluation": ({"decontamination__files": ["none.jsonl"]}, "no text file at"),
    "short evaluation": ({"decontamination__ngram": 100}, "has no text of 100 words"),
    "machine": ({"run__machine": 3}, "run.machine is 3"),
    "empty": ({"data__sources": [{"name": "a", "train": "empty.jsonl"}]}, "source a: no document is left .of 0"),
    "tiny": ({"data__sources": [{"name": "a", "train": "tiny.jsonl"}]}, r"no document is left \(of 1: 1 min_units\)"),
    "bad line": ({"data__sources": [{"name": "a", "train": "bad.jsonl"}]}, r"bad\.jsonl, line 2: not JSON"),
    "column": ({"data__sources": [{"name": "a", "train": "table.parquet"}]}, "has no column 'text', but words"),
    "damaged": ({"data__sources": [{"name": "a", "train": "cut.jsonl.gz"}]}, "the gzip file is damaged"),
    "no table": ({"data__sources": [{"name": "a", "train": "bad.parquet"}]}, "cannot be read as parquet"),
}


def write_bad_files(corpus: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    (corpus / "empty.jsonl").write_bytes(b"")
    (corpus / "tiny.jsonl").write_text('{"text": "one word"}\n', "utf-8")
    (corpus / "bad.jsonl").write_text(json.dumps({"text": EN}) + "\n{\n" + json.dumps({"text": ZH}) + "\n", "utf-8")
    lines = "".join(json.dumps({"text": f"{number} {EN}"}) + "\n" for number in range(100)).encode()
    (corpus / "cut.0.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": EN}).encode()))
    (corpus / "cut.jsonl.gz").write_bytes(gzip.compress(lines)[:-50])
    (corpus / "bad.parquet").write_bytes(b"no table at all")
    parquet.write_table(pyarrow.table({"words": ["a"]}), corpus / "table.parquet")


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    mistake: str,
) -> None:
    write_bad_files(corpus)
    changes, says = MISTAKES[mistake]
    error = gmask_fails(monkeypatch, capsys, "prepare", write_recipe(corpus, tmp_path, **changes))
    assert re.search(says, error), error
    assert not (tmp_path / "prepared" / "manifest.json").exists()


def test_bad_lines_and_files_are_counted_when_they_are_skipped(corpus: Path, tmp_path: Path) -> None:
    write_bad_files(corpus)
    sources = [{"name": "a", "train": "bad.jsonl"}, {"name": "b", "train": "cut*.jsonl.gz"}]
    recipe = write_recipe(
        corpus, tmp_path, data__sources=sources, data__skip_bad_lines=True, data__skip_bad_files=True,
        duplicates__near=False,
    )  # fmt: skip
    run_preparation(recipe)
    found = json.loads((tmp_path / "prepared" / "report" / "report.json").read_text("utf-8"))["sources"]
    assert (found["a"]["bad_lines"], found["a"]["kept_documents"]) == (1, 2)
    assert found["b"]["bad_files"] == 1 and 1 <= found["b"]["kept_documents"] < 101
    assert "line 2: not JSON" in found["a"]["errors"][0] and "damaged" in found["b"]["errors"][0]


def test_a_run_does_not_go_on_with_another_recipe_or_other_texts(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "corpus"
    mine.mkdir()
    shutil.copytree(corpus / "tokenizer", mine / "tokenizer")
    for path in (*corpus.glob("??.?.jsonl"), corpus / "evaluation.jsonl"):
        shutil.copy2(path, mine)
    recipe = write_recipe(mine, tmp_path)
    monkeypatch.setattr(preparation, "_finish", lambda *_: None)
    run_preparation(recipe)
    with pytest.raises(GmaskError, match=r"begun with another recipe .*\(filters differ\): set them as they were"):
        run_preparation(recipe, ["filters.min_units=3"])
    with pytest.raises(GmaskError, match="holds a run already: resume it"):
        run_preparation(recipe, resume=False)
    os.utime(mine / "en.0.jsonl", (1, 1))
    with pytest.raises(GmaskError, match=r"\(files differ\)"):
        run_preparation(recipe)
    assert list((tmp_path / "prepared" / "work").glob("*.tokenized.json"))


def test_a_full_disk_is_one_line_and_loses_nothing(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, calls, save = write_recipe(corpus, tmp_path), [], np.save

    def full(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) > 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(*arguments)

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(GmaskError, match=r"prepared/.*cannot be written \(No space left on device\)"):
        run_preparation(recipe)
    monkeypatch.undo()
    assert not list((tmp_path / "prepared").rglob(".*.partial"))
    run_preparation(recipe)
    assert files_of(tmp_path / "prepared") == files_of(corpus / "prepared")


def test_a_folder_with_other_files_is_refused(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "prepared").mkdir()
    (tmp_path / "prepared" / "thesis.txt").write_text("mine", "utf-8")
    with pytest.raises(GmaskError, match="holds other files; name a new folder"):
        run_preparation(write_recipe(corpus, tmp_path))
    assert [path.name for path in (tmp_path / "prepared").iterdir()] == ["thesis.txt"]


def test_pretraining_takes_texts_from_one_place() -> None:
    from gmask.recipes.pretraining import read_recipe

    base: dict[str, Any] = {"run": {"out": "out"}, "optimization": {"steps": 1}}
    sources = [{"name": "a", "train": "a.txt"}]
    for data, says in (
        ({}, "name some, or a folder of gmask prepare"),
        ({"sources": sources, "prepared": "p"}, "sources or prepared, not both"),
        ({"sources": sources, "weights": {"a": 1}}, "data.weights"),
        ({"prepared": "p", "skip_bad_lines": True}, "skip_bad_lines"),
    ):
        with pytest.raises(GmaskError, match=says):
            read_recipe(base | {"data": data})
    with pytest.raises(GmaskError, match="validation_sentences: needs texts"):
        read_recipe(base | {"run": {"out": "out", "validation_sentences": 5}, "data": {"prepared": "p"}})
    with pytest.raises(GmaskError, match="has tokens, and texts are needed here"):
        _ = DataSettings(prepared="p").resolved_sources


def test_the_recipe_shown_and_the_one_shipped_are_valid() -> None:
    assert load_preparation(ROOT / "recipes" / "prepare.yaml").data.sources
    page = (ROOT / "docs" / "how-to" / "prepare.md").read_text("utf-8")
    blocks = re.findall(r"^```yaml\n(.*?)^```$", page, re.M | re.S)
    from gmask.config import build_settings
    from gmask.recipes.preparation import PreparationRecipe

    assert build_settings(PreparationRecipe, yaml.safe_load(blocks[0])).data.sources


def test_corpus_files_know_when_they_changed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text", "utf-8")
    (found,) = find_corpus_files(str(tmp_path / "a.txt"))
    assert found == CorpusFile(str(tmp_path / "a.txt"), 4, str((tmp_path / "a.txt").stat().st_mtime))
