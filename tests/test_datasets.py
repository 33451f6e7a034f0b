"""Does training see every text once an epoch, in the agreed shares, and the same rows after a restart?"""

import errno
import json
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from gmask.corpus.shards import Shard, TokenSource, hash_tokenizer
from gmask.errors import GmaskError
from gmask.infilling.blanks import BlankTokens, InfillingExample
from gmask.infilling.collator import collate
from gmask.infilling.objectives import OBJECTIVES, Mixture
from gmask.tasks.records import TXT_DOCUMENT_CHARS, Source, find_files, read_documents
from gmask.training.corpus_rows import RowStream, build_cache, open_sources, validation_rows
from gmask.training.tokenizer import train_tokenizer

SPECIAL = BlankTokens(mask=5, smask=6, gmask=7, sop=8, eop=9, pad=0, cls=2, eos=1, dblock=10)
VOCAB_SIZE = 4096
SENTENCE_ENDS = np.arange(VOCAB_SIZE) % 13 == 0  # as if a thirteenth of all tokens ended a sentence
MIXTURE = Mixture(special=SPECIAL, sentence_ends=SENTENCE_ENDS)
TEXTS = [
    "The river is wide, and the old town stands on the river.",
    "河很宽，老城在河上。",
    "A literal [MASK] here.\n\nAnd a second paragraph, in the same document.",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS * 5, vocab_size=420)


def write_jsonl(path: Path, texts: list[str]) -> Path:
    data = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()
    path.write_bytes(zstandard.compress(data) if path.suffix == ".zst" else data)
    return path


def make_source(name: str, lengths: list[int], *, weight: float = 1.0) -> TokenSource:
    """Documents of these lengths; every token of the source is another one."""
    offsets = np.cumsum([0, *lengths])
    tokens = np.arange(16, 16 + offsets[-1], dtype=np.uint16)
    return TokenSource(name, weight, [Shard(tokens, offsets)])


def text_of(example: InfillingExample) -> list[int]:
    """The piece that the example was made of: its context with the answers put back."""
    context = example.input_ids[: example.context_length].tolist()
    answers: dict[int, list[int]] = {}
    for token, place in zip(
        example.labels[example.context_length :],
        example.layout[0, example.context_length :],
        strict=True,
    ):
        if token != SPECIAL.eop:
            answers.setdefault(int(place), []).append(int(token))
    return [token for place, original in enumerate(context) for token in answers.get(place, [original])]


def words_of(rows: list[list[InfillingExample]]) -> list[int]:
    return [token for row in rows for example in row for token in text_of(example) if token >= 16]


# --- reading ---


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst"])
def test_jsonl_files_are_read_line_by_line(tmp_path: Path, name: str) -> None:
    path = write_jsonl(tmp_path / name, [TEXTS[0], "  \n", "e\u0301", TEXTS[2]])
    assert [(d.text, d.line) for d in read_documents(path)] == [(TEXTS[0], 1), ("é", 3), (TEXTS[2], 4)]


def test_a_text_file_is_one_document_unless_it_is_long(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(TEXTS[2] + "\n")
    assert [d.text for d in read_documents(path)] == [TEXTS[2]]
    paragraphs = [f"{index} " * 500 for index in range(40)]
    path.write_text("\n\n".join(paragraphs))
    documents = [d.text for d in read_documents(path)]
    assert len(documents) > 1
    assert "\n\n".join(documents) == "\n\n".join(paragraphs)
    assert all(TXT_DOCUMENT_CHARS <= len(text) < 1.3 * TXT_DOCUMENT_CHARS for text in documents[:-1])


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"text": "no end', "not JSON"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"content": "another field"}', 'no text under "text"'),
        (b"[1, 2]", 'no text under "text"'),
        (rb'{"text": "half \ud83d"}', "the text holds half of a character"),
    ],
)
def test_a_bad_line_is_named_with_its_file_and_number(tmp_path: Path, line: bytes, says: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "one"}\n' + line + b'\n{"text": "three"}\n')
    with pytest.raises(GmaskError, match=rf"bad\.jsonl, line 2: {says}"):
        list(read_documents(path))
    skipped: list[GmaskError] = []
    assert [d.text for d in read_documents(path, on_bad_line=skipped.append)] == ["one", "three"]
    assert len(skipped) == 1


def test_what_stands_beside_a_text_is_not_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one", "perplexity": NaN, "url": "\\ud83d"}\n')
    assert [document.text for document in read_documents(path)] == ["one"]


def test_files_that_are_not_there_or_not_text_are_named(tmp_path: Path) -> None:
    with pytest.raises(GmaskError, match=r"no text file at .*nothing"):
        find_files(str(tmp_path / "nothing*.jsonl"))
    (tmp_path / "a.csv").write_text("a,b")
    with pytest.raises(GmaskError, match=r"a\.csv: only \.jsonl"):
        list(read_documents(tmp_path / "a.csv"))
    (tmp_path / "a.jsonl.zst").write_bytes(b"this is not zstandard")
    with pytest.raises(GmaskError, match=r"a\.jsonl\.zst.* damaged"):
        list(read_documents(tmp_path / "a.jsonl.zst"))


# --- the cache ---


def test_the_cache_holds_each_document_without_special_tokens(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    (shard,) = build_cache([path], tokenizer, tmp_path / "cache", progress=False)
    tokens, offsets = shard.tokens, shard.offsets
    assert tokens.dtype == np.uint16
    assert tokens.min() >= 16, "a literal [MASK] in a text is no blank"
    documents = [tokens[start:end] for start, end in pairwise(offsets)]
    assert [tokenizer.decode(ids.tolist()) for ids in documents] == TEXTS


def test_the_cache_is_used_again_until_texts_or_tokenizer_change(
    tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    path, folder = write_jsonl(tmp_path / "a.jsonl", TEXTS), tmp_path / "cache"
    build_cache([path], tokenizer, folder, progress=False)
    made = (folder / "manifest.json").stat()
    build_cache([path], tokenizer, folder, progress=False)
    assert (folder / "manifest.json").stat().st_ino == made.st_ino
    write_jsonl(path, TEXTS[:2])
    assert len(build_cache([path], tokenizer, folder, progress=False)[0].offsets) == 3
    assert "tokenising them again" in caplog.text
    build_cache([path], train_tokenizer(TEXTS * 5, vocab_size=425), folder, progress=False)
    assert caplog.text.count("tokenising them again") == 2
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.jsonl", "cache"]


def test_padding_and_truncation_do_not_change_the_fingerprint(tokenizer: Tokenizer) -> None:
    other = Tokenizer.from_str(tokenizer.to_str())
    other.enable_truncation(8)
    other.enable_padding()
    assert hash_tokenizer(other) == hash_tokenizer(tokenizer)


@pytest.mark.parametrize(
    ("file", "damage", "fault"),
    [
        ("00000.bin", lambda data: data[:-2], r"cache are damaged .*:"),
        ("00000.bin", lambda data: data[:-1] + bytes([data[-1] ^ 1]), r"cache are damaged .*:"),
        ("00000.npy", lambda data: data[:-8], r"cache are damaged .*:"),
        ("manifest.json", lambda data: data[: len(data) // 2], r"cache/manifest\.json, line \d+: not JSON .*;"),
        ("manifest.json", lambda data: b"", r"cache/manifest\.json: truncated or damaged,"),
    ],
    ids=["truncated", "changed", "offsets", "manifest", "empty"],
)
def test_a_damaged_cache_is_an_error_that_names_the_folder(tmp_path, tokenizer, file, damage, fault) -> None:
    path, folder = write_jsonl(tmp_path / "a.jsonl", TEXTS), tmp_path / "cache"
    build_cache([path], tokenizer, folder, progress=False)
    (folder / file).write_bytes(damage((folder / file).read_bytes()))
    with pytest.raises(GmaskError, match=rf"{fault} delete that folder and run again"):
        build_cache([path], tokenizer, folder, progress=False)


def test_a_full_disk_is_one_clear_error_and_leaves_nothing_behind(tmp_path, tokenizer, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    monkeypatch.setattr(np, "save", full)
    with pytest.raises(GmaskError, match="No space left on device"):
        build_cache([path], tokenizer, tmp_path / "cache", progress=False)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.jsonl"]


def test_bad_lines_are_counted_when_skipped_and_no_text_is_an_error(
    tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{\n{"text": 2}\n')
    with pytest.raises(GmaskError, match="line 2"):
        build_cache([path], tokenizer, tmp_path / "cache", progress=False)
    build_cache([path], tokenizer, tmp_path / "cache", skip_bad_lines=True, progress=False)
    assert json.loads((tmp_path / "cache" / "manifest.json").read_text())["bad_lines"] == 2
    assert "2 bad lines skipped" in caplog.text
    path.write_text("\n")
    with pytest.raises(GmaskError, match="no text in"):
        build_cache([path], tokenizer, tmp_path / "empty", progress=False)


def test_sources_open_with_their_weights(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    pattern = str(tmp_path / "*.jsonl")
    sources = [Source("en/a", pattern, epochs=2), Source("b", pattern, pattern, weight=0.5)]
    train = open_sources(sources, tokenizer, tmp_path / "cache", progress=False)
    assert [(source.name, source.weight) for source in train] == [("en/a", 2 * train[0].n_tokens), ("b", 0.5)]
    validation = open_sources(sources, tokenizer, tmp_path / "cache", split="validation", progress=False)
    assert [source.name for source in validation] == ["b"]


# --- the stream ---


@settings(deadline=None, max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 150), min_size=1, max_size=12),
    row_length=st.integers(32, 200),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_token_is_seen_once_an_epoch(lengths: list[int], row_length: int, seed: int) -> None:
    source = make_source("a", lengths)
    stream = RowStream([source], MIXTURE, row_length=row_length, seed=seed)
    seen: list[int] = []
    while len(seen) < 3 * source.n_tokens:
        seen += words_of([stream.next_row()])
    for epoch in range(3):
        part = seen[epoch * source.n_tokens : (epoch + 1) * source.n_tokens]
        assert sorted(part) == source.shards[0].tokens.tolist()


@pytest.mark.parametrize("parts", [2, 3])
def test_the_parts_of_a_stream_see_every_token_once_an_epoch_and_number_their_rows_apart(parts: int) -> None:
    source = make_source("a", [120, 7, 300, 45, 60, 18, 210])
    streams = [RowStream([source], MIXTURE, row_length=128, seed=5, part=part, parts=parts) for part in range(parts)]
    seen: list[int] = []
    numbers: list[int] = []
    for part, stream in enumerate(streams):
        own: list[int] = []
        order = np.random.default_rng([*stream.readers[0].key, 0]).permutation(len(source))[part::parts]
        due = sum(len(source.document(int(document))) for document in order)
        while len(own) < due:
            numbers.append(stream.row)
            own += words_of([stream.next_row()])
        seen += own[:due]
    assert sorted(seen) == source.shards[0].tokens.tolist()
    assert len(set(numbers)) == len(numbers) and {number % parts for number in numbers} == set(range(parts))
    with pytest.raises(GmaskError, match=r"data.streams is 8, and the source a has 7 documents"):
        RowStream([source], MIXTURE, row_length=128, seed=5, parts=8)


def test_pieces_begin_with_cls_and_end_with_the_document() -> None:
    source = make_source("a", [5, 40, 700])
    stream = RowStream([source], MIXTURE, row_length=128, seed=0)
    last = {int(source.shards[0].tokens[end - 1]) for end in source.shards[0].offsets[1:]}
    for example in (example for row in islice(stream, 40) for example in row):
        text = text_of(example)
        assert text[0] == SPECIAL.cls
        assert (text[-1] == SPECIAL.eos) == (not last.isdisjoint(text))
        words = [token for token in text if token >= 16]
        assert words == list(range(words[0], words[0] + len(words))), "in their order, from one document"


@pytest.mark.parametrize("consumed", [0, 1, 37])
def test_a_resumed_stream_goes_on_bit_for_bit(consumed: int) -> None:
    sources = [make_source("a", [300, 20, 90] * 3, weight=2.0), make_source("b", [50] * 10)]

    def build() -> RowStream:
        return RowStream(sources, MIXTURE, row_length=128, seed=3, max_piece=100)

    whole = build()
    for _ in range(consumed):
        whole.next_row()
    state = json.loads(json.dumps(whole.state_dict()))
    resumed = build()
    resumed.load_state_dict(state)
    for _ in range(60):
        before, after = (
            collate([stream.next_row()], row_length=128, pad_id=SPECIAL.pad) for stream in (whole, resumed)
        )
        assert all(before[key].equal(after[key]) for key in before)


def test_a_state_of_other_texts_or_settings_is_refused() -> None:
    a, b = make_source("a", [300, 20]), make_source("b", [50])
    state = RowStream([a], MIXTURE, row_length=128, seed=0).state_dict()
    with pytest.raises(GmaskError, match=r"texts have changed \(b\)"):
        RowStream([a, b], MIXTURE, row_length=128, seed=0).load_state_dict(state)
    with pytest.raises(GmaskError, match=r"texts have changed \(a\)"):
        RowStream([make_source("a", [300])], MIXTURE, row_length=128, seed=0).load_state_dict(state)
    with pytest.raises(GmaskError, match="row_length was 128 and is now 64"):
        RowStream([a], MIXTURE, row_length=64, seed=0).load_state_dict(state)


def test_the_sources_share_the_tokens_by_weight_and_the_rows_are_full() -> None:
    sources = [
        make_source("long", [900] * 4, weight=5.0),
        make_source("short", [30] * 20, weight=3.0),
        make_source("middle", [200] * 10, weight=2.0),
    ]
    stream = RowStream(sources, MIXTURE, row_length=512, seed=0, max_piece=256)
    rows = list(islice(stream, 300))
    taken = np.array([stream.epochs()[source.name] * source.n_tokens for source in sources])
    np.testing.assert_allclose(taken / taken.sum(), [0.5, 0.3, 0.2], atol=0.005)
    used = np.array([sum(len(example.input_ids) for example in row) for row in rows])
    assert used.max() <= 512
    assert used.mean() > 0.96 * 512
    assert max(example.layout.max() for row in rows for example in row) <= 256


def test_the_objectives_keep_their_shares_although_long_examples_are_cut_again() -> None:
    source = make_source("a", [4000])
    stream = RowStream([source], MIXTURE, row_length=512, seed=1, max_piece=200)
    drawn = [example.objective for row in islice(stream, 1500) for example in row]
    for objective in OBJECTIVES:
        expected = getattr(MIXTURE, objective)
        # Five standard deviations of a binomial share.
        tolerance = 5 * (expected * (1 - expected) / len(drawn)) ** 0.5
        assert abs(drawn.count(objective) / len(drawn) - expected) < tolerance


def test_epochs_and_seeds_give_other_orders() -> None:
    source = make_source("a", [40] * 30)

    def order(seed: int) -> list[int]:
        stream = RowStream([source], MIXTURE, row_length=64, seed=seed)
        return words_of([stream.next_row() for _ in range(90)])[: 2 * source.n_tokens]

    first = order(0)
    assert first == order(0)
    assert first != order(1)
    assert first[: source.n_tokens] != first[source.n_tokens :]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_validation_rows_are_fixed_and_of_one_objective(objective) -> None:
    source = make_source("a", [100] * 20)

    def rows(max_rows: int) -> list[list[InfillingExample]]:
        return validation_rows(source, MIXTURE, objective, row_length=128, max_rows=max_rows)

    first, second = (collate(rows(5), row_length=128, pad_id=0) for _ in range(2))
    assert first["input_ids"].shape == (5, 128)
    assert all(first[key].equal(second[key]) for key in first)
    everything = rows(1000)
    assert {example.objective for row in everything for example in row} == {objective}
    assert len(words_of(everything)) == len(set(words_of(everything))) > 0.9 * source.n_tokens


def test_a_stream_needs_room_and_sources() -> None:
    with pytest.raises(GmaskError, match="row_length must be at least 32"):
        RowStream([make_source("a", [9])], MIXTURE, row_length=16, seed=0)
    with pytest.raises(GmaskError, match="one source or more"):
        RowStream([], MIXTURE, row_length=64, seed=0)
