"""Tokenized texts on the disk: shards of ids that are mapped into memory, their index, and a manifest with hashes.

A folder has the documents of one source and split, in order:

- NAME.bin: the ids of a shard's documents one after the other, without `[CLS]` and end-of-text: uint16, or uint32 for a
  vocabulary above 65536;
- NAME.npy: int64 [D + 1], document i is ids[offsets[i] : offsets[i + 1]];
- manifest.json: the tokenizer's hash, the type of the ids, and the shards with documents, tokens and SHA-256.

`gmask pretrain` writes such a folder for each of its sources, `gmask prepare` writes many; both are read here.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from gmask.errors import GmaskError
from gmask.files import read_object, write_json, written
from gmask.infilling.blanks import IntArray
from gmask.tasks.records import hash_file

MANIFEST_FILE = "manifest.json"
SHARDS_VERSION = 2  # 1: one file of ids with a checksum of its own
DOCUMENTS_PER_BATCH = 512
CHARS_PER_BATCH = 1 << 20
"""The tokenizer gets so many documents and characters at once, whatever a document's length."""

TokenArray = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class Shard:
    """The ids of some documents."""

    tokens: TokenArray  # [N]
    offsets: IntArray  # [D + 1]: document i is tokens[offsets[i] : offsets[i + 1]]


@dataclass(frozen=True)
class TokenSource:
    """The documents of one source as token ids, without `[CLS]` and end-of-text. Any of them is read at once."""

    name: str
    weight: float  # share of the tokens, relative to the other sources
    shards: Sequence[Shard]

    @cached_property
    def _first(self) -> list[int]:
        """The number of the first document of each shard, and of all documents."""
        return [0, *accumulate(len(shard.offsets) - 1 for shard in self.shards)]

    def __len__(self) -> int:
        return self._first[-1]

    @cached_property
    def n_tokens(self) -> int:
        return sum(len(shard.tokens) for shard in self.shards)

    def document(self, index: int) -> TokenArray:
        """The ids [L] of one document: a view of the file."""
        number = bisect_right(self._first, index) - 1
        shard, inner = self.shards[number], index - self._first[number]
        return shard.tokens[shard.offsets[inner] : shard.offsets[inner + 1]]


def hash_tokenizer(tokenizer: Tokenizer) -> str:
    """SHA-256 of the settings by which a tokenizer maps text to ids (not of padding, truncation or the template)."""
    settings = json.loads(tokenizer.to_str())
    decisive = [settings[key] for key in ("normalizer", "pre_tokenizer", "added_tokens", "model")]
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def make_encoder(tokenizer: Tokenizer) -> Tokenizer:
    """A copy that neither pads nor cuts, and for which special tokens spelt out in a text are text."""
    encoder = Tokenizer.from_str(tokenizer.to_str())
    encoder.no_padding()
    encoder.no_truncation()
    encoder.encode_special_tokens = True  # a literal "[MASK]" in a text is no blank
    return encoder


def token_type(tokenizer: Tokenizer) -> type[np.uint16] | type[np.uint32]:
    """The type of the ids in a file."""
    return np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32


@dataclass
class ShardWriter:
    """Writes one shard, document by document; made by `writing_shard`."""

    name: str
    encoder: Tokenizer
    file: BinaryIO
    offsets: array[int] = field(default_factory=lambda: array("q", [0]))
    index_sha256: str = ""

    def __post_init__(self) -> None:
        self._digest = hashlib.sha256()
        self._type = token_type(self.encoder)
        self._batch = list[str]()
        self._chars = 0

    def add(self, text: str) -> None:
        self._batch.append(text)
        self._chars += len(text)
        if len(self._batch) == DOCUMENTS_PER_BATCH or self._chars >= CHARS_PER_BATCH:
            self.flush()

    def flush(self) -> None:
        """Tokenizes and writes the documents that wait."""
        if not self._batch:
            return
        encoded = [encoding.ids for encoding in self.encoder.encode_batch_fast(self._batch, add_special_tokens=False)]
        self._batch, self._chars = [], 0
        for ids in encoded:
            self.offsets.append(self.offsets[-1] + len(ids))
        data = np.concatenate([np.array(ids, self._type) for ids in encoded]).tobytes()
        self._digest.update(data)
        self.file.write(data)

    @property
    def entry(self) -> dict[str, Any]:
        """What the manifest says of the shard."""
        return {
            "name": self.name,
            "documents": len(self.offsets) - 1,
            "tokens": self.offsets[-1],
            "sha256": self._digest.hexdigest(),
            "index_sha256": self.index_sha256,
        }


@contextmanager
def writing_shard(folder: Path, name: str, encoder: Tokenizer) -> Iterator[ShardWriter]:
    """A writer of the shard ``name``; its files take their places when the block ends without an error.

    encoder: of `make_encoder`.

    Raises:
        GmaskError: a file cannot be written.
    """
    with ExitStack() as stack:
        index = stack.enter_context(written(folder / f"{name}.npy"))
        tokens = stack.enter_context(written(folder / f"{name}.bin"))
        with tokens.open("wb") as file:
            writer = ShardWriter(name, encoder, file)
            yield writer
            writer.flush()
        with index.open("wb") as file:
            np.save(file, np.array(writer.offsets, np.int64))
        writer.index_sha256 = hash_file(index)


def write_shards_manifest(
    folder: Path, encoder: Tokenizer, shards: Iterable[Mapping[str, Any]], more: Mapping[str, Any]
) -> dict[str, Any]:
    """Writes the manifest of a folder of shards; those without a token are left out.

    shards: `ShardWriter.entry` of each, in order; more: what else the manifest says.
    """
    entries = [dict(shard) for shard in shards if shard["tokens"]]
    manifest = {
        "version": SHARDS_VERSION,
        "tokenizer": hash_tokenizer(encoder),
        "dtype": np.dtype(token_type(encoder)).name,
        "documents": sum(entry["documents"] for entry in entries),
        "tokens": sum(entry["tokens"] for entry in entries),
        **more,
        "shards": entries,
    }
    write_json(folder / MANIFEST_FILE, manifest)
    return manifest


def read_shards_manifest(folder: Path, remedy: str) -> dict[str, Any]:
    """The manifest of a folder of shards. Raises `GmaskError`, with the remedy, if it is missing or damaged."""
    manifest = read_object(folder / MANIFEST_FILE, remedy=remedy)
    if not isinstance(manifest.get("shards"), list):
        raise _damaged(folder, f"{MANIFEST_FILE} lists no shards", remedy)
    return manifest


def open_shards(folder: Path, manifest: Mapping[str, Any], *, remedy: str, check_hashes: bool = True) -> list[Shard]:
    """Maps the shards of a folder into memory.

    Args:
        manifest: of `read_shards_manifest`.
        remedy: what to do about a shard that is damaged, for the error.
        check_hashes: read every shard once and compare its SHA-256. Without it, sizes are compared alone.

    Raises:
        GmaskError: a shard is missing or not as the manifest says.
    """
    return [_open_shard(folder, manifest["dtype"], entry, remedy, check_hashes) for entry in manifest["shards"]]


def _open_shard(folder: Path, dtype: str, entry: Mapping[str, Any], remedy: str, check_hashes: bool) -> Shard:
    name = entry["name"]
    try:
        tokens = np.memmap(folder / f"{name}.bin", np.dtype(dtype), "r")
        offsets: IntArray = np.load(folder / f"{name}.npy", mmap_mode="r")
    except (OSError, ValueError) as error:
        raise _damaged(folder, str(error), remedy) from error
    if len(tokens) != entry["tokens"]:
        raise _damaged(folder, f"{name}.bin holds {len(tokens)} tokens, not {entry['tokens']}", remedy)
    if len(offsets) != entry["documents"] + 1 or offsets[-1] != len(tokens):
        raise _damaged(folder, f"{name}.npy does not fit {name}.bin", remedy)
    for suffix, key in ((".bin", "sha256"), (".npy", "index_sha256")):
        if check_hashes and hash_file(folder / f"{name}{suffix}") != entry[key]:
            raise _damaged(folder, f"the hash of {name}{suffix} is wrong", remedy)
    return Shard(tokens, offsets)


def _damaged(folder: Path, fault: str, remedy: str) -> GmaskError:
    return GmaskError(f"the tokens in {folder} are damaged ({fault}): {remedy}")
