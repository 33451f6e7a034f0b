"""What the runs that learn from preferences share: the data in ids, the table of a start, the folder of a run."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from gmask.errors import GmaskError
from gmask.files import write_text
from gmask.generation.reward import AnswerEncoder, TooLongError
from gmask.recipes.feedback import FeedbackRecipe, Stage, load_feedback_recipe
from gmask.recipes.tuning import with_usual_rate
from gmask.tasks.preferences import AnswerPair, Intake, Judgement, Question, read_judgements, read_preferences
from gmask.tasks.records import find_files, hash_file
from gmask.training.run_folder import START_FILE
from gmask.training.tuning_run import TuningRun


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """A pair in ids. The prompt ends with ``<sop>``, an answer that was not cut with ``<eop>``."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    margin: float
    kind: str
    location: str

    @property
    def length(self) -> int:
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


@dataclass(frozen=True, slots=True)
class EncodedJudgement:
    """An answer with its label, in ids."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    is_good: bool
    location: str


class PreferenceEncoder:
    """Encodes pairs and judgements; what does not fit is counted and dropped, or cut."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, recipe: FeedbackRecipe) -> None:
        self.data = recipe.data
        self.answers = AnswerEncoder(
            tokenizer, config, max_source=recipe.data.max_source, max_target=recipe.data.max_target
        )

    def encode_pairs(self, pairs: Sequence[AnswerPair], intake: Intake) -> list[EncodedPair]:
        """Returns the pairs that fit. Raises `GmaskError` if none does, or for ids that nothing can be learnt from."""
        found = []
        for pair in pairs:
            rows = self._encode(pair.question, (pair.chosen, pair.rejected), pair.location, intake)
            if rows is None:
                continue
            prompt, (chosen, rejected) = rows
            if chosen == rejected:
                intake.drop("the answers are equal in tokens, or where they are cut", pair.location)
                continue
            margin = (pair.margin or 0.0) if self.data.margins else 0.0
            found.append(EncodedPair(prompt, chosen, rejected, margin, pair.kind, pair.location))
        self._require(found, intake)
        return found

    def encode_judgements(self, judgements: Sequence[Judgement], intake: Intake) -> list[EncodedJudgement]:
        """As `encode_pairs`, of answers with labels."""
        found = []
        for one in judgements:
            rows = self._encode(one.question, (one.answer,), one.location, intake)
            if rows is not None:
                found.append(EncodedJudgement(rows[0], rows[1][0], one.is_good, one.location))
        self._require(found, intake)
        return found

    def _encode(
        self, question: Question, answers: Sequence[Any], location: str, intake: Intake
    ) -> tuple[tuple[int, ...], list[tuple[int, ...]]] | None:
        try:
            prompt, left_out = self.answers.encode_question(question)
            ids = [self.answers.encode_answer(answer) for answer in answers]
        except TooLongError as error:
            intake.drop(f"{error} (data.max_source)", location)
            return None
        except GmaskError as error:
            raise GmaskError(f"{location}: {error}") from error
        longest = self.data.max_target
        if any(len(answer) > longest for answer in ids):
            if self.data.long_answers == "drop":
                intake.drop(f"an answer has more than {longest} tokens (data.max_target)", location)
                return None
            intake.shorten("an answer lost its end (data.max_target)", location)
            ids = [answer[:longest] for answer in ids]
        elif any(answer[-1] != self.answers.special.eop for answer in ids):
            intake.shorten("the ids of an answer have no end token", location)
        if left_out:
            intake.shorten("earlier rounds were left out (data.max_source)", location)
        return prompt, ids

    def _require(self, found: Sequence[Any], intake: Intake) -> None:
        if not found:
            reasons = ", ".join(f"{count} {why}" for why, count in intake.dropped.most_common())
            raise GmaskError(f"nothing is left to learn from ({reasons})")


@dataclass(frozen=True, slots=True)
class FeedbackSplits:
    """The preferences of a run before they are encoded."""

    train: Sequence[Any]
    validation: Sequence[Any]
    intakes: Mapping[str, Intake]  # by split


class FeedbackRun(TuningRun):
    """A run that learns from preferences: recipe, data and folder, checked before a model is loaded."""

    recipe: FeedbackRecipe

    stage: Stage

    def __init__(self, recipe: FeedbackRecipe, *, resume: bool = True) -> None:
        """Raises `GmaskError` for a folder that holds another run, and for data that cannot be read."""
        super().__init__(with_usual_rate(recipe))
        self.splits = self._read()
        self._check_folder(resume=resume)

    def _read(self) -> FeedbackSplits:
        data, intakes = self.recipe.data, {"train": Intake()}
        train = self._read_files(data.resolve(data.train), intakes["train"])
        validation: list[Any] = []
        if isinstance(data.validation, str):
            intakes["validation"] = Intake()
            validation = self._read_files(data.resolve(data.validation), intakes["validation"])
        elif data.validation is not None:
            train, validation = hold_out_prompts(train, data.validation, seed=self.recipe.run.seed)
        return FeedbackSplits(train, validation, intakes)

    def _read_files(self, pattern: str, intake: Intake) -> list[Any]:
        data = self.recipe.data
        if self.stage == "kto":
            return list(read_judgements(pattern, intake, limit=data.limit))
        return list(read_preferences(pattern, intake, pairing=data.pairs, limit=data.limit))

    def _hashes(self) -> dict[str, str]:
        data = self.recipe.data
        patterns = [data.train, *([data.validation] if isinstance(data.validation, str) else [])]
        return {path.name: hash_file(path) for name in patterns for path in find_files(data.resolve(name))}

    def _read_recipe(self, written: Path) -> FeedbackRecipe:
        return load_feedback_recipe(written, self.stage)

    def intake_of(self, split: str) -> Intake:
        """The counts of a split; those of train for a validation that was held out of it."""
        return self.splits.intakes.get(split, self.splits.intakes["train"])

    def write_start(self, console: Console, lines: Sequence[str]) -> None:
        """Prints and writes what was read, dropped and cut; and the recipe and the hashes of the data."""
        noun = "answers" if self.stage == "kto" else "pairs"
        self.out.mkdir(parents=True, exist_ok=True)
        file = io.StringIO()
        for target in (console, Console(file=file, width=160)):
            tables = [
                line
                for split, intake in self.splits.intakes.items()
                for line in (f"{self.stage}, {split}:", *intake.lines(noun))
            ]
            for line in (*tables, *lines):
                target.print(line, highlight=False, markup=False, soft_wrap=True)
        write_text(self.out / START_FILE, file.getvalue())
        self._write_start_files()


def hold_out_prompts(items: Sequence[Any], share: float, *, seed: int) -> tuple[list[Any], list[Any]]:
    """Sets a share of the prompts aside, at least one; returns the rest, and the items of those.

    Raises:
        GmaskError: nothing would be left.
    """
    prompts = list(dict.fromkeys(item.question for item in items))
    order = np.random.default_rng([seed, 1]).permutation(len(prompts))
    held = {prompts[index] for index in order[: max(1, round(share * len(prompts)))]}
    rest = [item for item in items if item.question not in held]
    if not rest:
        raise GmaskError("data.validation takes all prompts, and none is left to train on")
    return rest, [item for item in items if item.question in held]


def show_pair(pair: EncodedPair, tokenizer: PreTrainedTokenizerBase) -> str:
    """The first pair as the model reads it."""
    parts = [
        json.dumps(tokenizer.decode(list(ids)), ensure_ascii=False) for ids in (pair.prompt, pair.chosen, pair.rejected)
    ]
    return f"the first pair: {parts[0]} -> {parts[1]} rather than {parts[2]}"
