"""The texts of pretraining: tokenised once into memory-mapped files, and packed into rows by a resumable stream."""

from __future__ import annotations

import logging
import math
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from gmask.corpus.preparation import open_prepared
from gmask.corpus.shards import (
    MANIFEST_FILE,
    SHARDS_VERSION,
    Shard,
    TokenArray,
    TokenSource,
    hash_tokenizer,
    make_encoder,
    open_shards,
    read_shards_manifest,
    write_shards_manifest,
    writing_shard,
)
from gmask.errors import GmaskError
from gmask.files import written_folder
from gmask.infilling.blanks import BlankTokens, InfillingExample, IntArray
from gmask.infilling.objectives import Mixture, Objective
from gmask.recipes.pretraining import DataSettings
from gmask.tasks.records import Source, find_files, read_texts

logger = logging.getLogger(__name__)
CACHE_REMEDY = "delete that folder and run again"


def open_texts(data: DataSettings, tokenizer: Tokenizer, *, split: str, progress: bool = True) -> list[TokenSource]:
    """The tokens of a recipe's texts: of the folder that was prepared, or of the sources, tokenised once.

    Raises:
        GmaskError: as `open_prepared` or `build_cache`.
    """
    if data.prepared is not None:
        return open_prepared(
            data.prepared, tokenizer, split=split, weights=data.weights, check_hashes=data.check_hashes
        )
    return open_sources(
        data.resolved_sources,
        tokenizer,
        data.cache,
        split=split,
        skip_bad_lines=data.skip_bad_lines,
        check_hashes=data.check_hashes,
        progress=progress,
    )


def open_sources(
    sources: Iterable[Source],
    tokenizer: Tokenizer,
    cache: Path | str,
    *,
    split: str = "train",
    skip_bad_lines: bool = False,
    check_hashes: bool = True,
    progress: bool = True,
) -> list[TokenSource]:
    """The tokens of the sources' `train` or `validation` texts. Those that the cache folder lacks are tokenised first.

    With `split="validation"`, sources without validation texts are left out.
    """
    opened = []
    for source in sources:
        pattern = source.train if split == "train" else source.validation
        if pattern is None:
            continue
        folder = Path(cache) / hash_tokenizer(tokenizer)[:12] / source.name / split
        shards = build_cache(
            find_files(pattern),
            tokenizer,
            folder,
            name=source.name,
            skip_bad_lines=skip_bad_lines,
            check_hashes=check_hashes,
            progress=progress,
        )
        opened.append(TokenSource(source.name, source.share_of(sum(len(shard.tokens) for shard in shards)), shards))
    return opened


def build_cache(
    files: Sequence[Path],
    tokenizer: Tokenizer,
    folder: Path | str,
    *,
    name: str = "text",
    skip_bad_lines: bool = False,
    check_hashes: bool = True,
    progress: bool = True,
) -> list[Shard]:
    """Tokenises `files` into a folder of shards (`gmask.corpus.shards`), once, and opens it.

    It is written whole or not at all. It is used again as long as the tokenizer and the files (name, size, time of
    change) are the same, else written anew. Special tokens spelt out in a text are text here.

    Raises:
        GmaskError: a bad line (with file and number; `skip_bad_lines` counts and skips those), no text, a damaged
            cache, a full disk.
    """
    folder = Path(folder)
    made_from = {
        "files": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files],
        "skip_bad_lines": skip_bad_lines,
    }
    expected = made_from | {"version": SHARDS_VERSION, "tokenizer": hash_tokenizer(tokenizer)}
    if folder.exists():
        # A cache of version 1 has no manifest, and is written anew.
        is_old = not (folder / MANIFEST_FILE).exists() and (folder / "meta.json").exists()
        manifest = {} if is_old else read_shards_manifest(folder, CACHE_REMEDY)
        if {key: manifest.get(key) for key in expected} == expected:
            return open_shards(folder, manifest, remedy=CACHE_REMEDY, check_hashes=check_hashes)
        logger.warning("%s: the tokenizer or the texts have changed; tokenising them again", folder)
    with written_folder(folder) as draft:
        bad_lines: list[GmaskError] = []
        encoder = make_encoder(tokenizer)
        documents = read_texts(files, on_bad_line=bad_lines.append if skip_bad_lines else None)
        with writing_shard(draft, "00000", encoder) as shard:
            for text in tqdm(documents, desc=name, unit=" docs", disable=not progress):
                shard.add(text)
        if bad_lines:
            logger.warning("%s: %d bad lines skipped, the first: %s", name, len(bad_lines), bad_lines[0])
        if not shard.entry["tokens"]:
            raise GmaskError(f"no text in {', '.join(map(str, files))}")
        manifest = write_shards_manifest(draft, encoder, [shard.entry], made_from | {"bad_lines": len(bad_lines)})
    return open_shards(folder, manifest, remedy=CACHE_REMEDY, check_hashes=False)  # just written


OPEN_DOCUMENTS = 8
"""The number of documents of a source that are read in turn, so that the rows of a batch differ."""

MIN_PIECE = 16
"""The fewest tokens of a piece at the end of a row, and of what is left of a document."""


class _SourceReader:
    """Reads the documents of one source piece by piece, epoch after epoch; keeps the position of the stream in it.

    An epoch takes each document once, in an order drawn from (seed, source name, epoch). Several documents are open at
    a time and give their pieces in turn. The next epoch begins when the last of them is used up. Of several parts of a
    source, part i takes the documents i, i + parts, ... of that order.
    """

    def __init__(self, source: TokenSource, *, seed: int, part: int = 0, parts: int = 1) -> None:
        if len(source) < parts:
            raise GmaskError(
                f"data.streams is {parts}, and the source {source.name} has {len(source)} documents: give fewer streams"
            )
        self.source = source
        self.part, self.parts = part, parts
        self.key = [seed, 2, zlib.crc32(source.name.encode())]  # 2: distinct from the seeds of rows in `RowStream`
        self.taken = 0  # tokens, over all epochs
        self.epoch = 0
        self.begun = 0  # documents of this epoch
        self.open = deque[tuple[int, int]]()  # document, tokens of it used
        self._shuffle()

    def _shuffle(self) -> None:
        order = np.random.default_rng([*self.key, self.epoch]).permutation(len(self.source))
        self.order = order[self.part :: self.parts]

    def front(self) -> TokenArray:
        """The unused tokens [L] of the document whose turn it is."""
        if not self.open and self.begun == len(self.order):
            self.epoch, self.begun = self.epoch + 1, 0
            self._shuffle()
        while len(self.open) < OPEN_DOCUMENTS and self.begun < len(self.order):
            self.open.append((int(self.order[self.begun]), 0))
            self.begun += 1
        document, used = self.open[0]
        return self.source.document(document)[used:]

    def advance(self, count: int) -> None:
        """Uses up `count` tokens of the front document, and gives the turn to the next."""
        left = len(self.front()) - count
        document, used = self.open.popleft()
        if left:
            self.open.append((document, used + count))
        self.taken += count

    def state(self) -> dict[str, Any]:
        return {
            "tokens": self.source.n_tokens,
            "taken": self.taken,
            "epoch": self.epoch,
            "begun": self.begun,
            "open": [list(entry) for entry in self.open],
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.taken, self.epoch, self.begun = state["taken"], state["epoch"], state["begun"]
        self.open = deque((document, used) for document, used in state["open"])
        self._shuffle()


class RowStream:
    """An endless, exactly resumable stream of packed rows.

    Each row is a list of `InfillingExample`s that together hold at most `row_length` tokens; `collate` makes the batch.
    The mixture makes an example of one piece: `[CLS]`, tokens of one document and, at its end, the end-of-text token. A
    piece is as long as the row has room, but at most `max_piece`: no position in the layout exceeds that.

    The next piece comes from the source that is furthest behind its weight, so that the shares of the tokens follow the
    weights closely at every moment. Row k draws from `default_rng([seed, 1, k])` only: the rows depend on nothing but
    the arguments and the state. If the drawn objective finds nothing to hide, the document objective is used instead.

    Of several parts of a stream, each has documents of its own, and part i has the rows i, i + parts, ...: so a process
    need not draw the rows of the others.

    objective: for all examples, instead of the mixture's shares.
    """

    def __init__(
        self,
        sources: Sequence[TokenSource],
        mixture: Mixture,
        *,
        row_length: int,
        seed: int,
        max_piece: int | None = None,
        objective: Objective | None = None,
        part: int = 0,
        parts: int = 1,
    ) -> None:
        if row_length < 2 * MIN_PIECE:
            raise GmaskError(f"row_length must be at least {2 * MIN_PIECE}, not {row_length}")
        if max_piece is not None and max_piece < MIN_PIECE:
            raise GmaskError(
                f"a context has at most {max_piece} tokens (data.max_piece, or the model's positions): give at least "
                f"{MIN_PIECE}"
            )
        if len({source.name for source in sources}) < max(len(sources), 1):
            raise GmaskError("give one source or more, each with its own name")
        self.mixture = mixture
        self.row_length = row_length
        self.seed = seed
        self.max_piece = max_piece or row_length
        self.objective = objective
        self.row, self.parts = part, parts
        self.readers = [_SourceReader(source, seed=seed, part=part, parts=parts) for source in sources]

    def __iter__(self) -> Iterator[list[InfillingExample]]:
        while True:
            yield self.next_row()

    def next_row(self) -> list[InfillingExample]:
        """The next row; moves the stream on."""
        rng = np.random.default_rng([self.seed, 1, self.row])
        self.row += self.parts
        examples: list[InfillingExample] = []
        room = self.row_length
        while room >= MIN_PIECE + 2:
            reader = min(self.readers, key=lambda reader: reader.taken / reader.source.weight)
            examples.append(self._next_example(reader, room, rng))
            room -= len(examples[-1].input_ids)
        return examples

    def _next_example(self, reader: _SourceReader, room: int, rng: np.random.Generator) -> InfillingExample:
        """An example of at most `room` tokens from the next piece of a source."""
        left = reader.front()
        objective = self.objective
        limit = min(room - 2, self.max_piece)  # no objective adds fewer than 1 or 2 tokens
        while True:
            count = _cut(len(left), limit)
            piece = _add_control_tokens(left[:count], ends=count == len(left), special=self.mixture.special)
            example = self.mixture.sample(piece, rng, objective)
            if example is None:
                example = self.mixture.sample(piece, rng, "document")
            assert example is not None, f"nothing to hide in {piece}"
            length = len(example.input_ids)
            if length <= room:
                reader.advance(count)
                return example
            # Try a shorter piece, with the same objective: else the objectives that add most tokens would become rare.
            # It fits unless it adds two standard deviations (each about sqrt(added / 2)) more than this one.
            objective = example.objective  # type: ignore[assignment]  # a plain str there
            added = length - len(piece)
            limit = min(int(len(piece) * room / length - math.sqrt(2 * added)), len(piece) - 1)

    def epochs(self) -> dict[str, float]:
        """The number of times that each source has been read so far."""
        return {reader.source.name: reader.taken * self.parts / reader.source.n_tokens for reader in self.readers}

    def state_dict(self) -> dict[str, Any]:
        """All that the next rows depend on, ready for JSON."""
        return {
            "seed": self.seed,
            "row_length": self.row_length,
            "max_piece": self.max_piece,
            "row": self.row,
            "sources": {reader.source.name: reader.state() for reader in self.readers},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken. Raises `GmaskError` if the sources or settings are others."""
        for name in ("seed", "row_length", "max_piece"):  # of the rows so far; they may change afterwards
            if state[name] != getattr(self, name):
                raise GmaskError(f"cannot resume: {name} was {state[name]} and is now {getattr(self, name)}")
        before = {name: saved["tokens"] for name, saved in state["sources"].items()}
        now = {reader.source.name: reader.source.n_tokens for reader in self.readers}
        if before != now:
            changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
            raise GmaskError(f"cannot resume: the training texts have changed ({', '.join(changed)})")
        self.row = state["row"]
        for reader in self.readers:
            reader.restore(state["sources"][reader.source.name])


def validation_rows(
    source: TokenSource,
    mixture: Mixture,
    objective: Objective,
    *,
    row_length: int,
    max_rows: int,
    max_piece: int | None = None,
    seed: int = 0,
) -> list[list[InfillingExample]]:
    """The same rows of one source and one objective at every call: at most `max_rows`, at most one epoch.

    A source too small for one row fills it by starting again.
    """
    stream = RowStream([source], mixture, row_length=row_length, seed=seed, max_piece=max_piece, objective=objective)
    rows: list[list[InfillingExample]] = []
    while len(rows) < max_rows:
        row = stream.next_row()
        if rows and stream.readers[0].taken > source.n_tokens:
            break
        rows.append(row)
    return rows


def _cut(left: int, limit: int) -> int:
    """The number of a document's `left` tokens that go into a piece of at most `limit` tokens."""
    if left + 2 <= limit:  # `[CLS]` and end-of-text
        return left
    return min(limit - 1, left - min(MIN_PIECE, left // 2))


def _add_control_tokens(ids: TokenArray, *, ends: bool, special: BlankTokens) -> IntArray:
    """The ids with `[CLS]` before them and, at the end of a document, the end-of-text token behind them."""
    piece = np.empty(1 + len(ids) + ends, np.int64)
    piece[0] = special.cls
    piece[1 : len(ids) + 1] = ids
    if ends:
        piece[-1] = special.eos
    return piece
