"""The paper's statements, each held against what was measured.

A verdict comes from confidence intervals over seeds and test images. With fewer than three seeds no
interval covers the randomness of training: the intervals are shown, and nothing is decided.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedsmooth_core.certification.comparison import (
    Difference,
    Ratio,
    Verdict,
    all_of,
    equal_within,
    greater_by,
    paired_difference,
)
from fedsmooth_core.errors import CertificationError, ConfigError
from server.reproduction.figures import (
    ADVERSARIAL,
    ESTIMATORS,
    FIGURES,
    GAMMAS,
    NOISE,
    PAPER,
    SMOOTHADV,
    STANDARD,
    STRONG,
    centralized_label,
    federated_label,
)
from server.reproduction.results import FigureResult, SeriesResult
from server.reproduction.speed import SpeedUp

CLOSE = 0.05
"""Certified accuracies that differ by no more than this are called close."""
MUCH = 0.10
"""A certified accuracy that is larger by more than this is called much better."""
FASTER = 2.0
"""The paper: 2-3 times as fast."""
FEWEST_SEEDS = 3
_CONFIDENCE = 0.95

COHEN = {0.0: 0.75, 0.25: 0.60, 0.5: 0.43, 0.75: 0.27}
"""Certified accuracy, by radius, of the centralised ResNet-110 of Cohen et al. (2019) at sigma 0.25 on
CIFAR-10, n = 100,000."""
COHEN_SIGMA = 0.25

_FEDERATED = {
    *(federated_label(gamma, estimator) for gamma in GAMMAS for estimator in ESTIMATORS),
    *(SMOOTHADV, PAPER, STRONG),
}

Judge = Callable[[Difference], Verdict]
Pair = tuple[str, str, str]
"""What is compared, and the labels of the two series: the first less the second."""


@dataclass(frozen=True)
class Check:
    """A statement, what was measured, and the verdict."""

    statement: str
    """With its margin: what exactly is decided."""
    verdict: str
    """One of :class:`Verdict`."""
    measured: list[str]
    """One comparison a line, with its 95 % interval."""


def checks_of(
    result: FigureResult, others: Sequence[FigureResult], speed: SpeedUp | None
) -> list[Check]:
    """Return the statements that a figure is about, as far as its models are there.

    Args:
        result: the figure.
        others: figures of the same scale, for statements across noise levels.
        speed: how fast the estimators are, if that was measured.
    """
    found = [
        _federated_is_close(result),
        _gamma_makes_no_difference(result),
        _one_point_equals_stochastic(result),
        _one_point_is_faster(result, speed),
        *_larger_sigma_is_lower_but_wider(result, others),
        _adversarial_alone_is_little(result),
        _smoothing_is_much(result),
        *_recipe(result, others),
        _certificates_are_sane(result),
    ]
    return [check for check in found if check is not None]


def checks_in(folder: Path, result: FigureResult) -> list[Check]:
    """Return the checks of a figure, given what else was measured in ``folder`` on the same terms."""
    others = []
    for path in sorted(folder.glob("*.json")):
        if path.stem in FIGURES and path.stem != result.figure:
            try:
                other = FigureResult.load(path)
            except CertificationError:  # whoever asks for that figure hears of it
                continue
            if (other.settings, other.fingerprints) == (result.settings, result.fingerprints):
                others.append(other)
    settings = result.settings
    try:
        speed = SpeedUp.load(folder / "speed.json")
    except (OSError, ConfigError):
        speed = None
    measured_for = (
        settings["model"],
        settings["training_precision"],
        settings["attack_steps"],
        settings["num_noise_vectors"],
        min(settings["batch_size"], settings["samples_per_client"] or settings["batch_size"]),
    )
    return checks_of(result, others, speed if speed and speed.is_of(*measured_for) else None)


def _federated_is_close(result: FigureResult) -> Check | None:
    pairs = [
        (
            f"{federated_label(gamma, estimator)}, less centralised",
            federated_label(gamma, estimator),
            centralized_label(estimator),
        )
        for estimator in ESTIMATORS
        for gamma in GAMMAS
    ]
    statement = f"Federated is close to centralised (not {_points(CLOSE)} below it)"
    return _compared(result, statement, pairs, lambda difference: greater_by(difference, -CLOSE))


def _gamma_makes_no_difference(result: FigureResult) -> Check | None:
    low, high = GAMMAS
    pairs = [
        (
            f"{_name(estimator)}: gamma {high:g}, less gamma {low:g}",
            federated_label(high, estimator),
            federated_label(low, estimator),
        )
        for estimator in ESTIMATORS
    ]
    return _compared(
        result,
        f"Gamma makes no difference (within {_points(CLOSE)})",
        pairs,
        _is_close,
    )


def _one_point_equals_stochastic(result: FigureResult) -> Check | None:
    def labels(of: Callable[[str], str]) -> tuple[str, str]:
        return of("one_point"), of("stochastic")

    pairs = [("centralised: one-point, less stochastic", *labels(centralized_label))]
    pairs += [
        (
            f"gamma {gamma:g}: one-point, less stochastic",
            federated_label(gamma, "one_point"),
            federated_label(gamma, "stochastic"),
        )
        for gamma in GAMMAS
    ]
    return _compared(
        result,
        f"One-point equals stochastic (within {_points(CLOSE)})",
        pairs,
        _is_close,
    )


def _one_point_is_faster(result: FigureResult, speed: SpeedUp | None) -> Check | None:
    if speed is None or result.of(federated_label(GAMMAS[0], "one_point")) is None:
        return None
    verdict = Verdict.NOT_DECIDED
    if speed.training.low >= FASTER:
        verdict = Verdict.HOLDS
    elif speed.training.high < FASTER:
        verdict = Verdict.DOES_NOT_HOLD
    return Check(
        "One-point trains 2-3 times as fast as stochastic (at least twice, whole local training)",
        verdict,
        [
            f"whole local training, T = {speed.attack_steps}, m = {speed.num_noise_vectors}: "
            f"{_times(speed.training)}; {speed.clients} clients at once, "
            f"{1000 * speed.stochastic_step_seconds:.1f} against "
            f"{1000 * speed.one_point_step_seconds:.1f} ms a local step of B = {speed.batch_size}",
            f"the attack alone, of one client, outside the engine: {_times(speed.attack)}",
            f"on {'a CPU' if speed.device == 'cpu' else speed.device}, {speed.threads} threads, "
            f"{speed.model}, {speed.precision}",
        ],
    )


def _larger_sigma_is_lower_but_wider(
    result: FigureResult, others: Sequence[FigureResult]
) -> list[Check]:
    found = []
    seen = {result.sigma}
    for other in others:
        if other.epsilon_255 != result.epsilon_255 or other.sigma in seen:
            continue
        small, large = sorted((result, other), key=lambda one: one.sigma)
        a, b = _main_series(small), _main_series(large)
        if a is None or b is None:
            continue
        pair = _of_common_seeds(b, a)
        if pair is None:
            continue
        seen.add(other.sigma)
        # Beyond what the smaller sigma can certify the larger one wins without a measurement.
        radius = round(0.9 * small.largest_radius, 3)
        what = f"sigma {large.sigma:g}, less sigma {small.sigma:g}"
        lower, line = _judged(what, *pair, 0.0, lambda d: _reversed(greater_by(d)), 2)
        wider, other_line = _judged(what, *pair, radius, greater_by, 2)
        found.append(
            Check(
                f"Larger sigma is lower but wider ({large.sigma:g} against {small.sigma:g}: less at r = 0, "
                f"more at r = {radius:g})",
                all_of([lower, wider]),
                [f"{line}: {lower}", f"{other_line}: {wider}"],
            )
        )
    return found


def _adversarial_alone_is_little(result: FigureResult) -> Check | None:
    return _compared(
        result,
        "Adversarial training alone is not much better than standard training (by no more than "
        f"{_points(MUCH)})",
        [("adversarial alone, less standard", ADVERSARIAL, STANDARD)],
        lambda difference: _reversed(greater_by(difference, MUCH)),
        # Trained without noise both may be at chance under noise, and rightly so: if the others are not.
        (NOISE, SMOOTHADV),
    )


def _smoothing_is_much(result: FigureResult) -> Check | None:
    return _compared(
        result,
        f"Smoothing is much better (than standard training, by more than {_points(MUCH)})",
        [(f"{label}, less standard", label, STANDARD) for label in (NOISE, SMOOTHADV)],
        lambda difference: greater_by(difference, MUCH),
        (NOISE, SMOOTHADV),
    )


def _recipe(result: FigureResult, others: Sequence[FigureResult]) -> list[Check]:
    ours, theirs = result.of(STRONG), result.of(PAPER)
    if ours is None or theirs is None:
        return []
    pair = _of_common_seeds(ours, theirs)
    if pair is None:
        return []
    a, b = pair
    gain = paired_difference(a.certified_radii(), b.certified_radii())
    lines = [
        f"average certified radius: {_signed(gain.estimate, 1, '.4f')} "
        f"[{_signed(gain.low, 1, '.4f')}, {_signed(gain.high, 1, '.4f')}], {_size(gain)}"
    ]
    for radius in (radius for radius in COHEN if radius <= result.largest_radius):
        _, line = _judged("the recipe, less the paper's settings", a, b, radius, greater_by)
        lines.append(line)
    more = Check(
        "The recipe certifies more than the paper's settings at equal rounds (average certified radius)",
        _if_decided(greater_by(gain), gain),
        lines,
    )
    return [more, *([_the_mark_to_beat([result, *others])] if _is_cifar10(result) else [])]


def _is_cifar10(result: FigureResult) -> bool:
    return re.match(r"cifar-?10(?!\d)", result.data, re.IGNORECASE) is not None


def _the_mark_to_beat(results: Sequence[FigureResult]) -> Check:
    found = [
        (one, result)
        for result in results
        if result.sigma == COHEN_SIGMA
        for one in result.series
        if one.models and one.label in _FEDERATED
    ]
    best, result = max(found, key=lambda one: float(one[0].average_certified_radius.mean()))
    lines, verdicts = [], []
    for radius, published in COHEN.items():
        outcomes = best.outcomes(radius)
        theirs = np.full(outcomes.shape, published)
        difference = paired_difference(outcomes, theirs, _CONFIDENCE)
        of_all = paired_difference(outcomes, theirs, 1 - (1 - _CONFIDENCE) / len(COHEN))
        against = f"r = {radius:g}: {100 * outcomes.mean():.1f} % against {100 * published:.0f} %"
        if radius > result.largest_radius:
            verdicts.append(Verdict.NOT_DECIDED)
            lines.append(f"{against} (no certificate of n draws reaches it)")
            continue
        verdicts.append(_if_decided(greater_by(of_all), of_all))
        lines.append(
            f"{against}: {_signed(difference.estimate)} points "
            f"[{_signed(difference.low)}, {_signed(difference.high)}]"
        )
    return Check(
        "The best federated model here beats the published centralised ResNet-110 of Cohen et al. "
        f"(500 images of CIFAR-10, n = 100,000) at sigma {COHEN_SIGMA:g}, at each of its radii",
        all_of(verdicts),
        [f"the best, by average certified radius: {result.figure}, {best.label}", *lines],
    )


def _certificates_are_sane(result: FigureResult) -> Check | None:
    models = [model for one in result.series for model in one.models]
    if not models:
        return None
    largest = max((r or 0.0 for model in models for r in model.radii), default=0.0)
    cap = result.largest_radius
    is_sane = largest <= cap
    lines = [
        f"largest certified radius {largest:.4f}, sigma Phi^-1(alpha^(1/n)) = {cap:.4f}, "
        f"{len(models)} models",
        "certified accuracy falls with r: it counts the images whose radius is r or more",
    ]
    if idle := sum(model.idle_rounds for model in models):
        lines.append(f"rounds that left a model as it was, for want of good replies: {idle}")
    attacks = [found for model in models for found in model.attack or ()]
    for radius in sorted({found["radius"] for found in attacks}):
        at_radius = [found for found in attacks if found["radius"] == radius]
        certified = sum(found["num_certified"] for found in at_radius)
        broken = sum(len(found["broken"]) for found in at_radius)
        refuted = sum(len(found["broken_beyond_sampling_error"]) for found in at_radius)
        is_sane &= refuted == 0
        empirical = np.mean([found["empirical_accuracy"] for found in at_radius])
        accuracy = np.mean([found["certified_accuracy"] for found in at_radius])
        lines.append(
            f"under attack at r = {radius:g}: {len(at_radius)} models, on average {100 * empirical:.1f} % "
            f"right, {100 * accuracy:.1f} % certified; of {certified} certificates {broken} broken, "
            f"{refuted} beyond sampling error"
        )
    verdict = Verdict.HOLDS if is_sane else Verdict.DOES_NOT_HOLD
    if is_sane and not any(found["num_certified"] for found in attacks):
        verdict = Verdict.NOT_DECIDED
        lines.append("no certificate was attacked")
    return Check("The certificates pass the sanity checks", verdict, lines)


def _compared(
    result: FigureResult,
    statement: str,
    pairs: Sequence[Pair],
    judge: Judge,
    witnesses: Sequence[str] = (),
) -> Check | None:
    """Judge a statement by its pairs of series at r = sigma; None if no pair is there.

    It holds if all pairs do: one that is missing leaves it undecided. It does not hold if one of them does
    not, each judged at a confidence that keeps the chance of that being wrong to 5 % for all together.
    Where no model certifies more than about chance nothing can be told.

    Args:
        result: the figure.
        statement: what is said.
        pairs: at least one.
        judge: of one difference.
        witnesses: labels of series that tell, beside the pair's own, whether models have learned anything.
    """
    lines, verdicts = [], []
    others = [one for label in witnesses if (one := result.of(label)) is not None]
    for what, first, second in pairs:
        a, b = result.of(first), result.of(second)
        pair = None if a is None or b is None else _of_common_seeds(a, b)
        if pair is None:
            lines.append(f"{what}: not there yet")
            verdicts.append(Verdict.NOT_DECIDED)
            continue
        verdict, line = _judged(what, *pair, result.sigma, judge, len(pairs))
        most = max(float(one.outcomes(result.sigma).mean()) for one in (*pair, *others))
        if result.sigma > result.largest_radius:
            verdict, line = (
                Verdict.NOT_DECIDED,
                f"{line} (no certificate of n draws reaches this radius)",
            )
        elif most <= _floor(result):
            verdict, line = Verdict.NOT_DECIDED, f"{line} (too near to chance to tell)"
        lines.append(f"{line}: {verdict}" if len(pairs) > 1 else line)
        verdicts.append(verdict)
    if all(line.endswith("not there yet") for line in lines):
        return None
    return Check(statement, all_of(verdicts), lines)


def _judged(
    what: str, a: SeriesResult, b: SeriesResult, radius: float, judge: Judge, num_pairs: int = 1
) -> tuple[Verdict, str]:
    """Judge the difference of two series of the same seeds, and say it with its 95 % interval."""
    first, second = a.outcomes(radius), b.outcomes(radius)
    difference = paired_difference(first, second, _CONFIDENCE)
    of_all = paired_difference(first, second, 1 - (1 - _CONFIDENCE) / num_pairs)
    verdict = judge(difference)
    why = ""
    if verdict == Verdict.DOES_NOT_HOLD and judge(of_all) != verdict:
        verdict, why = (
            Verdict.NOT_DECIDED,
            f" (not at the confidence that {num_pairs} comparisons need)",
        )
    elif difference.num_seeds < FEWEST_SEEDS:
        verdict, why = Verdict.NOT_DECIDED, f" (fewer than {FEWEST_SEEDS} seeds)"
    line = (
        f"{what}, at r = {radius:g}: {100 * first.mean():.1f} against {100 * second.mean():.1f} %, "
        f"{_signed(difference.estimate)} points "
        f"[{_signed(difference.low)}, {_signed(difference.high)}], {_size(difference)}{why}"
    )
    return verdict, line


def _of_common_seeds(a: SeriesResult, b: SeriesResult) -> tuple[SeriesResult, SeriesResult] | None:
    common = {model.seed for model in a.models} & {model.seed for model in b.models}
    if not common:
        return None
    first, second = (
        SeriesResult(one.label, one.settings, [m for m in one.models if m.seed in common])
        for one in (a, b)
    )
    return first, second


def _floor(result: FigureResult) -> float:
    """What a constant answer certifies, and a margin: below it models are alike in knowing nothing."""
    return 1 / result.num_classes + CLOSE


def _main_series(result: FigureResult) -> SeriesResult | None:
    """Return SmoothAdv of the paper's homogeneous federation, whatever its figure calls it."""
    return result.of(federated_label(GAMMAS[0], "stochastic")) or result.of(SMOOTHADV)


def _if_decided(verdict: Verdict, difference: Difference) -> Verdict:
    return verdict if difference.num_seeds >= FEWEST_SEEDS else Verdict.NOT_DECIDED


def _reversed(verdict: Verdict) -> Verdict:
    turned = {Verdict.HOLDS: Verdict.DOES_NOT_HOLD, Verdict.DOES_NOT_HOLD: Verdict.HOLDS}
    return turned.get(verdict, verdict)


def _is_close(difference: Difference) -> Verdict:
    return equal_within(difference, CLOSE)


def _size(difference: Difference) -> str:
    seeds = "1 seed" if difference.num_seeds == 1 else f"{difference.num_seeds} seeds"
    return f"{seeds} x {difference.num_images} images"


def _times(ratio: Ratio) -> str:
    return f"{ratio.estimate:.2f} x [{ratio.low:.2f}, {ratio.high:.2f}], {ratio.num_pairs} pairs"


def _signed(value: float, factor: float = 100, digits: str = ".1f") -> str:
    return f"{factor * value:+{digits}}"


def _points(share: float) -> str:
    return f"{100 * share:g} points"


def _name(estimator: str) -> str:
    return estimator.replace("_", "-")
