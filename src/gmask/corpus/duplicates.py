"""Duplicates among any number of documents, exact and near, by sorted hashes on the disk.

`SignatureWriter` keeps of each document the hash of its text, its MinHash signature (datasketch) and the hashes of the
signature's bands. `match_documents` takes one column of hashes, exact or of one band, and of that one part of all
possible values: it sorts them, and finds the documents that agree with an earlier one. So memory is bounded by the
part, not by the corpus; the parts are independent of each other, and the result depends on none but the documents.
Source: Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", chapter 3.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from gmask.corpus.documents import block_name
from gmask.corpus.filters import HashArray, hash_ngrams, mix_bits
from gmask.files import written
from gmask.infilling.blanks import IntArray
from gmask.infilling.spans import BoolArray
from gmask.recipes.preparation import DuplicateSettings

CHUNK_DOCUMENTS = 8192
"""Documents whose hashes are written together, column by column."""

PART_DOCUMENTS = 1 << 23
"""Documents of a part, about: 24 bytes of memory each."""

PAIRS_AT_ONCE = 1 << 14
"""Pairs whose signatures are compared together."""

EXACT = 0
"""The column of the exact hash; 1 has the rest of it, the bands follow."""

FIRST_BAND = 2
WHITE_SPACE = re.compile(r"\s+")
SEED = 1  # of the permutations


def hash_text(text: str) -> bytes:
    """16 bytes of BLAKE2 of a text in folded case, with white space made one."""
    return hashlib.blake2b(WHITE_SPACE.sub(" ", text.casefold()).strip().encode(), digest_size=16).digest()


@dataclass(frozen=True, slots=True)
class Signatures:
    """The hashes of a block's documents, on the disk."""

    hashes: npt.NDArray[np.uint64]  # [D * columns], in chunks of `CHUNK_DOCUMENTS` documents, each column by column
    signatures: npt.NDArray[np.uint32]  # [D, bands * rows]
    columns: int

    def __len__(self) -> int:
        return len(self.hashes) // self.columns

    def column(self, column: int) -> Iterator[tuple[int, HashArray]]:
        """The hashes of a column, chunk by chunk, each with the number of its first document."""
        for start in range(0, len(self), CHUNK_DOCUMENTS):
            size = min(CHUNK_DOCUMENTS, len(self) - start)
            first = start * self.columns + column * size
            yield start, self.hashes[first : first + size]


class BlockSignatures:
    """The hashes of all blocks, which are opened when they are read; documents are numbered through the blocks."""

    def __init__(self, folder: Path, count: int, settings: DuplicateSettings) -> None:
        self.folder, self.settings = folder, settings
        names = [block_name(number) for number in range(count)]
        self.columns = FIRST_BAND + settings.bands
        sizes = [(folder / f"{name}.hashes").stat().st_size // (8 * self.columns) for name in names]
        self.first = np.cumsum([0, *sizes])  # the number of each block's first document, and of all documents

    def __len__(self) -> int:
        """The number of documents."""
        return int(self.first[-1])

    def open(self, block: int) -> Signatures:
        name = block_name(block)
        hashes = map_file(self.folder / f"{name}.hashes", np.uint64)
        signatures = map_file(self.folder / f"{name}.signatures", np.uint32)
        return Signatures(hashes, signatures.reshape(-1, self.settings.bands * self.settings.rows), self.columns)

    def gather(self, documents: IntArray) -> npt.NDArray[np.uint32]:
        """The signatures [M, bands * rows] of documents, by their numbers."""
        found = np.empty((len(documents), self.settings.bands * self.settings.rows), np.uint32)
        owners = self.first.searchsorted(documents, side="right") - 1
        for owner in np.unique(owners):
            chosen = np.flatnonzero(owners == owner)
            found[chosen] = self.open(owner).signatures[documents[chosen] - self.first[owner]]
        return found

    def are_similar(self, left: IntArray, right: IntArray) -> BoolArray:
        """Whether the signatures of each pair of documents agree in the share of their hashes that is asked for."""
        found = np.zeros(len(left), np.bool_)
        for start in range(0, len(left), PAIRS_AT_ONCE):
            part = slice(start, start + PAIRS_AT_ONCE)
            equal = self.gather(left[part]) == self.gather(right[part])
            found[part] = equal.mean(axis=1) >= self.settings.similarity
        return found


def map_file(path: Path, kind: type[np.generic]) -> npt.NDArray[Any]:
    """The numbers of a file, which may be empty."""
    return np.memmap(path, kind, "r") if path.stat().st_size else np.empty(0, kind)


class SignatureWriter:
    """Writes the hashes of a block's documents; made by `writing_signatures`."""

    def __init__(self, settings: DuplicateSettings, hashes: BinaryIO, signatures: BinaryIO) -> None:
        from datasketch import MinHash

        self.settings = settings
        self.hashes, self.signatures = hashes, signatures
        self.minhash = MinHash(settings.bands * settings.rows, seed=SEED, hashfunc=int, scheme="affine32")
        self._texts = list[bytes]()
        self._rows = list[npt.NDArray[np.uint32]]()

    def add(self, text: str, units: Sequence[str]) -> None:
        self._texts.append(hash_text(text))
        self.minhash.clear()
        if self.settings.near:
            ngrams = np.unique(hash_ngrams(units, self.settings.ngram) >> np.uint64(32))
            # A text without a word or character, of signs alone, is like itself only.
            self.minhash.update_batch(ngrams.tolist() or [int.from_bytes(self._texts[-1][:4], "little")])
        self._rows.append(self.minhash.digest().astype(np.uint32))
        if len(self._texts) == CHUNK_DOCUMENTS:
            self.flush()

    def flush(self) -> None:
        """Writes the documents that wait."""
        if not self._texts:
            return
        exact = np.frombuffer(b"".join(self._texts), np.uint64).reshape(-1, 2)
        rows = np.stack(self._rows)
        columns = np.concatenate((exact, hash_bands(rows, self.settings.bands)), axis=1)
        self.hashes.write(columns.T.tobytes())
        self.signatures.write(rows.tobytes())
        self._texts, self._rows = [], []


@contextmanager
def writing_signatures(folder: Path, name: str, settings: DuplicateSettings) -> Iterator[SignatureWriter]:
    """A writer of NAME.hashes and NAME.signatures, which take their places when the block ends without an error."""
    with ExitStack() as stack:
        drafts = [stack.enter_context(written(folder / f"{name}.{kind}")) for kind in ("hashes", "signatures")]
        files = [stack.enter_context(draft.open("wb")) for draft in drafts]
        writer = SignatureWriter(settings, *files)
        yield writer
        writer.flush()


def hash_bands(signatures: npt.NDArray[np.uint32], bands: int) -> HashArray:
    """A hash [D, bands] of each band of signatures [D, bands * rows]."""
    parts = signatures.reshape(len(signatures), bands, -1).astype(np.uint64)
    hashes = np.broadcast_to(np.arange(1, bands + 1, dtype=np.uint64), parts.shape[:2]).copy()
    for row in range(parts.shape[2]):
        hashes = mix_bits(hashes + parts[:, :, row])
    return hashes


def count_parts(documents: int) -> int:
    """The number of parts that the values of each column are divided into."""
    return -(-documents // PART_DOCUMENTS) or 1


def match_documents(blocks: BlockSignatures, column: int, part: int, parts: int) -> IntArray:
    """The documents that are duplicates of an earlier one by one part of one column.

    Two that agree in a band are compared by their whole signatures: each with the first that has its hash, and with the
    one before it.

    Returns:
        [2, M]: the duplicates, ascending, and of each an earlier document that it is like.
    """
    kept, rest, numbers = [np.empty(0, np.uint64)], [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    for block, first in enumerate(blocks.first[:-1]):
        signatures = blocks.open(block)
        pairs = zip(signatures.column(column), signatures.column(EXACT + 1), strict=True)
        for (start, hashes), (_, others) in pairs:
            chosen = np.flatnonzero((hashes >> np.uint64(32)) * np.uint64(parts) >> np.uint64(32) == part)
            kept.append(hashes[chosen])
            numbers.append(chosen + (start + first))
            if column == EXACT:
                rest.append(others[chosen])
    hashes, documents = np.concatenate(kept), np.concatenate(numbers)
    if len(hashes) < 2:
        return np.empty((2, 0), np.int64)
    keys = (hashes,) if column != EXACT else (np.concatenate(rest), hashes)
    order = np.lexsort(keys)  # stable, so documents of one hash stay in their order
    documents = documents[order]
    is_first = np.concatenate(([True], np.logical_or.reduce([key[order][1:] != key[order][:-1] for key in keys])))
    later = np.flatnonzero(~is_first)
    leaders = np.maximum.accumulate(np.where(is_first, np.arange(len(documents)), 0))
    duplicates, originals = documents[later], documents[leaders[later]]
    if column != EXACT:
        before = documents[later - 1]
        is_like = blocks.are_similar(duplicates, originals)
        left = np.flatnonzero(~is_like & (before != originals))
        again = left[blocks.are_similar(duplicates[left], before[left])]
        originals[again], is_like[again] = before[again], True
        duplicates, originals = duplicates[is_like], originals[is_like]
    ascending = np.argsort(duplicates, kind="stable")
    return np.stack((duplicates[ascending], originals[ascending]))
