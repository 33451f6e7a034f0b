"""What is the bundled chat model, in the words of its card? Writes README.md from the numbers of its run.

    python recipes/chat_card.py RUN QUALITY.json --output src/gmask/pretrained/chat/README.md [--hardware WORDS]

RUN is run.out of recipes/bundled-chat.yaml, QUALITY.json what benchmarks/chat_quality.py --json printed.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import yaml
from chat_data import VALIDATION_SUMS

RECIPE = "recipes/bundled-chat.yaml"
SOURCES = Path(__file__).with_name("bundled-chat-sources.yaml")
NAMES = {"exact": "exact", "rouge-l": "ROUGE-L", "bleu-4": "BLEU-4"}

CARD = """\
---
license: apache-2.0
language: [en, zh]
library_name: gmask
base_model: bundled
---

# bundled-chat: the model that comes with gmask, tuned to answer

The bundled GLM ({parameters:.1f} M parameters), all of it tuned on {tokens} tokens of replies in English and
Chinese. It is what `gmask chat` and the page talk with.

```python
import gmask

model, tokenizer = gmask.load("bundled-chat")
gmask.Chat(model, tokenizer).ask("What is 7 + 5?").text
```

## Intended use

Trying out chat, streaming, serving and tuning without a download, in tests and in lessons. It exchanges greetings,
does sums of the kind that it was taught ({sums:.0f} % of {asked} held-out ones are right, {later:.0f} % of them in a
second round), and knows what a saying or a poem looks like; whether that is right is another matter, which the table
tells. Stories are beyond it, and translations were not taught: it is too small for them.

## Quality

Greedy replies to held-out questions, in per cent, beside the model that it was tuned from
(`benchmarks/chat_quality.py`). Exact: the reference but for spaces and the mark at its end.

{quality}

{forgetting}

## Training

Rows of tokens that several samples share, with AdamW and a cosine to 0, on {hardware}, in {minutes:.0f} minutes. The
best evaluation by validation loss is kept.

{training}

![Losses, metrics, learning rate and gradient norm over the steps](curves.png)

## Training data

| part | origin | licence |
|---|---|---|
{table}

## Attribution

{credits}

## Limits

- It is wrong more often than right wherever a question is not of a kind in the table, and makes facts up. Nothing
  that it says should be relied on.
- Poems asked for by name are recited from memory, often of another poem.
- It was not tuned to refuse anything. Its texts are old books, laws, poems and encyclopaedias, with their views.
- 512 tokens of conversation; earlier rounds are left out beyond that.

## Reproduce

```bash
make bundled-chat SFT=FOLDER
```
"""


def render_quality(quality: dict[str, Any]) -> str:
    heads = [f"{NAMES[name]}, {model}" for name in NAMES for model in quality]
    lines = ["| kind | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    for kind in quality["bundled-chat"]:
        cells = [f"{quality[model][kind][name]:.1f}" for name in NAMES for model in quality]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def render_training(run: dict[str, Any]) -> str:
    recipe, results = run["recipe"], run["results"]
    optimization = recipe["optimization"]
    heads = ["recipe", "steps", "rows x tokens", "passes", "peak rate", "seed", "best step"]
    cells = [
        f"`{RECIPE}`", results["steps"], f"{optimization['batch_size']} x {recipe['data']['packing']}",
        f"{optimization['epochs']:g}", f"{optimization['learning_rate']:g}", recipe["run"]["seed"],
        results["best_step"], f"{results['metrics']['validation']['loss']:.3f}",
    ]  # fmt: skip
    heads.append("loss there, nats per token")
    return "\n".join(
        "| " + " | ".join(map(str, row)) + " |" for row in (heads, ["---"] + ["---:"] * (len(heads) - 1), cells)
    )


def render_forgetting(found: dict[str, float]) -> str:
    values = {name: f"{value:.3f}" for name, value in found.items()}
    return (
        "What it forgot (a fixed general set that it was not tuned on, nats per token, before and after): "
        f"general texts {values['text_loss_before']} and {values['text_loss_after']}, "
        f"replies {values['reply_loss_before']} and {values['reply_loss_after']}."
    )


def read_run(folder: Path) -> dict[str, Any]:
    return {
        "recipe": yaml.safe_load((folder / "recipe.yaml").read_text("utf-8")),
        "results": json.loads((folder / "results.json").read_text("utf-8")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run", type=Path)
    parser.add_argument("quality", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--hardware", default="a CPU")
    options = parser.parse_args()
    run = read_run(options.run)
    results = run["results"]
    quality = json.loads(options.quality.read_text("utf-8"))
    sources = yaml.safe_load(SOURCES.read_text("utf-8"))
    card = CARD.format(
        parameters=results["parameters"] / 1e6,
        tokens=f"{results['supervised_tokens']:,}",
        quality=render_quality(quality),
        sums=quality["bundled-chat"]["arithmetic"]["exact"],
        later=quality["bundled-chat"]["arithmetic, second round"]["exact"],
        asked=VALIDATION_SUMS,
        forgetting=render_forgetting(results["forgetting"]),
        hardware=options.hardware,
        minutes=results["seconds"] / 60,
        training=render_training(run),
        table="\n".join(f"| {entry['name']} | {entry['origin']} | {entry['licence']} |" for entry in sources),
        credits="\n".join(f"- {entry['name']}: {entry['credit']}" for entry in sources if "credit" in entry),
    )
    options.output.write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
