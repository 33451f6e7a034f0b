"""How is text tokenised once and kept in a memory-mapped file?"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
import zlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from tqdm import tqdm

from gmask.errors import GmaskError
from gmask.tasks.corpus import Source, find_files, read_texts

logger = logging.getLogger(__name__)

CACHE_VERSION = 1
DOCUMENTS_PER_BATCH = 512

IntArray = npt.NDArray[np.int64]
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
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=".tokenising-", dir=folder.parent))
        draft.chmod(0o755)
    except OSError as error:
        raise GmaskError(f"{folder}: cannot be written ({error.strerror})") from error
    try:
        counts = _tokenise(files, tokenizer, draft, name=name, skip_bad_lines=skip_bad_lines, progress=progress)
        meta = made_from | counts
        (draft / "meta.json").write_text(json.dumps(meta, indent=2), encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        draft.rename(folder)
    except OSError as error:  # a full disk above all
        raise GmaskError(f"{folder}: cannot be written ({error.strerror}); free some space") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
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
