"""Pairs of a right and a wrong sum that a reward model has not seen: a validation file for recipes/reward-chat.yaml.

    python recipes/wrong_sums.py CORPUS OUT.jsonl [--count 400] [--seed 2]

CORPUS has the folders sft (of which recipes/chat_data.py made the data of bundled-chat) and preference. Wordings and
ranges are those of chat_data.py. Left out are all sums that bundled-chat was tuned on, which are drawn again here, and
all that a preference asks. Right and wrong results have equally many digits, so that length tells nothing.
"""

import argparse
import json
import random
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

from chat_data import asked_sum, make_sum, read, taught_sums
from sums import result_of

KIND = "new wrong result"
MISTAKES = (1, 2, 10, 11)
"""By how much a wrong result is too large or too small, as in the preferences of the corpus."""


def preferred_sums(folder: Path) -> set[Any]:
    """The sums that the preferences of a folder ask."""
    prompts = (record.get("prompt") for path in sorted(folder.glob("*.jsonl")) for record in read(path))
    return {asked_sum(prompt) for prompt in prompts if isinstance(prompt, str)} - {None}


def wrong_result(right: int, rng: random.Random) -> int:
    """A result near the right one, with as many digits."""
    near = [right + sign * mistake for mistake in MISTAKES for sign in (1, -1)]
    return rng.choice([value for value in near if value >= 0 and len(str(value)) == len(str(right))])


def draw_pairs(count: int, seen: Collection[Any], rng: random.Random) -> list[dict[str, str]]:
    """So many pairs of different sums that were not seen."""
    found: dict[Any, dict[str, str]] = {}
    while len(found) < count:
        asked, (question, answer) = make_sum(rng)
        if asked in seen or asked in found:
            continue
        right = result_of(*asked)
        before, _, after = answer["content"].rpartition(str(right))
        found[asked] = {
            "prompt": question["content"],
            "chosen": answer["content"],
            "rejected": f"{before}{wrong_result(right, rng)}{after}",
            "kind": KIND,
        }
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--seed", type=int, default=2)
    options = parser.parse_args()
    seen = taught_sums(options.corpus / "sft") | preferred_sums(options.corpus / "preference")
    pairs = draw_pairs(options.count, seen, random.Random(options.seed))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs), encoding="utf-8")
    signs = Counter(asked[1] for pair in pairs if (asked := asked_sum(pair["prompt"])))
    print(f"{len(pairs)} pairs ({', '.join(f'{count} of {sign}' for sign, count in signs.most_common())})")


if __name__ == "__main__":
    main()
