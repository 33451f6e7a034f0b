"""How do ``gmask score`` and ``gmask embed`` read their texts, and where do the figures go?"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gmask.cli.arguments import print_report, read_candidates, read_files, read_texts
from gmask.cli.options import (
    Adapter,
    AsJson,
    Dtype,
    Model,
    Output,
    Quantize,
    SkipBadLines,
    Source,
    output_option,
)
from gmask.errors import GmaskError

if TYPE_CHECKING:
    from gmask.generation.score import Scorer, Scoring

BlankedTexts = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="TEXT",
        help="Texts with one [MASK], [sMASK] or [gMASK]; without any, the lines of standard input.",
        show_default=False,
    ),
]
PlainTexts = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="TEXT",
        help="Texts, with blanks or without; without any, the lines of standard input.",
        show_default=False,
    ),
]
Answers = Annotated[str | None, typer.Option(help="The answers to every text, as 'sunny|rainy'.", show_default=False)]
Normalization = Annotated[
    str,
    typer.Option(
        metavar="sum|mean|unconditional",
        help="Log-probability of an answer; for each of its tokens; or less that of the answer without the text.",
    ),
]
BatchSize = Annotated[int, typer.Option(help="Texts that are read together.")]
EmbeddedFile = Annotated[Path | None, output_option("Where the vectors of --input go: .npy (float32) or .jsonl.")]
Pooling = Annotated[
    str,
    typer.Option(metavar="mean|first|last|mask", help="Of all tokens; of the first, the last, or the first blank."),
]
Layer = Annotated[int, typer.Option(help="Which layer's hidden states; -1 is the last, 0 the embeddings.")]
Normalize = Annotated[bool, typer.Option(help="Scale every vector to length 1.")]
Truncate = Annotated[bool, typer.Option("--truncate", help="Cut texts that are too long instead of refusing them.")]


def score(
    texts: BlankedTexts = None,
    model: Model = "bundled",
    answers: Answers = None,
    normalization: Normalization = "sum",
    source: Source = None,
    target: Output = None,
    batch_size: BatchSize = 16,
    skip_bad_lines: SkipBadLines = False,
    as_json: AsJson = False,
    adapter: Adapter = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
) -> None:
    """Score given answers to the blank of a text by their exact log-probabilities, best first.

    A line of a .jsonl file has a "text", its "answers" unless --answers gives them, and perhaps a "label": the right
    answer, or its index from 0.
    """
    candidates = None if answers is None else read_candidates(answers, option="--answers")
    if files := read_files(texts, source, target):
        scorer = _load_scorer(model, adapter, dtype, quantize, normalization, batch_size)
        _score_file(scorer, *files, candidates, skip_bad_lines)
        return
    if candidates is None:
        raise GmaskError("there are no answers: give them as --answers 'sunny|rainy'")
    texts = read_texts(texts)
    scorer = _load_scorer(model, adapter, dtype, quantize, normalization, batch_size)
    for scoring in scorer.score([scorer.read(text, candidates) for text in texts]):
        if as_json:
            print(json.dumps(scoring.to_dict(), ensure_ascii=False))
        else:
            print_scoring(scoring)


def embed(
    texts: PlainTexts = None,
    model: Model = "bundled",
    pooling: Pooling = "mean",
    layer: Layer = -1,
    normalize: Normalize = True,
    truncate: Truncate = False,
    source: Source = None,
    target: EmbeddedFile = None,
    skip_bad_lines: SkipBadLines = False,
    adapter: Adapter = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
) -> None:
    """Turn texts into vectors: a model's hidden states, pooled. Prints a JSON object for each text.

    A model that fills blanks was not trained to put like texts near each other: these are features to train on, and
    poor sentence vectors to search with.
    """
    from gmask.generation.embed import Embedder, as_floats
    from gmask.loading import load
    from gmask.models.glm import GLMForConditionalGeneration

    settings: dict[str, Any] = {"pooling": pooling, "layer": layer, "normalize": normalize, "truncate": truncate}
    files = read_files(texts, source, target)
    texts = [] if files else read_texts(texts)
    loaded = load(model, dtype=dtype, quantize=quantize, adapter=adapter, model_class=GLMForConditionalGeneration)
    embedder = Embedder(*loaded, **settings)
    if files:
        from gmask.generation.files import embed_file

        report = embed_file(embedder, *files, skip_bad_lines=skip_bad_lines, progress=sys.stderr.isatty())
        print_report(report, files[1], deed="embedded")
        return
    vectors = embedder.embed([embedder.read(text) for text in texts])
    for text, vector in zip(texts, vectors, strict=True):
        print(json.dumps({"text": text, "embedding": as_floats(vector)}, ensure_ascii=False))


def _load_scorer(
    model: str, adapter: Path | None, dtype: str | None, quantize: str | None, normalization: str, batch_size: int
) -> "Scorer":
    from typing import cast

    from gmask.generation import score as scoring
    from gmask.loading import load
    from gmask.models.glm import GLMForConditionalGeneration

    loaded = load(model, dtype=dtype, quantize=quantize, adapter=adapter, model_class=GLMForConditionalGeneration)
    return scoring.Scorer(*loaded, cast(scoring.Normalization, normalization), batch_size)


def _score_file(
    scorer: "Scorer", source: Path, target: Path, candidates: Sequence[str] | None, skip_bad_lines: bool
) -> None:
    from gmask.generation.files import count_correct, score_file

    report = score_file(
        scorer,
        source,
        target,
        answers=candidates,
        skip_bad_lines=skip_bad_lines,
        progress=sys.stderr.isatty(),
    )
    print_report(report, target, deed="scored")
    correct, labelled = count_correct(target)
    if labelled:
        print(f"accuracy {correct / labelled:.4f} ({correct} of {labelled})")


def print_scoring(scoring: "Scoring") -> None:
    """Prints the answers to a text, best first: a table on a terminal, else a line each of four fields with tabs."""
    ranked = sorted(scoring.answers, key=lambda answer: -answer.score)
    rows = [(answer.text, f"{answer.score:.4f}", f"{answer.probability:.4f}") for answer in ranked]
    if not sys.stdout.isatty():
        for row in rows:
            print("\t".join(" ".join(field.split()) for field in (scoring.text, *row)))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(scoring.text), title_justify="left", box=None)
    table.add_column("answer")
    table.add_column("score", justify="right")
    table.add_column("probability", justify="right")
    for index, row in enumerate(rows):
        table.add_row(*map(Text, row), style="" if index else "bold green")
    Console(highlight=False).print(table)
