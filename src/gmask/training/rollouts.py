"""Rollouts: answers that a policy samples, and what they are worth.

The sampled ids are what is scored and learnt from, never the decoded text. An answer that was cut has no end: its last
token is the last that was sampled.

Shape letters: B rows, T positions, n sampled tokens of several answers, one answer after the other.
"""

import importlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gmask.errors import GmaskError, nearest, one_line
from gmask.evaluation.comparison import share_repeated
from gmask.files import at_line, cut_characters
from gmask.generation.answers import Answer, answer_text
from gmask.generation.encoding import Context, encode_plain, format_of
from gmask.generation.engine import Budget, Stepper
from gmask.generation.padding import batches_by_length
from gmask.generation.predict import SampleReader
from gmask.generation.sampling import Sampler
from gmask.generation.settings import Sampling
from gmask.infilling.blanks import NOT_SCORED
from gmask.models.glm import GLMConfig
from gmask.recipes.tuning import TuningDataSettings
from gmask.tasks.records import Sample, find_files, hash_file, read_records
from gmask.tasks.task import Task
from gmask.training.examples import Batch, DataFile, Example, collate_tokens, hold_out

WRITTEN = ("chat", "seq2seq", "infill")
"""The kinds of task whose answers a policy writes."""

MIN_PROMPT = 16
"""Tokens of a prompt that a reward model has room for, beside the answer."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """The prompts of a run, and the files that they were read from."""

    train: Sequence[Sample]
    validation: Sequence[Sample]
    files: Sequence[DataFile]


def read_prompt_splits(task: Task, data: TuningDataSettings, *, seed: int) -> Prompts:
    """Reads the prompts of a recipe. They need no answers; those that there are reach the reward function.

    Raises:
        GmaskError: a task that writes no answers, files that cannot be read, a text with several blanks.
    """
    if task.kind not in WRITTEN:
        raise GmaskError(f"{task.name} is of the kind {task.kind}: ppo needs a task that writes: {', '.join(WRITTEN)}")
    train, files = _read_split(task, data, data.train, "train")
    validation = list[Sample]()
    if isinstance(data.validation, str):
        validation, more = _read_split(task, data, data.validation, "validation")
        files += more
    elif data.validation is not None:
        train, validation = hold_out(train, data.validation, seed=seed)
    return Prompts(train, validation, files)


def _read_split(task: Task, data: TuningDataSettings, pattern: str, split: str) -> tuple[list[Sample], list[DataFile]]:
    path = data.resolve(pattern)
    bad: list[GmaskError] = []
    on_bad = bad.append if data.skip_bad_lines else None
    samples = task.samples(read_records(path, limit=data.limit, on_bad=on_bad), require_answers=False, on_bad=on_bad)
    files = [file for file in find_files(path) if file.suffix != ".target"]
    counts = {file: sum(sample.path == file for sample in samples) for file in files}
    return samples, [DataFile(split, file.name, count, hash_file(file)) for file, count in counts.items()]


# Answers


@dataclass(frozen=True, slots=True)
class Rollout:
    """A sampled answer."""

    context: Context
    actions: tuple[int, ...]  # the sampled ids; the last of a finished answer is its end
    is_finished: bool
    text: str
    logprobs: tuple[float, ...]  # of the actions, as the stepper reports them: over the whole vocabulary

    @property
    def length(self) -> int:
        """The number of tokens that the models read."""
        return len(self.context.ids) + len(self.actions)


class RolloutWriter:
    """Writes answers to prompts by the house's stepper, in the thread of its caller.

    Args:
        policy: its weights may change between two calls.
        reader: of the task and the lengths of the recipe.
        rows: answers that are written side by side.
    """

    def __init__(
        self, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, reader: SampleReader, *, rows: int
    ) -> None:
        self.policy, self.tokenizer, self.reader = policy, tokenizer, reader
        special = reader.special
        # Only <eop> ends an answer: another end would have to be told from it to be scored.
        forbidden = {*reader.format.forbidden_ids, special.sop, special.eos} - {special.eop}
        self.sampler = Sampler.for_model(special, forbidden, tokenizer, policy.config.vocab_size)
        self.sampler = Sampler((special.eop,), {*self.sampler.forbidden_ids, *forbidden})
        self.cut = 0  # prompts that were shortened
        self.stepper = Stepper(policy, tokenizer, self.sampler, special, budget=Budget(rows=rows))

    @property
    def forbidden_ids(self) -> tuple[int, ...]:
        """The tokens that are never written."""
        return self.sampler.forbidden_ids

    def read(self, samples: Sequence[Sample]) -> list[Context]:
        """The contexts of prompts. Raises `GmaskError` for one without exactly one blank, with its file and line."""
        read = [self.reader.read(sample) for sample in samples]
        self.cut += sum(one.tokens_cut > 0 or one.rounds_left_out > 0 for one in read)
        contexts = [one.context for one in read]
        for context, sample in zip(contexts, samples, strict=True):
            if len(context.blanks) != 1:
                error = GmaskError(f"the text has {len(context.blanks)} blanks, and ppo answers one")
                raise at_line(sample.path, sample.line, error) if sample.path else error
        return contexts

    def write(self, contexts: Sequence[Context], sampling: Sampling, *, seeds: Sequence[int]) -> list[list[Rollout]]:
        """``sampling.n`` answers to each context."""
        self.policy.eval()  # a cache and gradient checkpointing exclude each other
        found = self.stepper.run(contexts, sampling, seeds=seeds)
        return [
            [self._make(context, hypothesis.done[0]) for hypothesis in samples]
            for context, samples in zip(contexts, found, strict=True)
        ]

    def _make(self, context: Context, answer: Answer) -> Rollout:
        text = answer_text(answer, self.tokenizer)
        text = self.reader.format.clean(text) if self.reader.kind == "chat" else text.strip()
        if answer.end_logprob is None:
            return Rollout(context, answer.ids, False, text, answer.logprobs)
        actions = (*answer.ids, self.reader.special.eop)
        return Rollout(context, actions, True, text, (*answer.logprobs, answer.end_logprob))


def check_lengths(config: Any, data: TuningDataSettings) -> None:
    """Raises `GmaskError` if question and answer are longer than the positions of a model."""
    positions = config.max_position_embeddings
    needed = max(data.max_source, data.max_target + 1)
    if not isinstance(config, GLMConfig):
        needed = data.max_source + data.max_target + 1
    if needed > positions:
        raise GmaskError(
            f"data.max_source {data.max_source} and data.max_target {data.max_target} need {needed} positions, and the "
            f"model has {positions}: lower them"
        )


def rollout_seeds(seed: int, rollout: int, prompts: Sequence[int]) -> list[int]:
    """The seed of each prompt in a rollout: the same in any number of processes, and after a resume."""
    return [int(np.random.SeedSequence([seed, rollout, prompt]).generate_state(1)[0]) for prompt in prompts]


def collate_rollouts(rollouts: Sequence[Rollout], *, sop: int, pad: int, with_last: bool = False) -> Batch:
    """The batch of answers, padded on the left: ``input_ids``, ``sequence_ids``, ``targets [B, T]``, ``layout``.

    ``targets`` has at each position the sampled token that follows there, and -100 where none does.

    with_last: the last token of each answer is read, too, and is the only position with a target (itself): a reward
        model's score stands there.
    """
    examples = []
    for one in rollouts:
        context, position = one.context, one.context.blanks[0]
        read = (sop, *(one.actions if with_last else one.actions[:-1]))
        targets = [NOT_SCORED] * (len(read) - 1) + [read[-1]] if with_last else list(one.actions)
        answer_positions = range(1, len(read) + 1)
        ids = np.array([*context.ids, *read], np.int64)
        layout = [[*range(len(context.ids)), *[position] * len(read)], [*[0] * len(context.ids), *answer_positions]]
        labels = np.array([NOT_SCORED] * len(context.ids) + targets, np.int64)
        pieces = np.array(layout[1], np.int64) > 0
        examples.append(
            Example(
                input_ids=ids,
                labels=labels,
                layout=np.array(layout, np.int64),
                context_length=len(context.ids),
                objective="chat",
                pieces=pieces.astype(np.int64),
            )
        )
    batch = collate_tokens(examples, pad_id=pad)
    batch["targets"] = batch.pop("labels")
    return batch


# Rewards


class Reward(Protocol):
    """What answers are worth. Prompts and answers come with their ids, their texts, and the samples of the task."""

    def __call__(self, samples: Sequence[Sample], rollouts: Sequence[Rollout]) -> list[float]:
        """A score for each answer. Raises `GmaskError`, in one line."""


class FunctionReward:
    """A function of texts: ``function(prompts=, completions=, completion_ids=, references=, finished=)``.

    It is called with a list for each keyword, as TRL calls a reward function, and returns a list of numbers.
    ``references`` are the known answers of each prompt, ``finished`` is False for an answer that was cut. A function
    that does not need them all takes the others as ``**_``.
    """

    def __init__(self, name: str, folders: Sequence[Path] = ()) -> None:
        self.name, self.function = name, load_function(name, folders)
        file = getattr(sys.modules.get(self.function.__module__), "__file__", None)
        self.path = None if file is None else Path(file)  # of its source

    def __call__(self, samples: Sequence[Sample], rollouts: Sequence[Rollout]) -> list[float]:
        try:
            found = self.function(
                prompts=[sample.text for sample in samples],
                completions=[rollout.text for rollout in rollouts],
                completion_ids=[list(rollout.actions) for rollout in rollouts],
                references=[list(sample.answers) for sample in samples],
                finished=[rollout.is_finished for rollout in rollouts],
            )
        except Exception as error:
            raise GmaskError(f"reward.function {self.name} raised {type(error).__name__}: {one_line(error)}") from error
        return check_rewards(found, len(rollouts), f"reward.function {self.name}")


def check_rewards(found: Any, count: int, name: str) -> list[float]:
    """Rewards as floats. Raises `GmaskError` if they are not ``count`` finite numbers."""
    try:
        rewards = [float(value) for value in found]
    except (TypeError, ValueError) as error:
        raise GmaskError(f"{name} returned {found!r:.80}: it must return a number for each answer") from error
    if len(rewards) != count:
        raise GmaskError(f"{name} returned {len(rewards)} numbers for {count} answers")
    for index, value in enumerate(rewards):
        if not math.isfinite(value):
            raise GmaskError(f"{name} returned {value} for answer {index + 1} of {count}: rewards must be finite")
    return rewards


def load_function(name: str, folders: Sequence[Path] = ()) -> Callable[..., Any]:
    """The function of ``module:function``; modules are looked for in these folders first.

    Raises:
        GmaskError: another form, a module that cannot be imported, or one without that function.
    """
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise GmaskError(f"reward.function is {name!r}: write module:function")
    with importing_from(folders):
        try:
            module = importlib.import_module(module_name)
        except Exception as error:
            raise GmaskError(f"reward.function {name}: cannot import {module_name} ({one_line(error)})") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value)] or [attribute]
        raise GmaskError(
            f"reward.function {name}: {module_name} has no function {attribute!r}; the nearest is "
            f"{nearest(attribute, known)!r}"
        )
    found: Callable[..., Any] = function
    return found


@contextmanager
def importing_from(folders: Sequence[Path]) -> Iterator[None]:
    """Within it, modules are looked for in these folders first."""
    before = list(sys.path)
    sys.path[:0] = [str(folder) for folder in folders]
    try:
        yield
    finally:
        sys.path[:] = before


class ModelReward:
    """A reward model: the score of the last token that was sampled, from the ids themselves.

    A model with another tokenizer gets the text of prompt and answer, encoded anew in its own form; its end is written
    if the answer has one.

    Args:
        model: with a ``base_model`` and a linear head ``score`` of one output.
        tokenizer: of the policy.
        own_tokenizer: of the reward model.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        own_tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
    ) -> None:
        head = getattr(model, "score", None)
        if getattr(head, "out_features", None) != 1:
            name = getattr(model, "name_or_path", "") or type(model).__name__
            raise GmaskError(
                f"reward.model {name}: has no head that scores an answer; name the folder that gmask reward wrote (an "
                "adapter as reward.adapter)"
            )
        self.model, self.tokenizer, self.own_tokenizer = model.eval().requires_grad_(False), tokenizer, own_tokenizer
        self.batch_size = batch_size
        self.reads_ids = tokenizer.get_vocab() == own_tokenizer.get_vocab()
        self.format = format_of(model.config, own_tokenizer)

    def __call__(self, samples: Sequence[Sample], rollouts: Sequence[Rollout]) -> list[float]:
        if not self.reads_ids:
            rollouts = [self._encode(sample, one) for sample, one in zip(samples, rollouts, strict=True)]
        return self._run(rollouts, with_last=True, width=lambda one: 1).tolist()

    def values(self, rollouts: Sequence[Rollout]) -> Tensor:
        """The score of the text before each sampled token, ``[n]``: the published baseline without a critic."""
        assert self.reads_ids, "values are of the policy's own tokens"
        return self._run(rollouts, with_last=False, width=lambda one: len(one.actions))

    @torch.no_grad()
    def _run(self, rollouts: Sequence[Rollout], *, with_last: bool, width: Callable[[Rollout], int]) -> Tensor:
        def score(batch: Batch) -> Tensor:
            inputs = {name: batch[name].to(self.model.device) for name in ("input_ids", "layout", "sequence_ids")}
            states = self.model.base_model(**inputs, use_cache=False).last_hidden_state
            states = states[batch["targets"].to(states.device) != NOT_SCORED]
            scores: Tensor = self.model.score(states.to(self.model.score.weight.dtype))[:, 0].float().cpu()
            return scores

        special = self.format.special
        return score_in_batches(
            rollouts,
            lambda chosen: score(collate_rollouts(chosen, sop=special.sop, pad=special.pad, with_last=with_last)),
            width,
            batch_size=self.batch_size,
        )

    def _encode(self, sample: Sample, one: Rollout) -> Rollout:
        config, own = self.model.config, self.own_tokenizer
        positions: int = config.max_position_embeddings
        ids = encode_plain(own, cut_characters(one.text, positions, own))
        end = (self.format.special.eop,) if one.is_finished else ()
        answer = (*ids, *end) or (self.format.special.eop,)
        room = positions if isinstance(config, GLMConfig) else positions - len(answer) - 1
        if len(answer) >= positions or room < MIN_PROMPT:
            raise GmaskError(f"reward.model has {positions} positions, and an answer {len(answer)} tokens of its own")
        reader = SampleReader(own, config, "chat", max_source=room)  # which cuts a prompt that is longer
        return Rollout(reader.read(sample).context, answer, one.is_finished, one.text, ())


def score_in_batches(
    rollouts: Sequence[Rollout],
    score: Callable[[list[Rollout]], Tensor],
    width: Callable[[Rollout], int],
    *,
    batch_size: int,
) -> Tensor:
    """Scores answers of similar length together.

    Args:
        score: the numbers of some answers, one after the other.
        width: how many of them an answer has.

    Returns:
        The numbers of all answers, in their order.
    """
    parts: dict[int, Tensor] = {}
    for indices in batches_by_length([one.length for one in rollouts], batch_size):
        found = score([rollouts[index] for index in indices])
        pieces = torch.split(found, [width(rollouts[index]) for index in indices])
        parts.update(zip(indices, pieces, strict=True))
    return torch.cat([parts[index] for index in range(len(rollouts))])


def count_groups_without_spread(rewards: Sequence[float], answers: int) -> float:
    """The share of prompts whose ``answers`` answers all have the same reward."""
    groups = [rewards[start : start + answers] for start in range(0, len(rewards), answers)]
    return sum(max(group) == min(group) for group in groups) / len(groups)


def describe_rollouts(rollouts: Sequence[Rollout], rewards: Sequence[float], answers: int) -> Mapping[str, float]:
    """The numbers of a rollout for its log: mean reward and length, and shares of answers."""
    count = len(rollouts)
    return {
        "reward": sum(rewards) / count,
        "reward_deviation": float(np.std(rewards)),
        "length": sum(len(one.actions) for one in rollouts) / count,
        "repetition": sum(share_repeated(one.actions) for one in rollouts) / count,
        "truncated": sum(not one.is_finished for one in rollouts) / count,
        "without_text": sum(not one.text.strip() for one in rollouts) / count,  # control tokens alone, or nothing
        "groups_without_spread": count_groups_without_spread(rewards, answers),
    }
