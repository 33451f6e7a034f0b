"""Are the scores and the intervals of a tally those of the readable metrics, in little memory?"""

import random
import tracemalloc

import numpy as np
import pytest

from gmask.tasks.metrics import score_predictions
from gmask.tasks.records import Prediction, Sample
from gmask.tasks.tally import Tally, interval

CHOICES = ("accuracy", "f1", "macro-f1", "multirc-f1a", "multirc-em")
TEXTS = ("exact-match", "squad-f1", "rouge-l", "bleu-4", "sacrebleu")
WORDS = ["the", "old", "man", "took", "his", "dog", "down", "to", "the", "river", "and", "saw", "a", "boat", "there"]


def choose(count: int, *, groups: int = 0, classes: int = 2) -> tuple[list[Prediction], list[Sample]]:
    rng = random.Random(count)
    labels = [rng.randrange(classes) for _ in range(count)]
    samples = [Sample(label=label, group=str(rng.randrange(groups)) if groups else None) for label in labels]
    chosen = [label if rng.random() < 0.6 else rng.randrange(classes) for label in labels]
    return [Prediction(label=index) for index in chosen], samples


def write(count: int) -> tuple[list[Prediction], list[Sample]]:
    rng = random.Random(count)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(4, 9))) for _ in range(count)]
    written = [" ".join(rng.sample(text.split(), k=len(text.split()) - 1)) for text in texts]
    references = [(text, " ".join(rng.choices(WORDS, k=5))) if rng.random() < 0.5 else (text,) for text in texts]
    samples = [Sample(answers=(right[0],), references=right) for right in references]
    return [Prediction(texts=(text,)) for text in written], samples


def tally_of(metrics: tuple[str, ...], predictions: list[Prediction], samples: list[Sample]) -> Tally:
    tally = Tally(metrics)
    for answered in zip(predictions, samples, strict=True):
        tally.add(*answered)
    return tally


@pytest.mark.parametrize("metrics", [CHOICES, ("accuracy",), TEXTS, ("macro-accuracy", "accuracy", "group-em")])
def test_scores_are_those_of_the_readable_metrics(metrics: tuple[str, ...]) -> None:
    predictions, samples = write(30) if metrics == TEXTS else choose(60, groups=14)
    expected = score_predictions(metrics, predictions, samples)
    assert tally_of(metrics, predictions, samples).scores() == pytest.approx(expected)


def test_several_classes_and_several_blanks() -> None:
    predictions, samples = choose(80, classes=9)
    names = ("macro-f1", "accuracy")
    assert tally_of(names, predictions, samples).scores() == pytest.approx(
        score_predictions(names, predictions, samples)
    )
    two = [Sample(answers=("a dog", "the river")), Sample(answers=("a cat",))]
    told = [Prediction(texts=("a dog", "the boat")), Prediction(texts=("a cat",))]
    assert tally_of(("exact-match",), told, two).scores() == {"exact-match": pytest.approx(100 * 2 / 3)}  # blanks


def test_given_answers_and_filled_texts() -> None:
    names = ("accuracy", "nats", "perplexity", "word-perplexity")
    told = [Prediction(scores=(-0.5, -1.5), is_greedy=(True, True)), Prediction(scores=(-2.0,), is_greedy=(False,))]
    samples = [Sample(answers=("a b",), words=4), Sample(answers=("c",), words=3)]
    assert tally_of(names, told, samples).scores() == pytest.approx(score_predictions(names, told, samples))
    blanked = [Sample(text="the old [MASK] took his dog [MASK] .", answers=("man", "down to the river")),
               Sample(text="he saw [MASK] boat there .", answers=("a",))]  # fmt: skip
    told = [Prediction(texts=("man", "to the river")), Prediction(texts=("a",))]
    names = ("infill-bleu", "exact-match")
    assert tally_of(names, told, blanked).scores() == pytest.approx(score_predictions(names, told, blanked))


@pytest.mark.parametrize("metrics", [CHOICES, TEXTS])
def test_a_resample_is_what_the_metrics_say_of_the_samples_that_it_draws(metrics: tuple[str, ...]) -> None:
    groups = 8 if metrics == CHOICES else 0
    predictions, samples = write(12) if metrics == TEXTS else choose(40, groups=groups)
    found = tally_of(metrics, predictions, samples).resample(seed=3, resamples=4)
    rng = np.random.default_rng(3)
    units = list(dict.fromkeys(sample.group for sample in samples)) if groups else list(range(len(samples)))
    for row in range(4):
        drawn = []
        for number, unit in enumerate(rng.integers(len(units), size=len(units))):
            for index, sample in enumerate(samples):
                if groups and sample.group == units[unit]:  # drawn twice, a question counts as two
                    drawn.append((predictions[index], Sample(label=sample.label, group=f"{number}")))
                elif not groups and index == unit:
                    drawn.append((predictions[index], sample))
        expected = score_predictions(metrics, *map(list, zip(*drawn, strict=True)))
        assert {name: scores[row] for name, scores in found.items()} == pytest.approx(expected)


def test_an_interval_holds_the_truth_as_often_as_it_says() -> None:
    rng = random.Random(1)
    held = 0
    for _ in range(200):
        right = [rng.random() < 0.7 for _ in range(100)]
        tally = tally_of(("accuracy",), [Prediction(label=int(one)) for one in right], [Sample(label=1)] * 100)
        low, high = interval(tally.resample(resamples=300)["accuracy"])
        held += low <= 70 <= high
    assert 178 <= held <= 200  # 190 of 200 are expected, and a standard deviation is 3


def test_f1_without_a_positive_is_told() -> None:
    negative = [Sample(label=0)] * 3
    assert tally_of(("f1",), [Prediction(label=0)] * 3, negative).lacks_positive()
    assert not tally_of(("f1",), [Prediction(label=0)] * 2, [Sample(label=0), Sample(label=1)]).lacks_positive()
    assert not tally_of(("accuracy",), [Prediction(label=0)] * 3, negative).lacks_positive()


def test_samples_leave_numbers_alone() -> None:
    tally = Tally(("accuracy", "exact-match"))
    tracemalloc.start()
    try:
        for index in range(20_000):
            sample = Sample(text="x" * 2000, answers=(f"yes {index}", f"no {index}"), label=index % 2)
            tally.add(Prediction(label=index % 2), sample)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(tally) == 20_000
    assert held < 20_000 * 60  # bytes; the texts are 2,000 each
