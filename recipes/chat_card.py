"""What is the bundled chat model, in the words of its card? Writes README.md from the numbers of its run.

    python recipes/chat_card.py RUN QUALITY.json --output src/gmask/pretrained/chat/README.md [--hardware WORDS]

RUN is run.out of recipes/bundled-chat.yaml, QUALITY.json what benchmarks/chat_quality.py --json printed.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import yaml

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
and knows what the answer to a sum, a translation, a saying, a poem or a story looks like; whether it is right is
another matter, which the table tells.

## Quality

Greedy replies to held-out questions, in per cent, beside the model that it was tuned from
(`benchmarks/chat_quality.py`). Exact: the reference but for spaces and the mark at its end.

{quality}

{forgetting}

## Training

`recipes/bundled-chat.yaml`: {steps} steps of {rows} rows of {length} tokens, {epochs} passes, AdamW, peak learning
rate {rate} with a cosine to 0, bfloat16 forward on {hardware}, {minutes:.0f} minutes, seed {seed}. The best of the
evaluations by validation loss ({loss:.3f} nats per token) is kept, step {best}.

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
- Translations of more than a few words are mostly wrong, and practically all of the pairs that they were measured
  by stand in the texts that the bundled model was pretrained on. Poems asked for by name are recited from memory,
  often of another poem.
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


def render_forgetting(results: dict[str, Any]) -> str:
    found = {name: f"{value:.3f}" for name, value in results["forgetting"].items()}
    return (
        "What it forgot (a fixed general set that it was not tuned on, nats per token, before and after): general "
        f"texts {found['text_loss_before']} and {found['text_loss_after']}, replies {found['reply_loss_before']} and "
        f"{found['reply_loss_after']}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run", type=Path)
    parser.add_argument("quality", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--hardware", default="a CPU")
    options = parser.parse_args()
    results = json.loads((options.run / "results.json").read_text("utf-8"))
    last = json.loads((options.run / "metrics.jsonl").read_text("utf-8").splitlines()[-1])
    recipe = yaml.safe_load((options.run / "recipe.yaml").read_text("utf-8"))
    sources = yaml.safe_load(SOURCES.read_text("utf-8"))
    card = CARD.format(
        parameters=results["parameters"] / 1e6,
        tokens=f"{last['all_supervised_tokens']:,}",
        quality=render_quality(json.loads(options.quality.read_text("utf-8"))),
        forgetting=render_forgetting(results),
        steps=last["step"],
        rows=recipe["optimization"]["batch_size"],
        length=recipe["data"]["packing"],
        epochs=recipe["optimization"]["epochs"],
        rate=recipe["optimization"]["learning_rate"],
        hardware=options.hardware,
        minutes=last["seconds"] / 60,
        seed=recipe["run"]["seed"],
        loss=results["metrics"]["validation"]["loss"],
        best=results["best_step"],
        table="\n".join(f"| {entry['name']} | {entry['origin']} | {entry['licence']} |" for entry in sources),
        credits="\n".join(f"- {entry['name']}: {entry['credit']}" for entry in sources if "credit" in entry),
    )
    options.output.write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
