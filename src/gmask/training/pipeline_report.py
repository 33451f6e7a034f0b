"""The report over the stages of a pipeline: each stage's model answers the same held-out prompts.

Answers are written and scored as those of PPO are (`gmask.training.rollouts`), judged by a function or a reward model,
and compared with those of one of the models, the baseline.

Shape letters: n tokens of several answers, one answer after the other; V vocabulary.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gmask.checkpoints.load import load
from gmask.evaluation.comparison import (
    AnswerFigures,
    JudgedAnswer,
    Lead,
    find_lead,
    share_repeated,
    warn_of_change,
    warn_of_lengths,
)
from gmask.evaluation.rewards import WinRate
from gmask.files import written
from gmask.generation.predict import SampleReader
from gmask.generation.settings import Sampling
from gmask.recipes.pipeline import PipelineReportSettings, PipelineRunSettings
from gmask.recipes.tuning import ForgettingSettings, TuningDataSettings
from gmask.tasks.metrics import Rows, as_cell
from gmask.tasks.records import Sample
from gmask.tasks.task import Task, read_task
from gmask.training.accelerator import find_device, make_accelerator, make_arguments
from gmask.training.policies import target_states
from gmask.training.rollouts import (
    FunctionReward,
    ModelReward,
    Reward,
    Rollout,
    RolloutWriter,
    collate_rollouts,
    read_prompt_splits,
    rollout_seeds,
    score_in_batches,
)
from gmask.training.validation import GeneralScores, Validator, read_general_set, score_general_set

Way = Literal["greedy", "sampled"]
"""How answers are written."""

STAGES_FILE = "stages.png"
REPORT_ROLLOUT = 2**31 + 1
"""The number in place of a rollout's in the seeds of the report's samples."""


@dataclass(frozen=True, slots=True)
class Contestant:
    """A model whose answers are compared."""

    name: str  # of the stage
    model: str  # a folder or a name
    adapter: str | None = None
    quantize: str | None = None


@dataclass(frozen=True, slots=True)
class StageFigures:
    """The answers of one model, written in one way, and what they are like."""

    name: str
    rewards: Mapping[str, float]  # the mean by each judge
    leads: Mapping[str, Lead]  # over the baseline, by each judge; none for the baseline
    length: float  # tokens, the end included
    truncated: float  # the share of answers without an end
    repetition: float
    entropy: float  # nats a token, over the whole vocabulary
    kl: float | None  # from the baseline, nats an answer along its tokens; None beside another vocabulary
    texts: Sequence[str]  # the first answer to each prompt
    text_rewards: Mapping[str, Sequence[float]]  # of those, by each judge

    def figures(self, judge: str) -> AnswerFigures:
        return AnswerFigures(self.rewards[judge], self.length, self.repetition, self.entropy)


@dataclass(frozen=True, slots=True)
class StageComparison:
    """All numbers of the report. The first model is the baseline."""

    prompts: Sequence[str]
    judges: Sequence[str]
    ways: Mapping[str, Sequence[StageFigures]]
    general: Mapping[str, Mapping[str, float | None]]  # losses on the general set in nats a token, by stage
    shown: int = field(default=20)

    @property
    def baseline(self) -> str:
        return self.ways["greedy"][0].name

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with the warnings."""
        return {**dataclasses.asdict(self), "warnings": self.warnings()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "StageComparison":
        """The comparison of `to_dict`."""

        def rate(one: Mapping[str, Any] | None) -> WinRate | None:
            return None if one is None else WinRate(**one)

        def lead(one: Mapping[str, Any]) -> Lead:
            return Lead(WinRate(**one["all"]), rate(one["like_length"]))

        def figures(one: Mapping[str, Any]) -> StageFigures:
            return StageFigures(**{**one, "leads": {judge: lead(found) for judge, found in one["leads"].items()}})

        ways = {way: [figures(one) for one in found] for way, found in values["ways"].items()}
        names = [entry.name for entry in dataclasses.fields(cls) if entry.name != "ways"]
        return cls(ways=ways, **{name: values[name] for name in names})

    def warnings(self) -> list[str]:
        """What a reader has to know before the rewards are believed, a line each."""
        found = []
        for way, stages in self.ways.items():
            for stage in stages[1:]:
                for judge in self.judges:
                    lines = warn_of_change(stages[0].figures(judge), stage.figures(judge))
                    lines += warn_of_lengths(stage.leads[judge])
                    found += [f"{stage.name}, {way} answers, by {judge}: {line}" for line in lines]
        return found

    def win_rows(self, way: str) -> Rows:
        """A table of rewards and wins, a row for each model and judge."""
        rows = []
        for judge in self.judges:
            for stage in self.ways[way]:
                lead = stage.leads.get(judge)
                wins, alike = map(_show_rate, _rates_of(lead))
                pairs = "-" if lead is None or lead.like_length is None else f"{lead.like_length.count}"
                rows.append((stage.name, judge, f"{stage.rewards[judge]:.3f}", wins, alike, pairs))
        return Rows(("stage", "judge", "reward", "wins, %", "of like length, %", "prompts"), rows, n_labels=2)

    def figure_rows(self, way: str) -> Rows:
        """A table of what the answers are like, a row for each model."""
        rows = [
            (
                stage.name, f"{stage.length:.1f}", f"{100 * stage.truncated:.1f}", f"{100 * stage.repetition:.1f}",
                f"{stage.entropy:.3f}", "-" if stage.kl is None else f"{stage.kl:.2f}",
            )
            for stage in self.ways[way]
        ]  # fmt: skip
        return Rows(("stage", "tokens", "cut, %", "repeated, %", "entropy", "KL"), rows)

    def general_rows(self) -> Rows:
        """A table of the losses on the general set, and their changes from the baseline."""
        first = self.general[self.baseline]
        rows = []
        for name, scores in self.general.items():
            cells = [name]
            for kind, loss in scores.items():
                before = first[kind]
                cells += ["-", "-"] if loss is None or before is None else [f"{loss:.4f}", f"{loss - before:+.4f}"]
            rows.append(cells)
        return Rows(("stage", "general texts", "change", "replies to general prompts", "change"), rows)

    def summary(self) -> str:
        """The tables and the warnings, as markdown."""
        parts = [
            f"## Answers to {len(self.prompts)} held-out prompts",
            f"Wins are against {self.baseline}, ties count half, intervals (95 %) are Wilson's over the prompts. Of "
            "like length: pairs that differ by a tenth of the longer at most, or by one token. Repeated: 3-grams that "
            f"stood in the answer before. Entropy in nats a token; KL from {self.baseline}, in nats an answer.",
        ]
        for way in self.ways:
            parts += [
                f"### {way.capitalize()} answers",
                self.win_rows(way).to_markdown(),
                self.figure_rows(way).to_markdown(),
            ]
        parts += ["## What was forgotten", "Nats a token on a general set; a rise is what was forgotten."]
        parts.append(self.general_rows().to_markdown())
        warnings = self.warnings()
        parts += ["## Warnings", "\n".join(f"- {line}" for line in warnings) if warnings else "None."]
        parts.append(f"![Rewards, wins, divergence, entropy, lengths, shares and losses by stage]({STAGES_FILE})")
        return "\n\n".join(parts)


def compare_stages(
    settings: PipelineReportSettings,
    contestants: Sequence[Contestant],
    *,
    judge: str | None,
    folders: Sequence[Path],
    run: PipelineRunSettings,
) -> StageComparison:
    """Measures models on held-out prompts; the first one is the baseline.

    Args:
        judge: the folder or name of the reward model, if one judges.
        folders: where the module of a reward function is looked for first.

    Raises:
        GmaskError: a task that writes no answers, prompts that cannot be read, a model or a judge that does not fit.
    """
    return _Comparing(settings, judge=judge, folders=folders, run=run).compare(contestants)


@dataclass(frozen=True, slots=True)
class _Measured:
    """The answers of a model to each prompt, with their rewards by judge; and its figures without the leads."""

    answers: Mapping[str, Sequence[Sequence[JudgedAnswer]]]
    figures: StageFigures


class _Comparing:
    """What the models of a report have in common: prompts, judges, the baseline once it is loaded."""

    def __init__(
        self, settings: PipelineReportSettings, *, judge: str | None, folders: Sequence[Path], run: PipelineRunSettings
    ) -> None:
        self.settings, self.run = settings, run
        self.device = torch.device(find_device(run.device))
        self.task: Task = read_task({"use": settings.task} if isinstance(settings.task, str) else settings.task)
        data = TuningDataSettings(train=settings.prompts, root=settings.root, limit=settings.limit)
        self.samples: Sequence[Sample] = read_prompt_splits(self.task, data, seed=run.seed).train
        named = settings.reward.function
        self.function = None if named is None else FunctionReward(named, folders)
        self.judge = None if judge is None else load(judge, device=self.device)
        self.baseline: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None

    def compare(self, contestants: Sequence[Contestant]) -> StageComparison:
        ways: dict[str, list[StageFigures]] = {}
        first: dict[str, _Measured] = {}
        general = {}
        for contestant in contestants:
            model, tokenizer = load(
                contestant.model, adapter=contestant.adapter, quantize=contestant.quantize, device=self.device
            )
            if self.baseline is None:
                self.baseline = model, tokenizer
            scores = self._score_general(model, tokenizer)
            general[contestant.name] = {"text_loss": scores.text_loss, "reply_loss": scores.reply_loss}
            for way, measured in self._measure(contestant.name, model, tokenizer).items():
                base = first.setdefault(way, measured)
                leads = {judge: find_lead(found, base.answers[judge]) for judge, found in measured.answers.items()}
                figures = dataclasses.replace(measured.figures, leads={} if measured is base else leads)
                ways.setdefault(way, []).append(figures)
        return StageComparison(
            prompts=[sample.text for sample in self.samples],
            judges=list(first["greedy"].answers),
            ways=ways,
            general=general,
            shown=self.settings.shown,
        )

    def _measure(self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[Way, _Measured]:
        settings = self.settings
        reader = SampleReader(tokenizer, model.config, self.task.kind, max_source=settings.max_source)
        writer = RolloutWriter(model, tokenizer, reader, rows=settings.rows)
        contexts = writer.read(self.samples)
        judges = self._make_judges(tokenizer)
        samplings: dict[Way, Sampling] = {"greedy": Sampling(max_tokens=settings.max_target, min_tokens=0)}
        if settings.samples:
            samplings["sampled"] = Sampling(
                n=settings.samples, max_tokens=settings.max_target, min_tokens=0, temperature=settings.temperature
            )
        seeds = rollout_seeds(self.run.seed, REPORT_ROLLOUT, range(len(contexts)))
        found: dict[Way, _Measured] = {}
        for way, sampling in samplings.items():
            with torch.inference_mode():
                groups = writer.write(contexts, sampling, seeds=seeds)
            found[way] = self._judge(name, groups, judges, model, tokenizer, reader)
        return found

    def _make_judges(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Reward]:
        """The judges by their names, for answers in the ids of a tokenizer."""
        judges: dict[str, Reward] = {}
        if self.function is not None:
            judges[self.function.name] = self.function
        if self.judge is not None:
            own = ModelReward(self.judge[0], tokenizer, self.judge[1], batch_size=self.settings.batch_size)
            judges[str(self.settings.reward.model)] = own
        return judges

    def _judge(
        self,
        name: str,
        groups: Sequence[Sequence[Rollout]],
        judges: Mapping[str, Reward],
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        reader: SampleReader,
    ) -> _Measured:
        rollouts = [one for group in groups for one in group]
        asked = [sample for sample, group in zip(self.samples, groups, strict=True) for _ in group]
        rewards = {judge: reward(asked, rollouts) for judge, reward in judges.items()}
        copies, count = len(groups[0]), len(rollouts)
        assert self.baseline is not None, "it is the first model"
        base, base_tokenizer = self.baseline
        is_comparable = base_tokenizer.get_vocab() == tokenizer.get_vocab()
        special = reader.special
        scored = score_in_batches(
            rollouts,
            lambda chosen: score_tokens(
                model, base if is_comparable else model, chosen, sop=special.sop, pad=special.pad
            ),
            lambda one: len(one.actions),
            batch_size=self.settings.batch_size,
        )
        starts = range(0, count, copies)
        figures = StageFigures(
            name=name,
            rewards={judge: sum(values) / count for judge, values in rewards.items()},
            leads={},
            length=sum(len(one.actions) for one in rollouts) / count,
            truncated=sum(not one.is_finished for one in rollouts) / count,
            repetition=sum(share_repeated(one.actions) for one in rollouts) / count,
            entropy=float(scored[:, 0].mean()),
            kl=float(scored[:, 1].sum()) / count if is_comparable else None,
            texts=[group[0].text for group in groups],
            text_rewards={judge: [values[start] for start in starts] for judge, values in rewards.items()},
        )
        answers = {
            judge: [
                [JudgedAnswer(rollouts[index].actions, values[index]) for index in range(start, start + copies)]
                for start in starts
            ]
            for judge, values in rewards.items()
        }
        return _Measured(answers, figures)

    def _score_general(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> GeneralScores:
        """The losses on the general set, of texts as long as half of the positions at most."""
        half = model.config.max_position_embeddings // 2
        data = TuningDataSettings(train="", max_source=min(384, half), max_target=min(128, half))
        validator = Validator(
            model,
            tokenizer,
            self.task,
            data,
            settings=Sampling(),
            batch_size=self.settings.batch_size,
            accelerator=make_accelerator(make_arguments(self.run.out, device=self.device.type, dtype=torch.float32)),
            dtype=model.dtype,
        )
        general = read_general_set(ForgettingSettings(texts=self.settings.general), self._resolve)
        return score_general_set(general, validator, answers=0)

    def _resolve(self, pattern: str) -> str:
        return str(Path(self.settings.root) / pattern)


@torch.no_grad()
def score_tokens(
    model: PreTrainedModel, baseline: PreTrainedModel, rollouts: Sequence[Rollout], *, sop: int, pad: int
) -> Tensor:
    """The entropy of a model before each token of some answers, and its divergence from another there: ``[n, 2]``.

    Both are of the whole distribution, so that the divergence is exact at each token and never negative.
    """
    batch = {name: part.to(model.device) for name, part in collate_rollouts(rollouts, sop=sop, pad=pad).items()}

    def distribution(one: Any) -> Tensor:
        logits: Tensor = one.lm_head(target_states(one, batch)).float()
        return logits.log_softmax(-1)

    logprobs = distribution(model)
    other = logprobs if baseline is model else distribution(baseline)
    probabilities = logprobs.exp()
    entropy, divergence = -(probabilities * logprobs).sum(-1), (probabilities * (logprobs - other)).sum(-1)
    return torch.stack((entropy, divergence), dim=-1).cpu()


# The page and the picture


def render_stages(comparison: StageComparison) -> str:
    """The report as a page of markdown: tables, warnings, and the answers side by side."""
    stages, judge = comparison.ways["greedy"], comparison.judges[0]
    columns = ["prompt", *(cell for stage in stages for cell in (stage.name, "reward"))]
    rows = []
    for index in _most_changed(stages, judge)[: comparison.shown]:
        cells = [as_cell(comparison.prompts[index])]
        for stage in stages:
            cells += [as_cell(stage.texts[index]), f"{stage.text_rewards[judge][index]:.2f}"]
        rows.append(cells)
    table = Rows(columns, rows, n_labels=len(columns)).to_markdown()
    side = f"## Answers side by side\n\nGreedy, with the reward by {judge}; those that changed most come first."
    return f"# The stages compared\n\n{comparison.summary()}\n\n{side}\n\n{table}\n"


def _most_changed(stages: Sequence[StageFigures], judge: str) -> list[int]:
    """The numbers of the prompts, those first whose rewards differ most between the stages."""

    def spread(index: int) -> float:
        rewards = [stage.text_rewards[judge][index] for stage in stages]
        return max(rewards) - min(rewards)

    return sorted(range(len(stages[0].texts)), key=lambda index: -spread(index))


def draw_stages(comparison: StageComparison, path: Path) -> Path:
    """Draws the numbers of the report, a group of bars for each stage."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(2, 4, figsize=(15, 6.5), layout="constrained")
    judge = comparison.judges[0]

    def draw(panel: Any, label: str, series: Mapping[str, Sequence[float]], errors: Any = None) -> None:
        names = [stage.name for stage in comparison.ways["greedy"]]
        width = 0.8 / len(series)
        for number, (name, values) in enumerate(series.items()):
            places = [index + (number - (len(series) - 1) / 2) * width for index in range(len(names))]
            panel.bar(places, values, width, label=name, yerr=None if errors is None else errors[name], capsize=2)
        panel.set_xticks(range(len(names)), names, rotation=20)
        panel.set_title(label, fontsize="medium")
        panel.grid(axis="y", alpha=0.3)
        if len(series) > 1:
            panel.legend(fontsize="small")

    def by_way(value: Callable[[StageFigures], float]) -> dict[str, list[float]]:
        return {way: [value(stage) for stage in stages] for way, stages in comparison.ways.items()}

    draw(panels[0, 0], f"reward by {judge}", by_way(lambda stage: stage.rewards[judge]))
    rates = [_rates_of(stage.leads.get(judge)) for stage in comparison.ways["greedy"]]
    wins = {name: [pair[index] for pair in rates] for index, name in enumerate(("all pairs", "of like length"))}
    draw(
        panels[0, 1],
        f"wins against {comparison.baseline}, % (greedy)",
        {name: [50.0 if one is None else 100 * one.share for one in found] for name, found in wins.items()},
        {
            name: [
                [0.0 if one is None else 100 * (one.share - one.low) for one in found],
                [0.0 if one is None else 100 * (one.high - one.share) for one in found],
            ]
            for name, found in wins.items()
        },
    )
    panels[0, 1].axhline(50, color="0.4", linewidth=1)
    draw(panels[0, 2], f"KL from {comparison.baseline} (nats an answer)", by_way(lambda stage: stage.kl or 0.0))
    draw(panels[0, 3], "entropy (nats a token)", by_way(lambda stage: stage.entropy))
    draw(panels[1, 0], "length (tokens)", by_way(lambda stage: stage.length))
    draw(panels[1, 1], "repeated 3-grams, %", by_way(lambda stage: 100 * stage.repetition))
    draw(panels[1, 2], "answers that were cut, %", by_way(lambda stage: 100 * stage.truncated))
    losses = {"texts": "text_loss", "replies": "reply_loss"}
    draw(
        panels[1, 3],
        "loss on the general set (nats a token)",
        {label: [one[kind] or 0.0 for one in comparison.general.values()] for label, kind in losses.items()},
    )
    with written(path) as draft:
        figure.savefig(draft, dpi=110, format="png")
    plt.close(figure)
    return path


def _rates_of(lead: Lead | None) -> tuple[WinRate | None, WinRate | None]:
    return (None, None) if lead is None else (lead.all, lead.like_length)


def _show_rate(rate: WinRate | None) -> str:
    if rate is None:
        return "-"
    return f"{100 * rate.share:.1f} [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"
