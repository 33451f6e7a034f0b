"""Writes the card of the bundled model from the files of its folder.

    python recipes/bundled_card.py src/gmask/pretrained --output src/gmask/pretrained/README.md [--hardware WORDS]

The folder has config.json, recipe.yaml and metrics.jsonl of the training, and evaluation.json of `gmask evaluate`.
Origins, licences and credits of the texts come from recipes/bundled-sources.yaml.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gmask.evaluation.report import describe_context, describe_leads, fill_rows, kind_rows, loss_rows
from gmask.tasks.metrics import Rows

RECIPE = "recipes/bundled.yaml"
SOURCES = Path(__file__).with_name("bundled-sources.yaml")
PLAIN_ANSWERS = Path(__file__).with_name("plain_answers.jsonl")
OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon for the matrices of the layers, AdamW for the rest"}
SCHEDULES = {"cosine": "a cosine to the end", "constant": "constant, then in a line to the end"}
DTYPES = {"auto": "bfloat16 where the device has instructions for it, else float32"}


@dataclass(frozen=True, slots=True)
class Card:
    """What a card is made from."""

    evaluation: Mapping[str, Any]  # evaluation.json
    metrics: Sequence[Mapping[str, Any]]  # metrics.jsonl
    config: Mapping[str, Any]  # config.json
    recipe: Mapping[str, Any]  # recipe.yaml
    origins: Mapping[str, Mapping[str, str]]  # by source: origin, licence, credit
    hardware: str | None
    plain: Sequence[Mapping[str, Any]] = ()  # plain_answers.jsonl of judge_sentences.py


def render_card(card: Card) -> str:
    """The card in markdown, with the front matter of model hubs."""
    sections = (
        _front_matter(card),
        _introduction(card),
        _intended_use(),
        _quality(card),
        _plain_sentences(card),
        _examples(card),
        _losses(card),
        _training(card),
        _data(card),
        _credits(card),
        _limits(card),
        _reproduction(),
    )
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(card: Card) -> str:
    licences = list(dict.fromkeys(origin["licence"] for origin in card.origins.values()))
    matter: dict[str, Any] = {
        "license": "apache-2.0",
        "language": ["en", "zh"],
        "library_name": "gmask",
        "pipeline_tag": "text-generation",
        "tags": ["glm", "blank-infilling"],
        "training_data_licenses": licences,
    }
    return "---\n" + yaml.safe_dump(matter, allow_unicode=True, sort_keys=False, width=1000) + "---"


def _introduction(card: Card) -> str:
    config, last = card.config, card.metrics[-1]
    return f"""# The bundled gmask model

A GLM (Du et al., ACL 2022) of {card.evaluation["parameters"] / 1e6:.1f} million parameters that fills blanks in English
and Chinese text, trained from scratch by gmask on {last["tokens"] / 1e6:.1f} million tokens.

{config["num_hidden_layers"]} layers, hidden size {config["hidden_size"]}, {config["num_attention_heads"]} heads,
a vocabulary of {config["vocab_size"]:,}, contexts and answers of at most {config["max_position_embeddings"]} tokens.
The weights are under the Apache License 2.0."""


def _intended_use() -> str:
    return """## Intended use

To show and to test what gmask does, on any machine and without a download: `gmask infill` uses it when no model is
named. `[MASK]` hides some words, `[sMASK]` a sentence, `[gMASK]` all that follows. It is a starting point for
fine-tuning exercises. It is not made for answering questions, for advice, or for text that people rely on."""


def _quality(card: Card) -> str:
    evaluation = card.evaluation
    settings, languages = evaluation["settings"], evaluation["languages"]
    counts = " and ".join(f"{report['n_sentences']} {name}" for name, report in languages.items())
    seen = evaluation["ngram_tokens"]
    counted = (
        "every training text once"
        if seen is None
        else f"as many tokens of each source as the model saw ({seen:,} in all)"
    )
    vocabularies = ", ".join(
        f"{name}: {report['counted_symbols']:,} counted, {report['vocabulary']:,} different"
        for name, report in languages.items()
    )
    leads = "\n".join(
        f"- {line}"
        for name in languages
        for line in (*describe_leads(evaluation, name), describe_context(evaluation, name))
    )
    return f"""## Filling blanks in held-out sentences

{counts} sentences of documents that were held out of training, drawn with the sources' training weights (seed
{settings["seed"]}), each alone, without its document. In each of them neighbouring words (English) or characters
(Chinese) are hidden behind one `[MASK]`, once for every length. The model answers greedily and has to find the length
itself; *this model, told the length* takes, of its eight best answers, the best one of that length. Two models that
only count stand beside it, and they are told the true length: *unigram* gives the most frequent run of that length,
*3-gram* is an interpolated trigram model that looks at two symbols on either side. They counted {counted}
({vocabularies}).
The documents are chapters and sections: others from the same books were trained on and counted.

Exact match is the share of answers equal to the hidden text (capital letters count), with the 95 % bootstrap interval
over sentences; F1 compares words or characters. *One of 10*: the hidden text has to be more probable than nine others,
hidden in other sentences and as long (the unigram model goes by the product of the symbols' frequencies).

{fill_rows(evaluation).to_markdown()}

{leads}

### By the kind of text

One hidden word or character. Laws, manuals and other formulas are easier than prose, so each kind stands for itself.

{kind_rows(evaluation).to_markdown()}"""


def _plain_sentences(card: Card) -> str:
    if not card.plain:
        return ""
    sentences = {
        way: [record for record in card.plain if (record["kind"], record["way"]) == ("sentence", way)]
        for way in ("greedy", "search")
    }
    stories = {
        way: [record["counts"] for record in card.plain if (record["kind"], record["way"]) == ("story", way)]
        for way in ("greedy", "drawn")
    }
    rows = [
        (
            _cell(first["text"]),
            *(
                cell
                for record in (first, best)
                for cell in (_cell(" / ".join(record["answers"][0])), "yes" if record["counts"] else "no")
            ),
        )
        for first, best in zip(sentences["greedy"], sentences["search"], strict=True)
    ]
    greedy, best = (sum(record["counts"] for record in records) for records in sentences.values())
    told_greedily, told = (sum(counts) for counts in stories.values())
    return f"""### Plain sentences

{greedy} of {len(rows)} first answers are acceptable by the defaults of `gmask infill`, and {best} where the best of
five is searched for (`-n 5`), by two readers who judged apart. The sentences and the rule were written before the
training (`recipes/plain_sentences.yaml`). Of {len(stories["drawn"])} openings of stories {told} were continued by 40
words without a loop and in their language where words were drawn (temperature 0.8, top-p 0.9), and {told_greedily}
where the most probable token was taken at every step.

{Rows(("sentence", "first answer", "acceptable", "best of five", "acceptable"), rows, 5).to_markdown()}"""


def _example_rows(evaluation: Mapping[str, Any], language: str) -> Rows:
    """The first blanks of the sample, with the answers of the model and of the trigrams."""
    blanks = evaluation["languages"][language]["first_blanks"]
    columns = ("held-out sentence", "hidden", "this model", "3-gram")
    return Rows(columns, [[_cell(b[key]) for key in ("text", "answer", "model", "trigram")] for b in blanks], 4)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("[MASK]", "`[MASK]`").strip() or "(nothing)"


def _examples(card: Card) -> str:
    tables = "\n\n".join(_example_rows(card.evaluation, name).to_markdown() for name in card.evaluation["languages"])
    return f"""### The first blanks of the sample

Not selected: the first six of each length.

{tables}"""


def _losses(card: Card) -> str:
    tokens = card.evaluation["settings"]["loss_tokens"]
    return f"""## Held-out loss

Nats per hidden token, end tokens included (in brackets: bits per character of the hidden text), for each objective, on
at most {tokens:,} tokens of each source. Small sources have only one or two held-out documents.

{loss_rows(card.evaluation).to_markdown()}"""


def _training(card: Card) -> str:
    last, recipe = card.metrics[-1], card.recipe
    optimization, objective = recipe.get("optimization", {}), recipe.get("objective", {})
    dtype = optimization.get("dtype", "auto")
    shares = ", ".join(f"{name} {objective[name]}" for name in ("token", "sentence", "document") if name in objective)
    facts = [
        ("tokens seen", f"{last['tokens']:,}, of which {last['labelled_tokens']:,} to be predicted"),
        ("steps", f"{last['step']:,} of {optimization.get('rows_per_step', 16)} rows"),
        ("longest text in training", f"{_longest_text(recipe)} tokens"),
        ("objectives", shares or "as published"),
        ("blanks", _describe_blanks(objective)),
        ("optimizer", OPTIMIZERS[optimization.get("optimizer", "adamw")]),
        (
            "learning rate",
            f"at most {optimization.get('learning_rate', 1e-3):g}, {SCHEDULES[optimization.get('schedule', 'cosine')]}",
        ),
        ("arithmetic", f"{DTYPES.get(dtype, dtype)}; weights float32 in training"),
        ("last training loss", f"{last['loss']:.3f} nats"),
        ("time", f"{last['seconds'] / 3600:.2f} hours, {last['tokens'] / last['seconds']:,.0f} tokens/s"),
    ]
    if card.hardware:
        facts.append(("hardware", card.hardware))
    return f"""## Training

{Rows(("", ""), facts, 2).to_markdown()}

![Training and validation loss, learning rate and gradient norm over the tokens seen](curves.png)"""


def _longest_text(recipe: Mapping[str, Any]) -> int:
    """Tokens of the longest piece of text that the training had, in either part of it."""
    data = recipe["data"]
    return max(data.get("max_piece") or data["row_length"], recipe.get("decay", {}).get("row_length") or 0)


def _describe_blanks(objective: Mapping[str, Any]) -> str:
    """What the token objective hides."""
    share, length = objective.get("token_ratio", 0.15), objective.get("mean_span_length", 3.0)
    units = "whole words, " if objective.get("whole_words") else ""
    return f"{units}{100 * share:g} % of a text, {length:g} tokens on average"


def _data(card: Card) -> str:
    sources = card.recipe["data"]["sources"]
    total = sum(source.get("weight") or 0.0 for source in sources)
    rows = []
    for source in sorted(sources, key=lambda source: -(source.get("weight") or 0.0)):
        origin = card.origins.get(source["name"], {})
        share = f"{100 * source['weight'] / total:.1f}" if source.get("weight") else "-"
        rows.append((source["name"], origin.get("origin", "-"), origin.get("licence", "-"), share))
    columns = ("source", "origin", "licence", "% of tokens")
    table = Rows(columns, rows, n_labels=3).to_markdown()
    return f"""## Training data

Chinese is in simplified script. The texts themselves are not part of this package.

{table}"""


def _credits(card: Card) -> str:
    lines = [
        f"- {name}: {origin['credit']} ({origin['licence']}); {origin['origin']}. Cleaned and cut for training."
        for name, origin in card.origins.items()
        if "credit" in origin
    ]
    if not lines:
        return ""
    return "## Attribution\n\nThese sources ask to be named (CC BY, CC BY-SA):\n\n" + "\n".join(lines)


def _limits(card: Card) -> str:
    positions = card.config["max_position_embeddings"]
    seen = min(_longest_text(card.recipe), positions)
    return f"""## Limits

- It is small and has read little: it knows few facts, and what it fills in may be wrong, empty of sense or offensive.
- Most of its reading is old. The views of the nineteenth century, on women and on peoples above all, are in it.
- Long answers lose the thread. Contexts over {seen} tokens are longer than any in training; over {positions} they are
  refused.
- Simplified Chinese and English only; other scripts are spelt in bytes.
- It follows no instructions and holds no conversation. Nothing was done to make its answers safe."""


def _reproduction() -> str:
    return f"""## Reproduce

`make bundled CORPUS=folder` trains by `{RECIPE}`, evaluates the result and writes this page. The numbers above
alone: `gmask evaluate --recipe {RECIPE} --corpus folder`. All of them stand in `evaluation.json` and
`metrics.jsonl` beside this page."""


def read_card(folder: Path, hardware: str | None = None) -> Card:
    """Reads what the card of a folder is made from.

    Raises:
        FileNotFoundError: a file that the folder lacks.
    """

    def read(name: str) -> str:
        return (folder / name).read_text("utf-8")

    return Card(
        evaluation=json.loads(read("evaluation.json")),
        metrics=_read_lines(read("metrics.jsonl")),
        config=json.loads(read("config.json")),
        recipe=yaml.safe_load(read("recipe.yaml")),
        origins={entry["name"]: entry for entry in yaml.safe_load(SOURCES.read_text("utf-8"))},
        hardware=hardware,
        plain=_read_lines(PLAIN_ANSWERS.read_text("utf-8")) if PLAIN_ANSWERS.is_file() else [],
    )


def _read_lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--hardware", help="what the model was trained on, in words")
    options = parser.parse_args()
    try:
        card = read_card(options.folder, options.hardware)
    except FileNotFoundError as error:
        parser.error(f"{error.filename}: missing; gmask pretrain writes the folder, and gmask evaluate evaluation.json")
    options.output.write_text(render_card(card), encoding="utf-8")


if __name__ == "__main__":
    main()
