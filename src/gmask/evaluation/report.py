"""Tables of a held-out evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from gmask.tasks.metrics import Rows

SYSTEMS = {
    "model": "this model",
    "model_told_length": "this model, told the length",
    "trigram": "3-gram",
    "unigram": "unigram",
}
MEASURES = {"exact": "exact match", "f1": "F1", "choice": "one of 10"}


def fill_rows(evaluation: Mapping[str, Any]) -> Rows:
    """Exact match with its interval, F1 and choice, in per cent, by language, span length and system."""
    return _comparison_rows(evaluation, "comparisons", "hidden")


def kind_rows(evaluation: Mapping[str, Any]) -> Rows:
    """As `fill_rows`, for blanks of one word or character, by the kind of text."""
    return _comparison_rows(evaluation, "kinds", "kind of text")


def _comparison_rows(evaluation: Mapping[str, Any], part: str, title: str) -> Rows:
    rows = []
    for language, report in evaluation["languages"].items():
        for name, comparison in report[part].items():
            for system, score in comparison["scores"].items():
                rows.append(
                    (
                        language,
                        name,
                        SYSTEMS[system],
                        f"{comparison['n_blanks']}",
                        format_estimate(score["exact"]),
                        f"{100 * score['f1']['mean']:.1f}",
                        f"{100 * score['choice']['mean']:.1f}",
                    )
                )
    return Rows(("language", title, "system", "blanks", *(f"{m}, %" for m in MEASURES.values())), rows, n_labels=3)


def loss_rows(evaluation: Mapping[str, Any]) -> Rows:
    """Nats per labelled token, with bits per hidden character, by source and objective."""
    objectives = list(dict.fromkeys(name for losses in evaluation["losses"].values() for name in losses))
    rows = [
        (source, *(_format_loss(losses[name]) if name in losses else "-" for name in objectives))
        for source, losses in evaluation["losses"].items()
    ]
    means = [mean_loss(evaluation, name) for name in objectives]
    rows.append(("mean of the sources", *(f"{mean:.2f}" for mean in means)))
    return Rows(("source", *objectives), rows)


def mean_loss(evaluation: Mapping[str, Any], objective: str) -> float:
    """Nats per labelled token: the mean over the sources, each with the same weight."""
    values = [losses[objective]["nats_per_token"] for losses in evaluation["losses"].values() if objective in losses]
    return float(sum(values) / len(values))


def describe_leads(evaluation: Mapping[str, Any], language: str) -> list[str]:
    """Sentences that compare the exact match of the model with that of the trigrams, by the paired differences."""
    comparisons = evaluation["languages"][language]["comparisons"]
    return [
        f"{language}, {span}: {_describe_lead(SYSTEMS[system], lead)}"
        for span in (next(iter(comparisons)), "all")
        for system, lead in comparisons[span]["leads"].items()
    ]


def describe_context(evaluation: Mapping[str, Any], language: str) -> str:
    """A sentence that says how much the model's answers hang on the context."""
    report = evaluation["languages"][language]
    true, shuffled, cost = (report["context"][key] for key in ("true", "shuffled", "cost"))
    return (
        f"{language}, {next(iter(report['comparisons']))}: the hidden text costs {true['mean']:.2f} nats in its"
        f" sentence, and {shuffled['mean']:.2f} where the rest of the sentence is shuffled: {cost['mean']:.2f} more"
        f" (95 % interval {cost['low']:.2f} to {cost['high']:.2f})."
    )


def _describe_lead(system: str, lead: Mapping[str, float]) -> str:
    low, high = (f"{100 * lead[key]:+.1f}" for key in ("low", "high"))
    margin = f"({100 * lead['mean']:+.1f} points, 95 % interval {low} to {high})"
    if lead["low"] > 0:
        return f"{system} gives the hidden text more often than the 3-gram model {margin}."
    if lead["high"] < 0:
        return f"{system} gives the hidden text less often than the 3-gram model {margin}."
    return f"no difference between {system} and the 3-gram model can be told {margin}."


def format_estimate(estimate: Mapping[str, float]) -> str:
    return f"{100 * estimate['mean']:.1f} [{100 * estimate['low']:.1f}, {100 * estimate['high']:.1f}]"


def print_evaluation(evaluation: Mapping[str, Any], console: Console) -> None:
    console.print(loss_rows(evaluation).to_rich("Held-out loss: nats per hidden token (bits per hidden character)"))
    console.print(fill_rows(evaluation).to_rich("Blanks in held-out sentences"))
    by_kind = kind_rows(evaluation)
    if by_kind.rows:
        console.print(by_kind.to_rich("Blanks of one word or character, by the kind of text"))
    for language in evaluation["languages"]:
        console.print(*describe_leads(evaluation, language), describe_context(evaluation, language), sep="\n")


def _format_loss(loss: Mapping[str, float]) -> str:
    return f"{loss['nats_per_token']:.2f} ({loss['bits_per_character']:.2f})"
