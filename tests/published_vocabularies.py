"""Where do tests find the published vocabulary files, which are too large to be copied here?"""

import gzip
from pathlib import Path

import pytest

SHARED = Path(__file__).parents[2] / "shared" / "golden"
FILES = {
    "chinese": {"cog-pretrain.model": "hf-glm-tiny-fullvocab/model/cog-pretrain.model"},
    "gpt2": {"vocab.json": "tokenizers/vocab/gpt2-vocab.json.gz", "merges.txt": "tokenizers/vocab/gpt2-merges.txt.gz"},
    "bert": {"vocab.txt": "tokenizers/vocab/bert-large-uncased-vocab.txt.gz"},
    "roberta": {
        "vocab.json": "tokenizers/vocab/roberta-vocab.json.gz",
        "merges.txt": "tokenizers/vocab/gpt2-merges.txt.gz",
    },
}
"""By kind of vocabulary: published names, and where they lie."""

needs_vocabularies = pytest.mark.skipif(
    not (SHARED / "tokenizers").is_dir(), reason="the published vocabulary files are not beside this checkout"
)


def copy_vocabulary(kind: str, folder: Path) -> Path:
    """Unpacks the files of a kind of vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, source in FILES[kind].items():
        content = (SHARED / source).read_bytes()
        (folder / name).write_bytes(gzip.decompress(content) if source.endswith(".gz") else content)
    return folder
