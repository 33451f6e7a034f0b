"""Are spans drawn by the published law? Ours against the published counts of 2000 samples a setting.

Means and shares: two-sample z below 4, with both samples' standard errors. Histograms: two-sample chi-square,
p > 0.001, neighbouring rare values pooled. Share of shuffled samples: Fisher's exact test, p > 0.001. Where
samples come in bunches (pieces of one split row) a bunch counts as one. Seeds are fixed.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from gmask.infilling.blanks import BlankTokens, InfillingExample, blank_out
from gmask.infilling.objectives import Mixture
from gmask.infilling.spans import choose_sentences, find_sentences, split_short

GOLDEN = Path(__file__).parent / "golden" / "blockmask"
STATS = json.loads((GOLDEN / "stats.json").read_text())
IDS = json.loads((GOLDEN / "case.json").read_text())["ids"]
SPECIAL = BlankTokens(
    mask=IDS["MASK"],
    smask=IDS["sMASK"],
    gmask=IDS["gMASK"],
    sop=IDS["sop"],
    eop=IDS["eop"],
    pad=IDS["pad"],
    cls=IDS["ENC"],
    eos=IDS["eos"],
    dblock=IDS["dBLOCK"],
)
SENTENCE_ENDS = np.isin(np.arange(50_048), [43361, 43369, 43383, 43389, 43460, 43475])  # 。 . : ? ! ;
SAMPLES = STATS["n"]


@dataclass
class Counted:
    """What the published record counts, of one of our samples."""

    objective: str
    text_length: int
    sequence_length: int
    span_lengths: list[int]
    left_to_right: bool
    hidden_answer: int  # answer tokens that read [dBLOCK]
    context_length: int
    hidden_context: int

    @classmethod
    def of(cls, example: InfillingExample) -> "Counted":
        context, answers = np.split(example.input_ids, [example.context_length])
        places, numbers = example.layout[:, example.context_length :]
        starts = np.flatnonzero(numbers == 1)
        lengths = np.diff(starts, append=len(answers)) - 1  # of an open answer, the last token is only a label
        return cls(
            objective=example.objective,
            text_length=int(len(context) - len(starts) + lengths.sum()),
            sequence_length=len(example.input_ids),
            span_lengths=lengths.tolist(),
            left_to_right=bool((np.diff(places[starts]) > 0).all()),
            hidden_answer=int((answers == SPECIAL.dblock).sum()),
            context_length=len(context),
            hidden_context=int((context == SPECIAL.dblock).sum()),
        )


def assert_same_share(parts: Sequence[float], wholes: Sequence[float], published: float, bunch: float = 1) -> None:
    """`sum(parts) / sum(wholes)` is the published ratio; a mean is one whose wholes are all 1.

    The published sample has the size of ours, so its error is taken to be the same.
    """
    off = np.array(parts) - published * np.array(wholes)
    error = np.sqrt(2 * bunch * len(off)) * off.std()
    assert abs(off.sum()) <= 4 * error + 1e-6, f"{sum(parts) / sum(wholes)} against {published}"


def assert_same_histogram(ours: Sequence[int], published: Mapping[str, int], bunch: float = 1) -> None:
    counted = Counter(ours)
    bins = [np.zeros(2)]
    for value in sorted({*counted, *map(int, published)}):
        if bins[-1].min() >= 10:
            bins.append(np.zeros(2))
        bins[-1] += [counted[value], published.get(str(value), 0)]
    if len(bins) > 1:
        bins[-2] += bins.pop()  # the last one may be rare
    if len(bins) > 1:
        assert stats.chi2_contingency(np.array(bins) / bunch).pvalue > 0.001


def assert_same_order(samples: Sequence[Counted], published: float, count: int) -> None:
    """The share of samples, of those with two spans or more, whose answers are not left to right."""
    several = [sample for sample in samples if len(sample.span_lengths) > 1]
    moved, published_moved = sum(not sample.left_to_right for sample in several), round(published * count)
    table = [[moved, len(several) - moved], [published_moved, count - published_moved]]
    assert stats.fisher_exact(table).pvalue > 0.001


def assert_published(samples: Sequence[Counted], name: str, bunch: float = 1) -> None:
    published = STATS["settings"][name]
    ones = [1] * len(samples)
    counts = [len(sample.span_lengths) for sample in samples]
    masked = [sum(sample.span_lengths) for sample in samples]
    ratios = [sum(sample.span_lengths) / sample.text_length for sample in samples]
    assert_same_share(ratios, ones, published["mean_masked_ratio"], bunch)
    assert np.std(ratios) == pytest.approx(published["std_masked_ratio"], rel=0.1)
    assert_same_share(counts, ones, published["mean_spans_per_sample"], bunch)
    assert_same_share(masked, counts, published["mean_span_length"], bunch)
    sequence_lengths = [sample.sequence_length for sample in samples]
    assert_same_share(sequence_lengths, ones, published["mean_sequence_length"], bunch)
    assert_same_histogram(counts, published["span_count_hist"], bunch)
    if isinstance(published["span_length_hist"], dict):
        lengths = [length for sample in samples for length in sample.span_lengths]
        assert_same_histogram(lengths, published["span_length_hist"])
    several = published["samples_ok"] - published["span_count_hist"].get("1", 0)
    assert_same_order(samples, published["share_not_left_to_right_among_multi_span"], several)
    hidden = [sample.hidden_answer for sample in samples]
    assert_same_share(hidden, masked, published["dblock_share_of_target_tokens"], bunch)
    hidden = [sample.hidden_context for sample in samples]
    contexts = [sample.context_length for sample in samples]
    assert_same_share(hidden, contexts, published["dblock_share_of_source_tokens"], bunch)
    if "generation_length" in published:
        generated = [sum(sample.span_lengths) for sample in samples if sample.objective == "document"]
        assert_same_share(generated, [1] * len(generated), published["generation_length"]["mean"], bunch)


def mixture_of(kwargs: Mapping[str, Any]) -> Mixture:
    token, sentence = kwargs["bert_prob"], kwargs.get("gap_sentence_prob", 0.0)
    return Mixture(
        SPECIAL,
        SENTENCE_ENDS,
        token=token,
        sentence=sentence,
        document=1 - token - sentence,
        min_ratio=kwargs.get("gpt_min_ratio", 0.5),
        suffix_prob=kwargs.get("gpt_infill_prob", 0.5),
        single_span_prob=kwargs.get("single_span_prob", 0.0),
        block_mask_prob=kwargs.get("block_mask_prob", 0.0),
        context_mask_ratio=kwargs.get("context_mask_ratio", 0.0),
    )


def draw(name: str, rng: np.random.Generator) -> list[list[Counted]]:
    """SAMPLES rows of a setting; more than one sample where a row was split."""
    setting = STATS["settings"][name]
    tokens = np.array(STATS["inputs"][setting["input"]])
    mixture = mixture_of(setting["kwargs"])
    bunches = []
    for _ in range(SAMPLES):
        rows = [tokens]
        if rng.random() < setting["kwargs"].get("short_seq_prob", 0.0):
            rows = split_short(tokens, row_length=512, sentence_ends=SENTENCE_ENDS, special=SPECIAL, rng=rng)
        examples = [mixture.sample(rows[0], rng)]
        for row in rows[1:]:  # the pieces of a row share its objective
            assert examples[0] is not None
            examples.append(mixture.sample(row, rng, examples[0].objective))
        bunches.append([Counted.of(example) for example in examples if example is not None])
    return bunches


@pytest.mark.parametrize("name", [name for name in STATS["settings"] if name != "sentence/multi_400"])
def test_samples_follow_the_published_law(name: str) -> None:
    bunches = draw(name, np.random.default_rng(1))
    samples = [sample for bunch in bunches for sample in bunch]
    sizes = np.array([len(bunch) for bunch in bunches])
    assert_published(samples, name, bunch=float((sizes**2).sum() / sizes.sum()))
    published = STATS["settings"][name]
    assert len(samples) == pytest.approx(published["samples_ok"], rel=0.06)
    modes = Counter({"token": "bert", "document": "gpt"}.get(b[0].objective, "sentence") for b in bunches)
    table = [[modes[mode], published["modes"][mode]] for mode in published["modes"]]
    assert len(table) == 1 or stats.chi2_contingency(table).pvalue > 0.001


def test_sentences_of_several_documents_follow_the_published_law() -> None:
    # The published code lets a sentence begin with the [CLS] of a later document. Ours does not; given the
    # published sentences, the choice among them has the published law.
    name = "sentence/multi_400"
    tokens = np.array(STATS["inputs"]["multi_400"])
    sentences = find_sentences(tokens, sentence_ends=SENTENCE_ENDS, special=SPECIAL)
    sentences[:, 0] -= (sentences[:, 0] > 1) & (tokens[sentences[:, 0] - 1] == SPECIAL.cls)
    rng = np.random.default_rng(1)
    samples = []
    for _ in range(SAMPLES):
        spans = choose_sentences(sentences, int(0.15 * len(tokens)), rng=rng)
        order = rng.permutation(len(spans))
        example = blank_out(tokens, spans, mask=SPECIAL.smask, special=SPECIAL, objective="sentence", order=order)
        samples.append(Counted.of(example))
    assert_published(samples, name)


@pytest.mark.parametrize("name", ["document_infill_0/single_512", "document_infill_1/single_512"])
def test_generation_lengths_are_uniform(name: str) -> None:
    published = STATS["settings"][name]["generation_length"]["quantiles_0_10_25_50_75_90_100"]
    lengths = [bunch[0].span_lengths[0] for bunch in draw(name, np.random.default_rng(1))]
    shares = np.array([0, 0.1, 0.25, 0.5, 0.75, 0.9, 1])
    error = (published[-1] - published[0]) * np.sqrt(2 * shares * (1 - shares) / SAMPLES)
    assert (abs(np.quantile(lengths, shares) - published) <= 4 * error + 1).all()


def test_the_tests_can_tell_a_wrong_law() -> None:
    # Spans 3% too long, or one sample in fifty left in reading order, do not pass for the published ones.
    name = "token/single_512"
    tokens = np.array(STATS["inputs"]["single_512"])
    rng = np.random.default_rng(1)
    longer = Mixture(SPECIAL, SENTENCE_ENDS, mean_span_length=3.1)
    with pytest.raises(AssertionError):
        assert_published([Counted.of(e) for _ in range(SAMPLES) if (e := longer.sample(tokens, rng, "token"))], name)
    with pytest.raises(AssertionError):
        samples = [bunch[0] for bunch in draw(name, rng)]
        for sample in samples[::50]:
            sample.left_to_right = True
        assert_published(samples, name)
