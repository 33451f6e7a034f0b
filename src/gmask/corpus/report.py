"""What a preparation dropped and why: counts, samples and plots, as JSON, Markdown and one HTML page."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gmask.errors import GmaskError
from gmask.files import write_json, write_text, written_folder
from gmask.tasks.metrics import Rows, as_cell

SAMPLES = 3
"""Dropped documents that are shown, of each source and reason: the first ones."""

SAMPLE_CHARS = 300
PLOTS = ("dropped.png", "lengths.png")


@dataclass
class Dropped:
    """What one reason dropped."""

    documents: int = 0
    bytes: int = 0  # of UTF-8
    samples: list[dict[str, str]] = field(default_factory=list)


@dataclass
class DocumentTally:
    """What became of the documents of a block, or of a source. Its values are ready for JSON."""

    documents: int = 0
    bytes: int = 0  # of UTF-8
    lengths: Counter[int] = field(default_factory=Counter)  # documents by the bits of their number of units
    dropped: dict[str, Dropped] = field(default_factory=dict)
    bad_lines: int = 0
    bad_files: int = 0
    errors: list[str] = field(default_factory=list)  # the first ones
    kept_documents: int = 0
    kept_bytes: int = 0

    def add(self, text: str, units: int) -> None:
        self.documents += 1
        self.bytes += len(text.encode())
        self.lengths[units.bit_length()] += 1

    def drop(self, reason: str, text: str, where: str, detail: str = "") -> None:
        found = self.dropped.setdefault(reason, Dropped())
        found.documents += 1
        found.bytes += len(text.encode())
        if len(found.samples) < SAMPLES:
            sample = {"where": where, "text": text[:SAMPLE_CHARS]}
            found.samples.append(sample | ({"shared": detail} if detail else {}))

    def add_bad_line(self, error: GmaskError) -> None:
        self.bad_lines += 1
        self._note(error)

    def add_bad_file(self, error: GmaskError) -> None:
        self.bad_files += 1
        self._note(error)

    def _note(self, error: GmaskError) -> None:
        if len(self.errors) < SAMPLES:
            self.errors.append(str(error))

    def to_dict(self) -> dict[str, Any]:
        return {
            "documents": self.documents,
            "bytes": self.bytes,
            "kept_documents": self.kept_documents,
            "kept_bytes": self.kept_bytes,
            "lengths": {str(bits): count for bits, count in sorted(self.lengths.items())},
            "dropped": {
                reason: {"documents": found.documents, "bytes": found.bytes, "samples": found.samples}
                for reason, found in sorted(self.dropped.items())
            },
            "bad_lines": self.bad_lines,
            "bad_files": self.bad_files,
            "errors": self.errors,
        }

    def merge(self, read: Mapping[str, Any], tokenized: Mapping[str, Any]) -> None:
        """Adds the tallies of a block: of the stage that read it, and of the one that tokenized what was left."""
        self.documents += read["documents"]
        self.bytes += read["bytes"]
        self.kept_documents += tokenized["documents"]
        self.kept_bytes += tokenized["bytes"]
        self.lengths.update({int(bits): count for bits, count in read["lengths"].items()})
        self.bad_lines += read["bad_lines"]
        self.bad_files += read["bad_files"]
        self.errors = [*self.errors, *read["errors"]][:SAMPLES]
        for stage in (read, tokenized):
            for reason, values in stage["dropped"].items():
                found = self.dropped.setdefault(reason, Dropped())
                found.documents += values["documents"]
                found.bytes += values["bytes"]
                found.samples = [*found.samples, *values["samples"]][:SAMPLES]

    def describe(self) -> str:
        """One line: how many documents there were, and what dropped them."""
        parts = [f"{found.documents:,} {reason}" for reason, found in sorted(self.dropped.items())]
        return f"of {self.documents:,}: {', '.join(parts) or 'none dropped'}"


def write_preparation_report(
    folder: Path, tallies: Mapping[str, DocumentTally], sources: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Writes report.json, report.md, report.html and the plots into a folder; returns the values of the JSON file.

    sources: of the manifest, for the tokens that were kept.
    """
    values = _measure(tallies, sources)
    with written_folder(folder) as draft:
        write_json(draft / "report.json", values)
        _draw_dropped(values, draft / PLOTS[0])
        _draw_lengths(values, draft / PLOTS[1])
        write_text(draft / "report.md", _to_markdown(values))
        write_text(draft / "report.html", _to_html(values, [(draft / name).read_bytes() for name in PLOTS]))
    return values


def _measure(tallies: Mapping[str, DocumentTally], sources: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found = {}
    for source in sources:
        tally = tallies[source["name"]]
        tokens = sum(source[split]["tokens"] for split in ("train", "validation") if split in source)
        rate = tokens / max(tally.kept_bytes, 1)
        values = tally.to_dict() | {"kept_tokens": tokens}
        for reason in values["dropped"].values():
            reason["tokens_estimated"] = round(reason["bytes"] * rate)  # dropped documents are not tokenized
        found[source["name"]] = values
    return {"sources": found}


def source_rows(values: Mapping[str, Any]) -> Rows:
    """A row for each source: what was read, kept and dropped."""
    rows = [
        (
            name,
            f"{found['documents']:,}",
            f"{found['kept_documents']:,}",
            f"{found['bytes'] / 1e6:,.1f}",
            f"{found['kept_bytes'] / 1e6:,.1f}",
            f"{found['kept_tokens']:,}",
            f"{found['bad_lines']:,}",
            f"{found['bad_files']:,}",
        )
        for name, found in values["sources"].items()
    ]
    columns = ("source", "documents", "kept", "MB", "MB kept", "tokens kept", "bad lines", "bad files")
    return Rows(columns, rows)


def dropped_rows(values: Mapping[str, Any]) -> Rows:
    """A row for each source and reason."""
    rows = [
        (name, reason, f"{one['documents']:,}", f"{one['bytes'] / 1e6:,.1f}", f"{one['tokens_estimated']:,}")
        for name, found in values["sources"].items()
        for reason, one in found["dropped"].items()
    ]
    return Rows(("source", "reason", "documents", "MB", "tokens, about"), rows, n_labels=2)


def sample_rows(values: Mapping[str, Any]) -> Rows:
    """A row for each sample of what was dropped."""
    rows = [
        (name, reason, as_cell(sample["where"]), as_cell(sample.get("shared", "")), as_cell(sample["text"]))
        for name, found in values["sources"].items()
        for reason, one in found["dropped"].items()
        for sample in one["samples"]
    ]
    return Rows(("source", "reason", "where", "shared with an evaluation set", "text"), rows, n_labels=5)


EXPLANATION = "Tokens of what was dropped are estimated from its bytes, by the tokens of each byte that was kept."


def _to_markdown(values: Mapping[str, Any]) -> str:
    errors = [error for found in values["sources"].values() for error in found["errors"]]
    skipped = "".join(f"- {as_cell(error)}\n" for error in errors)
    return "\n\n".join(
        (
            "# What became of the texts",
            source_rows(values).to_markdown(),
            *([f"What could not be read:\n\n{skipped}"] if errors else []),
            f"## What was dropped\n\n{EXPLANATION}",
            dropped_rows(values).to_markdown(),
            "\n\n".join(f"![]({name})" for name in PLOTS),
            f"## Samples of what was dropped\n\n{sample_rows(values).to_markdown()}\n",
        )
    )


def _to_html(values: Mapping[str, Any], plots: Sequence[bytes]) -> str:
    images = "".join(f'<img alt="" src="data:image/png;base64,{base64.b64encode(png).decode()}">' for png in plots)
    style = "body{font:15px sans-serif;margin:2em}td,th{padding:.2em .6em;text-align:left;vertical-align:top}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>gmask prepare</title><style>{style}</style>'
        f"<h1>What became of the texts</h1>{source_rows(values).to_html()}"
        f"<h2>What was dropped</h2><p>{EXPLANATION}</p>{dropped_rows(values).to_html()}{images}"
        f"<h2>Samples of what was dropped</h2>{sample_rows(values).to_html()}</html>\n"
    )


def _draw_dropped(values: Mapping[str, Any], path: Path) -> None:
    """Bars of documents by source: kept, and dropped by each reason."""
    sources = values["sources"]
    reasons = sorted({reason for found in sources.values() for reason in found["dropped"]})
    figure, panel = _new_figure(2 + 0.4 * len(sources))
    left = [0.0] * len(sources)
    shares = {"kept": [found["kept_documents"] for found in sources.values()]} | {
        reason: [found["dropped"].get(reason, {"documents": 0})["documents"] for found in sources.values()]
        for reason in reasons
    }
    for label, counts in shares.items():
        widths = [100 * n / max(found["documents"], 1) for n, found in zip(counts, sources.values(), strict=True)]
        panel.barh(list(sources), widths, left=left, label=label)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    panel.set_xlabel("documents, %")
    panel.legend(fontsize="small", bbox_to_anchor=(1, 1), loc="upper left")
    _save(figure, path)


def _draw_lengths(values: Mapping[str, Any], path: Path) -> None:
    """The documents of each source by their length, on a logarithmic axis."""
    figure, panel = _new_figure(4)
    for name, found in values["sources"].items():
        bits = sorted(map(int, found["lengths"]))
        panel.plot([2**bit for bit in bits], [found["lengths"][str(bit)] for bit in bits], marker="o", label=name)
    panel.set_xscale("log", base=2)
    panel.set_xlabel("words or characters of Chinese, at most")
    panel.set_ylabel("documents as read")
    panel.legend(fontsize="small")
    _save(figure, path)


def _new_figure(height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt.subplots(figsize=(9, height), layout="constrained")


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot as plt

    data = io.BytesIO()
    figure.savefig(data, dpi=100, format="png")
    plt.close(figure)
    path.write_bytes(data.getvalue())
