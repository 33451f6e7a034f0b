"""Pretraining texts, tokenised once into a memory-mapped file and seen in rows that can be resumed."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import zlib
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from tqdm import tqdm

from gmask.errors import GmaskError
from gmask.files import write_json, written_folder
from gmask.infilling.blanks import BlankTokens, InfillingExample, IntArray
from gmask.infilling.objectives import Mixture, Objective
from gmask.tasks.records import Source, find_files, read_texts

logger = logging.getLogger(__name__)
CACHE_VERSION = 1
DOCUMENTS_PER_BATCH = 512
TokenArray = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class TokenSource:
    """The documents of one source as token ids, memory-mapped, without `[CLS]` and end-of-text."""

    name: str
    weight: float  # share of the tokens, relative to the other sources
    tokens: TokenArray  # [N]
    offsets: IntArray  # [D + 1]: document i is tokens[offsets[i] : offsets[i + 1]]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def n_tokens(self) -> int:
        return len(self.tokens)

    def document(self, index: int) -> TokenArray:
        """The ids [L] of one document, a view of the file."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


def open_sources(
    sources: Iterable[Source],
    tokenizer: Tokenizer,
    cache: Path | str,
    *,
    split: str = "train",
    skip_bad_lines: bool = False,
    progress: bool = True,
) -> list[TokenSource]:
    """The sources' `train` or `validation` texts as tokens; what the cache folder lacks is tokenised first.

    Sources without validation texts are left out of `split="validation"`.
    """
    opened = []
    for source in sources:
        pattern = source.train if split == "train" else source.validation
        if pattern is None:
            continue
        folder = Path(cache) / fingerprint(tokenizer)[:12] / source.name / split
        tokens, offsets = build_cache(
            find_files(pattern),
            tokenizer,
            folder,
            name=source.name,
            skip_bad_lines=skip_bad_lines,
            progress=progress,
        )
        opened.append(TokenSource(source.name, source.share_of(len(tokens)), tokens, offsets))
    return opened


def build_cache(
    files: Sequence[Path],
    tokenizer: Tokenizer,
    folder: Path | str,
    *,
    name: str = "text",
    skip_bad_lines: bool = False,
    progress: bool = True,
) -> tuple[TokenArray, IntArray]:
    """Tokenise `files` into `folder`, once; return the tokens [N] and the document offsets [D + 1].

    The folder holds tokens.bin (uint16, or uint32 for a vocabulary above 65536), offsets.npy and meta.json.
    It appears whole or not at all. It is used again as long as the tokenizer and the files (name, size, time
    of change) are the same, else made anew. Special tokens spelt out in a text are text here.

    Raises `GmaskError`: a bad line (file and line number; counted and skipped with `skip_bad_lines`), no
    text, a damaged cache, a full disk.
    """
    folder = Path(folder)
    made_from = {
        "version": CACHE_VERSION,
        "tokenizer": fingerprint(tokenizer),
        "files": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files],
        "skip_bad_lines": skip_bad_lines,
    }
    if folder.exists():
        meta = _read_meta(folder)
        if {key: meta.get(key) for key in made_from} == made_from:
            return _open_cache(folder, meta)
        logger.warning("%s: the tokenizer or the texts have changed; tokenising them again", folder)
    with written_folder(folder) as draft:
        counts = _tokenise(files, tokenizer, draft, name=name, skip_bad_lines=skip_bad_lines, progress=progress)
        meta = made_from | counts
        write_json(draft / "meta.json", meta, indent=2)
    return _open_cache(folder, meta)


def fingerprint(tokenizer: Tokenizer) -> str:
    """A hash of all that decides how text is cut into ids (not of padding, truncation or the template)."""
    settings = json.loads(tokenizer.to_str())
    decisive = [settings[key] for key in ("normalizer", "pre_tokenizer", "added_tokens", "model")]
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def _tokenise(
    files: Sequence[Path],
    tokenizer: Tokenizer,
    folder: Path,
    *,
    name: str,
    skip_bad_lines: bool,
    progress: bool,
) -> dict[str, Any]:
    """Write tokens.bin and offsets.npy; return what meta.json says about them."""
    encoder = Tokenizer.from_str(tokenizer.to_str())
    encoder.no_padding()
    encoder.no_truncation()
    encoder.encode_special_tokens = True  # a literal "[MASK]" in a text is no blank
    dtype = np.uint16 if encoder.get_vocab_size() <= 1 << 16 else np.uint32
    bad_lines: list[GmaskError] = []
    documents = read_texts(files, on_bad_line=bad_lines.append if skip_bad_lines else None)
    ends = array("q", [0])
    checksum = 0
    with (
        (folder / "tokens.bin").open("wb") as file,
        tqdm(desc=name, unit=" docs", disable=not progress) as bar,
    ):
        while texts := list(islice(documents, DOCUMENTS_PER_BATCH)):
            encodings = encoder.encode_batch_fast(texts, add_special_tokens=False)
            encoded = [encoding.ids for encoding in encodings]
            for ids in encoded:
                ends.append(ends[-1] + len(ids))
            data = np.concatenate([np.array(ids, dtype) for ids in encoded]).tobytes()
            checksum = zlib.crc32(data, checksum)
            file.write(data)
            bar.update(len(texts))
            bar.set_postfix(tokens=f"{ends[-1]:,}", refresh=False)
    if bad_lines:
        logger.warning("%s: %d bad lines skipped, the first: %s", name, len(bad_lines), bad_lines[0])
    if len(ends) == 1:
        raise GmaskError(f"no text in {', '.join(map(str, files))}")
    np.save(folder / "offsets.npy", np.array(ends, np.int64))
    return {
        "dtype": np.dtype(dtype).name,
        "documents": len(ends) - 1,
        "tokens": ends[-1],
        "crc32": checksum,
        "bad_lines": len(bad_lines),
    }


def _read_meta(folder: Path) -> dict[str, Any]:
    try:
        meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(folder, "meta.json cannot be read") from error
    return meta


def _open_cache(folder: Path, meta: dict[str, Any]) -> tuple[TokenArray, IntArray]:
    try:
        tokens = np.memmap(folder / "tokens.bin", np.dtype(meta["dtype"]), "r")
        offsets: IntArray = np.load(folder / "offsets.npy")
    except (OSError, ValueError) as error:
        raise _damaged(folder, str(error)) from error
    if len(tokens) != meta["tokens"]:
        raise _damaged(folder, f"tokens.bin holds {len(tokens)} tokens, not {meta['tokens']}")
    if len(offsets) != meta["documents"] + 1 or offsets[-1] != len(tokens):
        raise _damaged(folder, "offsets.npy does not fit tokens.bin")
    if zlib.crc32(tokens.data) != meta["crc32"]:
        raise _damaged(folder, "the checksum of tokens.bin is wrong")
    return tokens, offsets


def _damaged(folder: Path, what: str) -> GmaskError:
    return GmaskError(f"the token cache {folder} is damaged ({what}): delete that folder and run again")


OPEN_DOCUMENTS = 8
"""So many documents of a source are read in turn, so that the rows of a batch differ."""

MIN_PIECE = 16
"""No piece shorter than this many tokens is begun at the end of a row, nor left of a document."""


class _Walk:
    """Where the stream stands in one source.

    An epoch takes each document once, in an order drawn from (seed, source name, epoch). Several documents
    are open at a time and give their pieces in turn. The next epoch begins when the last of them is used up.
    """

    def __init__(self, source: TokenSource, *, seed: int) -> None:
        self.source = source
        self.key = [seed, 2, zlib.crc32(source.name.encode())]  # 2: no row of `RowStream` draws from this
        self.taken = 0  # tokens, over all epochs
        self.epoch = 0
        self.begun = 0  # documents of this epoch
        self.open = deque[tuple[int, int]]()  # document, tokens of it used
        self._shuffle()

    def _shuffle(self) -> None:
        self.order = np.random.default_rng([*self.key, self.epoch]).permutation(len(self.source))

    def front(self) -> TokenArray:
        """What is left [L] of the document whose turn it is."""
        if not self.open and self.begun == len(self.order):
            self.epoch, self.begun = self.epoch + 1, 0
            self._shuffle()
        while len(self.open) < OPEN_DOCUMENTS and self.begun < len(self.order):
            self.open.append((int(self.order[self.begun]), 0))
            self.begun += 1
        document, used = self.open[0]
        return self.source.document(document)[used:]

    def advance(self, count: int) -> None:
        """Use up `count` tokens of the front document and give the turn to the next."""
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

    Each row is a list of `InfillingExample`s that together hold at most `row_length` tokens; `collate` makes
    the batch. Each example is the mixture's work on one piece: `[CLS]`, tokens of one document and, at its
    end, the end-of-text token. Pieces are as long as the row has room, and at most `max_piece`, so no
    position in the layout exceeds `max_piece`.

    The next piece comes from the source that is furthest behind its weight, so the shares of the tokens
    follow the weights closely at every moment. Row k draws from `default_rng([seed, 1, k])` only: the rows
    depend on nothing but the arguments and the state. Where the drawn objective finds nothing to hide, the
    document objective takes its place.

    objective: one for all examples instead of the mixture's shares.
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
    ) -> None:
        if row_length < 2 * MIN_PIECE:
            raise GmaskError(f"row_length must be at least {2 * MIN_PIECE}, not {row_length}")
        if len({source.name for source in sources}) < max(len(sources), 1):
            raise GmaskError("give one source or more, each with its own name")
        self.mixture = mixture
        self.row_length = row_length
        self.seed = seed
        self.max_piece = max_piece or row_length
        self.objective = objective
        self.row = 0
        self.walks = [_Walk(source, seed=seed) for source in sources]

    def __iter__(self) -> Iterator[list[InfillingExample]]:
        while True:
            yield self.next_row()

    def next_row(self) -> list[InfillingExample]:
        """The next row and a step forward."""
        rng = np.random.default_rng([self.seed, 1, self.row])
        self.row += 1
        examples: list[InfillingExample] = []
        room = self.row_length
        while room >= MIN_PIECE + 2:
            walk = min(self.walks, key=lambda walk: walk.taken / walk.source.weight)
            examples.append(self._next_example(walk, room, rng))
            room -= len(examples[-1].input_ids)
        return examples

    def _next_example(self, walk: _Walk, room: int, rng: np.random.Generator) -> InfillingExample:
        """An example of at most `room` tokens from the next piece of the walk."""
        left = walk.front()
        objective = self.objective
        limit = min(room - 2, self.max_piece)  # no objective adds fewer than 1 or 2 tokens
        while True:
            count = _cut(len(left), limit)
            piece = _dress(left[:count], ends=count == len(left), special=self.mixture.special)
            example = self.mixture.sample(piece, rng, objective)
            if example is None:
                example = self.mixture.sample(piece, rng, "document")
            assert example is not None, f"nothing to hide in {piece}"
            length = len(example.input_ids)
            if length <= room:
                walk.advance(count)
                return example
            # Try a shorter piece, with the same objective lest the objectives that add most become rare. It
            # fits unless it adds two standard deviations (each about sqrt(added / 2)) more than this one.
            objective = example.objective  # type: ignore[assignment]  # a plain str there
            added = length - len(piece)
            limit = min(int(len(piece) * room / length - math.sqrt(2 * added)), len(piece) - 1)

    def epochs(self) -> dict[str, float]:
        """How often each source has been seen so far."""
        return {walk.source.name: walk.taken / walk.source.n_tokens for walk in self.walks}

    def state_dict(self) -> dict[str, Any]:
        """All that the next rows depend on, ready for JSON."""
        return {
            "seed": self.seed,
            "row_length": self.row_length,
            "max_piece": self.max_piece,
            "row": self.row,
            "sources": {walk.source.name: walk.state() for walk in self.walks},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken. Raises `GmaskError` if the sources or settings are others."""
        for name in (
            "seed",
            "row_length",
            "max_piece",
        ):  # of the rows so far; they may change afterwards
            if state[name] != getattr(self, name):
                raise GmaskError(f"cannot resume: {name} was {state[name]} and is now {getattr(self, name)}")
        before = {name: saved["tokens"] for name, saved in state["sources"].items()}
        now = {walk.source.name: walk.source.n_tokens for walk in self.walks}
        if before != now:
            changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
            raise GmaskError(f"cannot resume: the training texts have changed ({', '.join(changed)})")
        self.row = state["row"]
        for walk in self.walks:
            walk.restore(state["sources"][walk.source.name])


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

    A source too small for one row fills it by going round.
    """
    stream = RowStream([source], mixture, row_length=row_length, seed=seed, max_piece=max_piece, objective=objective)
    rows: list[list[InfillingExample]] = []
    while len(rows) < max_rows:
        row = stream.next_row()
        if rows and stream.walks[0].taken > source.n_tokens:
            break
        rows.append(row)
    return rows


def _cut(left: int, limit: int) -> int:
    """How many of a document's `left` tokens go into a piece of at most `limit` tokens."""
    if left + 2 <= limit:  # `[CLS]` and end-of-text
        return left
    return min(limit - 1, left - min(MIN_PIECE, left // 2))


def _dress(ids: TokenArray, *, ends: bool, special: BlankTokens) -> IntArray:
    piece = np.empty(1 + len(ids) + ends, np.int64)
    piece[0] = special.cls
    piece[1 : len(ids) + 1] = ids
    if ends:
        piece[-1] = special.eos
    return piece
