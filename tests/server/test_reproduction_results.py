"""From finished models to a figure: what is gathered, which statements hold, what is drawn and written."""

import contextlib
import io
import json
import re
from dataclasses import replace

import pytest
from matplotlib.axes import Axes
from rich.console import Console

from fedsmooth_core.certification.comparison import Ratio, Verdict
from fedsmooth_core.certification.row_format import HEADER, CertifiedRow, format_row
from fedsmooth_core.certification.rows import parameters_path
from fedsmooth_core.data import load_dataset
from fedsmooth_core.durable import try_lock
from fedsmooth_core.errors import CertificationError, ConfigError, TrainingError
from server.report import rows_sha256
from server.reproduction import reproduce as command
from server.reproduction import tasks
from server.reproduction.checks import CLOSE, COHEN, MUCH, checks_in, checks_of
from server.reproduction.drawing import draw, title
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
from server.reproduction.page import markdown, page_of, print_figure, table_radii
from server.reproduction.plan import make_plan, results_folder
from server.reproduction.reproduce import reproduce
from server.reproduction.results import (
    FigureResult,
    ModelResult,
    SeriesResult,
    gather,
    refuse_other_data,
)
from server.reproduction.speed import SpeedUp
from server.reproduction.tasks import Attacking, Certifying, Training
from server.reproduction.timing import Log

HOLDS, DOES_NOT_HOLD, NOT_DECIDED = Verdict.HOLDS, Verdict.DOES_NOT_HOLD, Verdict.NOT_DECIDED
NUM_IMAGES = 500
SETTINGS = {
    "model": "alexnet",
    "init": "he",
    "num_clients": 100,
    "samples_per_client": 500,
    "cohort": 10,
    "num_rounds": 20,
    "local_steps": 20,
    "batch_size": 30,
    "learning_rate": 0.01,
    "momentum": 0.9,
    "weight_decay": 0.0,
    "num_noise_vectors": 2,
    "attack_steps": 2,
    "step_rule": "gradient",
    "step_size": 0.01,
    "training_precision": "bfloat16",
    "n0": 100,
    "n": 1000,
    "alpha": 0.001,
    "variance_reduction": "none",
    "loss": "smoothed",
    "flip": False,
    "crop_padding": 0,
    "over_selection": 0.0,
    "aggregation.rule": "fedavg",
    "aggregation.trimmed-fraction": 0.2,
    "aggregation.num-malicious": 1,
    "num_images": 500,
    "certification_precision": "bfloat16",
    "radius_step": 0.25,
}
MACHINE = {
    "cpu": ["A CPU"],
    "cpu_count": [2],
    "gpu": [None, "A GPU"],
    "python": ["3.12"],
    "versions": [{"torch": "2.9", "flwr": "1.41", "numpy": "2.3"}],
}
ATTACK = {
    "radius": 0.25,
    "empirical_accuracy": 0.5,
    "confidence_interval_95": [0.4, 0.6],
    "certified_accuracy": 0.25,
    "num_certified": 25,
    "broken": [],
    "broken_beyond_sampling_error": [],
}
FEDERATED = [federated_label(gamma, estimator) for gamma in GAMMAS for estimator in ESTIMATORS]
CENTRALIZED = [centralized_label(estimator) for estimator in ESTIMATORS]


def model(radii, seed, attack=None):
    return ModelResult(
        seed=seed,
        radii=radii,
        rows_sha256="0" * 64,
        clean_accuracy=0.5,
        noisy_accuracy=0.4,
        idle_rounds=0,
        train_seconds=60.0 + seed,
        certify_seconds=10.0,
        git_revisions=["abcdef0123456789-dirty"],
        attack=attack,
    )


def series(label, *shares, seeds=(0, 1, 2)):
    """A curve of which (share, radius) of the images are certified up to a radius, for all seeds alike."""
    radii = [radius for share, radius in shares for _ in range(round(share * NUM_IMAGES))]
    radii += [None] * (NUM_IMAGES - len(radii))
    return SeriesResult(label, [], [model(radii, seed) for seed in seeds])


def figure(name, *found, sigma=0.25, epsilon_255=128.0, data="digits", **settings):
    return FigureResult(
        figure=name,
        scale="cpu",
        data=data,
        command=f"fedsmooth reproduce {name} --scale cpu",
        sigma=sigma,
        epsilon_255=epsilon_255,
        fingerprints=["of training", "of test"],
        num_classes=10,
        settings=SETTINGS | settings,
        machine=MACHINE,
        series=list(found),
    )


def comparison(name="fig1", sigma=0.25, epsilon_255=128.0, seeds=(0, 1, 2), **shares):
    """A figure in which 40 % of the images are certified at twice sigma, but for the labels named."""
    found = [
        series(label, (shares.get("others", 0.4), 2 * sigma), seeds=seeds)
        for label in [series.label for series in FIGURES[name].series]
    ]
    return figure(name, *found, sigma=sigma, epsilon_255=epsilon_255)


def with_share(result, label, share):
    """The figure, with another share of certified images in one of its curves."""
    changed = [
        series(one.label, (share, 2 * result.sigma), seeds=[m.seed for m in one.models])
        if one.label == label
        else one
        for one in result.series
    ]
    return replace(result, series=changed)


def without(result, *labels):
    """The figure before any model of these curves is there."""
    return replace(
        result,
        series=[replace(one, models=[]) if one.label in labels else one for one in result.series],
    )


def ablation(seeds=(0, 1, 2), **shares):
    """Figure 3, in which the curves certify so much."""
    shares = {"standard": 0.1, "adversarial": 0.1, "noise": 0.4, "smoothadv": 0.4} | shares
    labels = {"standard": STANDARD, "adversarial": ADVERSARIAL, "noise": NOISE}
    labels["smoothadv"] = SMOOTHADV
    found = [series(labels[key], (share, 0.5), seeds=seeds) for key, share in shares.items()]
    return figure("fig3", *found)


def speed_up(low, high, estimate=2.5):
    ratio = Ratio(estimate, low, high, 7, 0.95)
    return SpeedUp(
        training=ratio,
        attack=Ratio(4.0, 3.9, 4.1, 7, 0.95),
        stochastic_step_seconds=0.1,
        one_point_step_seconds=0.04,
        attack_steps=2,
        num_noise_vectors=2,
        batch_size=30,
        model="alexnet",
        precision="bfloat16",
        device="cpu",
        threads=2,
        clients=2,
    )


def found(result, statement, others=(), speed=None):
    """All checks of a figure that begin so."""
    return [
        check for check in checks_of(result, others, speed) if check.statement.startswith(statement)
    ]


def verdict(result, statement, others=(), speed=None):
    (check,) = found(result, statement, others, speed)
    return check.verdict


# The paper's statements


@pytest.mark.parametrize("label", FEDERATED)
@pytest.mark.parametrize(
    ("share", "wanted"),
    [(0.38, HOLDS), (0.8, HOLDS), (0.30, DOES_NOT_HOLD), (0.35, NOT_DECIDED)],
)
def test_federated_is_close_if_none_is_much_below_its_centralized(label, share, wanted):
    result = with_share(comparison(), label, share)
    assert verdict(result, "Federated is close to centralised (not 5 points below") == wanted
    (check,) = found(result, "Federated is close")
    assert len(check.measured) == 4


def test_federated_is_held_against_the_centralized_of_its_own_estimator():
    result = comparison()
    for label in (
        centralized_label("stochastic"),
        federated_label(0.1, "stochastic"),
        federated_label(0.5, "stochastic"),
    ):
        result = with_share(result, label, 0.7)
    assert verdict(result, "Federated is close") == HOLDS
    assert verdict(result, "One-point equals stochastic") == DOES_NOT_HOLD
    assert verdict(result, "Gamma makes no difference") == HOLDS


@pytest.mark.parametrize(
    ("share", "wanted"),
    [
        (0.4, HOLDS),
        (0.38, HOLDS),
        (0.42, HOLDS),
        (0.30, DOES_NOT_HOLD),
        (0.50, DOES_NOT_HOLD),
        (0.35, NOT_DECIDED),
        (0.45, NOT_DECIDED),
    ],
)
def test_gamma_and_estimator_make_no_difference_within_a_margin_either_way(share, wanted):
    assert CLOSE == 0.05
    for label in FEDERATED:
        result = with_share(comparison(), label, share)
        assert verdict(result, "Gamma makes no difference (within 5 points)") == wanted
        assert verdict(result, "One-point equals stochastic (within 5 points)") == wanted
    for label in CENTRALIZED:
        result = with_share(comparison(), label, share)
        assert verdict(result, "Gamma makes no difference") == HOLDS
        assert verdict(result, "One-point equals stochastic") == wanted


def test_what_was_measured_is_said_with_its_interval():
    result = with_share(comparison(), federated_label(0.5, "stochastic"), 0.3)
    (check,) = found(result, "Gamma makes no difference")
    first, second = check.measured
    assert first.startswith(
        "stochastic: gamma 0.5, less gamma 0.1, at r = 0.25: 30.0 against 40.0 %, -10.0 points [-1"
    )
    assert first.endswith("], 3 seeds x 500 images: does not hold")
    assert "one-point: gamma 0.5, less gamma 0.1, at r = 0.25: 40.0 against 40.0 %, +0.0" in second
    assert second.endswith(": holds")


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (2.2, 2.8, HOLDS),
        (2.0, 2.8, HOLDS),
        (3.2, 3.8, HOLDS),
        (1.9, 2.1, NOT_DECIDED),
        (1.9, 2.0, NOT_DECIDED),
        (1.4, 1.6, DOES_NOT_HOLD),
    ],
)
def test_one_point_is_faster_if_it_takes_half_as_long(low, high, wanted):
    speed = speed_up(low, high)
    assert verdict(comparison(), "One-point trains 2-3 times as fast", speed=speed) == wanted
    (check,) = found(comparison(), "One-point trains", speed=speed)
    assert f"2.50 x [{low:.2f}, {high:.2f}], 7 pairs" in check.measured[0]
    assert (
        "the attack alone, of one client, outside the engine: 4.00 x [3.90, 4.10], 7 pairs"
        in check.measured[1]
    )


def test_the_speed_belongs_to_figures_with_both_estimators_once_it_is_measured():
    assert not found(comparison(), "One-point trains")
    assert not found(ablation(), "One-point trains", speed=speed_up(2.2, 2.8))


def two_sigmas(small, large, seeds=(0, 1, 2)):
    """Figures 1 and 2; of each a share certified at 0.1 and a share at 0.6."""
    label = federated_label(0.1, "stochastic")
    return (
        figure("fig1", series(label, (small[0], 0.1), (small[1], 0.6), seeds=seeds)),
        figure("fig2", series(label, (large[0], 0.1), (large[1], 0.6), seeds=seeds), sigma=0.5),
    )


@pytest.mark.parametrize(
    ("small", "large", "wanted"),
    [
        ((0.5, 0.1), (0.2, 0.2), HOLDS),
        ((0.4, 0.2), (0.3, 0.1), DOES_NOT_HOLD),  # lower, not wider
        ((0.4, 0.1), (0.4, 0.2), DOES_NOT_HOLD),  # wider, not lower
        ((0.4, 0.2), (0.4, 0.2), NOT_DECIDED),
        ((0.5, 0.1), (0.495, 0.1), NOT_DECIDED),
    ],
)
def test_larger_sigma_is_less_at_radius_0_and_more_far_out(small, large, wanted):
    one, other = two_sigmas(small, large)
    for result, others in ((one, [other]), (other, [one])):
        statement = (
            "Larger sigma is lower but wider (0.5 against 0.25: less at r = 0, more at r = 0.554)"
        )
        assert verdict(result, statement, others) == wanted
    (check,) = found(one, "Larger sigma", [other])
    assert "sigma 0.5, less sigma 0.25, at r = 0: " in check.measured[0]
    assert "sigma 0.5, less sigma 0.25, at r = 0.554: " in check.measured[1]


def test_larger_sigma_is_said_once_for_each_other_sigma_at_equal_epsilon():
    result = comparison("fig1")
    others = [
        comparison("fig10", epsilon_255=256.0),
        comparison("fig2", sigma=0.5),
        replace(ablation(), figure="fig3"),
        replace(ablation(), figure="fig4", sigma=0.5),
        comparison("fig5", sigma=0.12),
        comparison("fig6", sigma=0.12, epsilon_255=64.0),
        figure("strong", series(PAPER, (0.4, 0.5)), series(STRONG, (0.4, 0.5)), sigma=0.5),
    ]
    checks = found(result, "Larger sigma", others)
    assert [check.statement.partition(":")[0].partition("(")[2] for check in checks] == [
        "0.5 against 0.25",
        "0.25 against 0.12",
    ]
    # Where figure 2 has no such model yet, figure 4 has.
    others[1] = without(others[1], federated_label(0.1, "stochastic"))
    assert len(found(result, "Larger sigma", others)) == 2
    assert len(found(ablation(), "Larger sigma", others)) == 2
    assert not found(without(result, federated_label(0.1, "stochastic")), "Larger", others)
    other_epsilon = comparison("fig8", sigma=0.5, epsilon_255=64.0)
    assert not found(result, "Larger sigma", [other_epsilon])


def test_what_one_pair_of_several_is_judged_by_is_a_wider_interval():
    """Else the more pairs, the likelier that one does not hold by chance."""
    (check,) = found(with_share(comparison(), FEDERATED[0], 0.326), "Gamma makes")
    # Its own interval is beyond the margin, but not far enough for one of two.
    assert re.search(
        r"\[\+5\.\d, \+9\.\d\], 3 seeds x 500 images \(not at the confidence .*: not decided$",
        check.measured[0],
    )
    assert check.verdict == NOT_DECIDED


def test_where_next_to_nothing_is_certified_nothing_can_be_told():
    few = comparison()
    for label in CENTRALIZED + FEDERATED:
        few = with_share(few, label, 0.14)  # a constant answer certifies 10 % of ten classes
    for statement in ("Federated is close", "Gamma makes", "One-point equals"):
        (check,) = found(few, statement)
        assert check.verdict == NOT_DECIDED
        assert all("(too near to chance to tell): not decided" in m for m in check.measured)
    # With a few draws no radius of sigma can be certified, whatever the model.
    (check,) = found(replace(comparison(), settings=SETTINGS | {"n": 30}), "Gamma makes")
    assert check.verdict == NOT_DECIDED
    assert "(no certificate of n draws reaches this radius): not decided" in check.measured[0]


@pytest.mark.parametrize(
    ("share", "wanted"),
    [(0.1, HOLDS), (0.05, HOLDS), (0.15, HOLDS), (0.2, NOT_DECIDED), (0.3, DOES_NOT_HOLD)],
)
def test_adversarial_training_alone_is_little(share, wanted):
    assert MUCH == 0.1
    result = ablation(adversarial=share)
    assert verdict(result, "Adversarial training alone is not much better") == wanted


@pytest.mark.parametrize(
    ("share", "wanted"), [(0.4, HOLDS), (0.2, NOT_DECIDED), (0.12, DOES_NOT_HOLD)]
)
@pytest.mark.parametrize("which", ["noise", "smoothadv"])
def test_smoothing_is_much(which, share, wanted):
    assert verdict(ablation(**{which: share}), "Smoothing is much better") == wanted


def recipe(ours, theirs=(0.4, 0.3), data="CIFAR-10", seeds=(0, 1, 2), **settings):
    found = [series(PAPER, theirs, seeds=seeds), series(STRONG, ours, seeds=seeds)]
    return figure("strong", *found, data=data, **settings)


@pytest.mark.parametrize(
    ("ours", "wanted"),
    [((0.4, 0.5), HOLDS), ((0.4, 0.2), DOES_NOT_HOLD), ((0.4, 0.3), NOT_DECIDED)],
)
def test_the_recipe_has_a_larger_average_certified_radius(ours, wanted):
    assert verdict(recipe(ours), "The recipe certifies more") == wanted
    (check,) = found(recipe((0.4, 0.5)), "The recipe certifies more")
    assert check.measured[0].startswith("average certified radius: +0.0800 [+0.0")
    # n = 1,000 reaches 0.615, so not the last of the published radii.
    assert [line.partition("r = ")[2][:4] for line in check.measured[1:]] == [
        "0: 4",
        "0.25",
        "0.5:",
    ]


def test_the_mark_to_beat_is_at_each_published_radius():
    mark = "The best federated model here beats the published"
    beats = recipe((0.9, 0.8), n=100_000)
    assert verdict(beats, mark) == HOLDS
    assert verdict(recipe((0.9, 0.8)), mark) == NOT_DECIDED  # n = 1,000 does not reach the last one
    assert verdict(recipe((0.9, 0.6), n=100_000), mark) == DOES_NOT_HOLD
    assert verdict(recipe((0.27, 0.8), n=100_000), mark) == DOES_NOT_HOLD
    # Whichever is the best.
    assert verdict(recipe((0.3, 0.6), (0.9, 0.8), n=100_000), mark) == HOLDS
    (check,) = found(recipe((0.3, 0.6), (0.9, 0.8)), mark)
    assert check.measured[0] == f"the best, by average certified radius: strong, {PAPER}"
    assert [
        f"against {100 * published:.0f} %" in line
        for published, line in zip(COHEN.values(), check.measured[1:], strict=True)
    ] == [True] * 4
    assert check.measured[-1].endswith("(no certificate of n draws reaches it)")


@pytest.mark.parametrize(
    ("data", "is_there"),
    [
        ("cifar10", True),
        ("CIFAR-10", True),
        ("CIFAR-10 as JPEG files", True),
        ("cifar10, 8-bit", True),
        ("cifar100", False),
        ("CIFAR-100", False),
        ("digits", False),
        ("svhn", False),
    ],
)
def test_there_is_a_mark_to_beat_for_cifar_10_alone(data, is_there):
    checks = found(recipe((0.4, 0.5), data=data), "The best federated model here")
    assert bool(checks) == is_there


# When nothing can be decided


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_with_fewer_than_three_seeds_nothing_is_decided(seeds):
    clear = [
        comparison(seeds=seeds),
        with_share(comparison(seeds=seeds), federated_label(0.5, "one_point"), 0.1),
        ablation(seeds=seeds),
        ablation(seeds=seeds, noise=0.0, adversarial=0.9),
        recipe((0.9, 0.9), (0.2, 0.2), seeds=seeds, n=100_000),
        *two_sigmas((0.5, 0.1), (0.2, 0.2), seeds),
    ]
    for result in clear:
        others = [other for other in clear[-2:] if other.figure != result.figure]
        checks = checks_of(result, others, None)
        assert len(checks) >= 2
        for check in checks:
            is_sanity = check.statement.startswith("The certificates pass")
            assert check.verdict == NOT_DECIDED, check
            assert is_sanity or "points [" in check.measured[-1]


def test_seeds_that_vary_decide_nothing_that_one_of_them_would():
    result = with_share(comparison(), federated_label(0.1, "stochastic"), 0.42)
    low = series("", (0.2, 0.5)).models[0]
    varied = [
        replace(one, models=[*one.models[:2], replace(low, seed=2)])
        if one.label == federated_label(0.1, "stochastic")
        else one
        for one in result.series
    ]
    assert verdict(result, "Gamma makes no difference") == HOLDS
    assert verdict(replace(result, series=varied), "Gamma makes no difference") == NOT_DECIDED


def test_a_figure_that_is_not_finished_says_what_it_can():
    result = comparison()
    assert checks_of(without(result, *CENTRALIZED, *FEDERATED), [], None) == []
    one_curve = without(result, *CENTRALIZED, *FEDERATED[1:])
    assert [check.statement for check in checks_of(one_curve, [], None)] == [
        "The certificates pass the sanity checks"
    ]
    half = without(result, *(label for label in CENTRALIZED + FEDERATED if "one-point" in label))
    (check,) = found(half, "Federated is close")
    assert check.verdict == NOT_DECIDED  # two of four are missing
    verdicts = [line.rpartition(": ")[2] for line in check.measured]
    assert verdicts == ["holds", "holds", "not there yet", "not there yet"]
    # But what does not hold does not need them.
    assert verdict(with_share(half, FEDERATED[0], 0.1), "Federated is close") == DOES_NOT_HOLD
    assert not found(half, "One-point equals stochastic")
    assert not found(half, "One-point trains", speed=speed_up(2.2, 2.8))
    assert not found(without(recipe((0.4, 0.5)), STRONG), "The")[:-1]


def test_only_seeds_that_both_have_are_compared():
    label, other = federated_label(0.1, "stochastic"), federated_label(0.5, "stochastic")
    parts = [series(label, (0.4, 0.5)), series(other, (0.1, 0.5), seeds=(0, 2))]
    (check,) = found(figure("fig1", *parts), "Gamma makes no difference")
    assert check.verdict == NOT_DECIDED
    said = check.measured[0]
    assert said.endswith("2 seeds x 500 images (fewer than 3 seeds): not decided")
    parts[1] = series(other, (0.1, 0.5), seeds=(3,))
    assert not found(figure("fig1", *parts), "Gamma makes no difference")
    parts[1] = series(other, (0.1, 0.5), seeds=(0, 1, 2, 3))
    assert verdict(figure("fig1", *parts), "Gamma makes no difference") == DOES_NOT_HOLD


# The sanity checks


def attacked(*attacks, radius=0.5):
    models = [model([radius, None], 0, list(attacks))]
    return figure("fig1", SeriesResult(CENTRALIZED[0], [], models))


def test_certificates_within_the_cap_that_no_attack_refutes_are_sane():
    broken = ATTACK | {"broken": [3]}  # as alpha and a classification by few draws allow
    result = attacked(ATTACK, broken | {"radius": 0.5}, radius=0.6151)
    (check,) = found(result, "The certificates pass")
    assert check.verdict == HOLDS
    assert result.largest_radius == pytest.approx(0.25 * 2.4615, abs=1e-3)
    assert check.measured[0].startswith("largest certified radius 0.6151, sigma Phi^-1")
    assert "at r = 0.25: 1 models, on average 50.0 % right, 25.0 % certified" in check.measured[2]
    assert check.measured[3].endswith("of 25 certificates 1 broken, 0 beyond sampling error")


def test_rounds_that_changed_nothing_are_said():
    result = attacked(ATTACK)
    assert not any("rounds that left" in line for line in checks_of(result, [], None)[0].measured)
    result.series[0].models[0] = replace(result.series[0].models[0], idle_rounds=3)
    (check,) = found(result, "The certificates pass")
    assert check.measured[2].endswith("for want of good replies: 3")


def test_a_radius_at_the_cap_is_sane_and_none_beyond_it():
    cap = attacked().largest_radius
    for radius, wanted in [(cap, HOLDS), (cap - 1e-6, HOLDS), (cap + 1e-9, DOES_NOT_HOLD)]:
        assert verdict(attacked(ATTACK, radius=radius), "The certificates pass") == wanted


@pytest.mark.parametrize("statement", ["Adversarial training alone", "Smoothing is much better"])
def test_an_ablation_of_models_that_know_nothing_decides_nothing(statement):
    shares = dict.fromkeys(("standard", "adversarial", "noise", "smoothadv"), 0.1)
    assert verdict(ablation(**shares), statement) == NOT_DECIDED
    # One curve that knows something tells that the others could have learned it.
    assert verdict(ablation(**shares | {"noise": 0.4}), statement) != NOT_DECIDED


@pytest.mark.parametrize(
    "result",
    [
        attacked(radius=0.6175),
        attacked(ATTACK | {"broken": [3], "broken_beyond_sampling_error": [3]}),
        attacked(ATTACK, ATTACK | {"radius": 0.5, "broken_beyond_sampling_error": [1, 2]}),
    ],
)
def test_what_cannot_be_is_not_sane(result):
    assert verdict(result, "The certificates pass the sanity checks") == DOES_NOT_HOLD


# As JSON


def test_results_are_read_back_as_they_were_written(tmp_path):
    result = without(comparison(), FEDERATED[0])
    result.series[0].models[0] = model([0.123456, None, 0.0], 0, [ATTACK])
    result.save(tmp_path / "fig1.json")
    assert FigureResult.load(tmp_path / "fig1.json") == result
    text = (tmp_path / "fig1.json").read_text()
    # A model on one line: what is kept in a repository is read line by line.
    assert sum('"seed":' in line for line in text.splitlines()) == text.count('"seed":') == 15
    bare = figure("fig3")
    bare.save(tmp_path / "fig3.json")
    assert FigureResult.load(tmp_path / "fig3.json") == bare


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[1, 2]",
        lambda text: "null",
        lambda text: text.replace('"series"', '"curves"'),
        lambda text: text.replace('"seed"', '"sead"', 1),
        lambda text: text.replace('"label"', '"name"', 1),
        lambda text: text.replace('"sigma"', '"sigmo"', 1),
        lambda text: text.replace('"momentum"', '"momemtum"', 1),
        lambda text: text.replace('"models": [', '"models": [5, ', 1),
        lambda text: "\xff",
    ],
)
def test_a_damaged_file_is_one_sentence(tmp_path, damage):
    path = tmp_path / "fig1.json"
    comparison().save(path)
    path.write_bytes(damage(path.read_text()).encode("latin-1"))
    with pytest.raises(CertificationError, match="holds no results of a figure") as error:
        FigureResult.load(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


# Gathered from what tasks leave


def train(task, console):
    """Leave what a finished training leaves, without training."""
    run, num_rounds = task.run_directory, task.config.federation.num_rounds
    run.path.mkdir(parents=True, exist_ok=True)
    run.record(task.config, "federated")
    for server_round in (1, num_rounds):
        seconds = {"train": 1.5, "evaluate": 9.0}
        accuracy = {"clean-accuracy": server_round / 100, "noisy-accuracy": 0.1}
        line = {"round": server_round, "num_examples": 10, "seconds": seconds}
        run.append_metrics(line | accuracy)
    weights = run.checkpoint(num_rounds)
    weights.parent.mkdir(exist_ok=True)
    weights.touch()
    metadata = {"dataset": {"fingerprint": "of training"}, "model": {"num_classes": 10}}
    sidecar = {"sha256": "of weights", "metadata": metadata}
    weights.with_suffix(".json").write_text(json.dumps(sidecar))


ROWS = [
    CertifiedRow(0, label=1, predict=1, radius=0.1234567, correct=1, time=0.1),
    CertifiedRow(20, label=1, predict=2, radius=0.5, correct=0, time=0.1),
    CertifiedRow(40, label=1, predict=-1, radius=0.0, correct=0, time=0.1),
    CertifiedRow(60, label=3, predict=3, radius=0.0, correct=1, time=0.1),
]


def certify(task, console, rows=ROWS, dataset="of test"):
    task.folder.mkdir(parents=True, exist_ok=True)
    parameters_path(task.rows).write_text(json.dumps({"dataset": dataset}))
    task.rows.write_text("\n".join([HEADER, *map(format_row, rows)]) + "\n")
    summary = {"parameters": {"weights": "of weights"}}
    (task.folder / "summary.json").write_text(json.dumps(summary))


def attack(task, console):
    terms = task.terms
    parameters = {"steps": terms.steps, "draws": terms.draws, "n": terms.n}
    parameters |= {"weights": "of weights", "rows": rows_sha256(task.certified.rows)}
    found = [ATTACK | {"radius": radius} for radius in terms.radii]
    task.result.write_text(json.dumps({"parameters": parameters, "radii": found, "holds": True}))


@pytest.fixture
def instant(monkeypatch):
    """Every task is done at once: nothing is trained, certified, attacked or drawn."""

    def draw_nothing(result, stem):
        for ending in (".png", ".svg"):
            stem.with_suffix(ending).touch()

    monkeypatch.setattr(command, "draw", draw_nothing)
    monkeypatch.setattr(command, "measured_rate", lambda config: 1e9)
    monkeypatch.setattr(command, "refuse_other_data", lambda plans: None)
    monkeypatch.setattr(Training, "run", train)
    monkeypatch.setattr(Certifying, "run", certify)
    monkeypatch.setattr(Attacking, "run", attack)


def planned(root, num_seeds=1):
    (plan,) = make_plan([FIGURES["fig3"]], "cpu", num_seeds, [], root)
    return plan


def test_gathered_is_what_is_finished(tmp_path, console):
    plan, log = planned(tmp_path, num_seeds=2), Log(tmp_path / "tasks.jsonl")
    finished, *begun = (member for members in plan.members.values() for member in members)
    for task in finished.tasks:
        {"train": train, "certify": certify, "attack": attack}[task.title.split()[0]](task, console)
        log.append(task, 100, 7.0)
    train(begun[0].training, console)
    begun[0].certifying.folder.mkdir(parents=True)
    begun[0].certifying.rows.write_text(f"{HEADER}\n{format_row(ROWS[0])}\n")
    result = gather(plan, "cpu", "Digits", "fedsmooth", log)
    assert [(one.label, len(one.models)) for one in result.series] == [
        (SMOOTHADV, 1),
        (NOISE, 0),
        (ADVERSARIAL, 0),
        (STANDARD, 0),
    ]
    assert (result.figure, result.scale, result.data) == ("fig3", "cpu", "Digits")
    assert (result.sigma, result.epsilon_255) == (0.25, pytest.approx(128))
    assert result.fingerprints == ["of training", "of test"]
    assert (result.settings["cohort"], result.settings["n"]) == (10, 1000)
    (one,) = result.of(SMOOTHADV).models
    assert one.seed == 0
    # None where the model is wrong or abstains; a radius of 0 is right.
    assert one.radii == [0.123456, None, None, 0.0]  # rounded down: it claims no more
    assert result.of(SMOOTHADV).outcomes(0).tolist() == [[True, False, False, True]]
    assert result.of(SMOOTHADV).average_certified_radius == pytest.approx([0.123456 / 4])
    assert (one.clean_accuracy, one.noisy_accuracy) == (0.2, 0.1)
    assert (one.train_seconds, one.certify_seconds) == (3.0, 7.0)
    assert one.attack == [ATTACK, ATTACK | {"radius": 0.5}]
    assert len(one.git_revisions) == 1
    assert len(result.machine["cpu"]) == len(result.machine["versions"]) == 1
    assert result.of(NOISE) is None
    assert [one.settings for one in result.series] == [
        [],
        ["attack.attack_steps=0"],
        ["smoothing.sigma=0.0"],
        ["smoothing.sigma=0.0", "attack.attack_steps=0"],
    ]


def test_images_may_be_in_any_order_and_must_be_the_same(tmp_path, console):
    plan, log = planned(tmp_path), Log(tmp_path / "tasks.jsonl")
    first, second = (plan.members[label][0] for label in (SMOOTHADV, NOISE))
    for member in (first, second):
        train(member.training, console)
    certify(first.certifying, console)
    certify(second.certifying, console, ROWS[::-1])
    result = gather(plan, "cpu", "digits", "fedsmooth", log)
    assert result.of(SMOOTHADV).models[0].radii == result.of(NOISE).models[0].radii
    for rows in (ROWS[:3], [*ROWS[:3], replace(ROWS[3], idx=61)]):
        certify(second.certifying, console, rows)
        with pytest.raises(CertificationError, match="not of the same images"):
            gather(plan, "cpu", "digits", "fedsmooth", log)
    # Of the same numbers, but of another data set.
    certify(second.certifying, console, dataset="of another test")
    with pytest.raises(CertificationError, match="are of different images"):
        gather(plan, "cpu", "digits", "fedsmooth", log)


# The command


def run(root, *words, num_seeds=1, failure=None, data=None):
    """Reproduce figures; return what is printed. ``failure`` is what it ends with."""
    console = Console(file=io.StringIO(), width=200)
    ends = contextlib.nullcontext()
    if failure is not None:
        ends = pytest.raises(TrainingError, match=failure)
    with ends:
        reproduce(words, "cpu", num_seeds, root, data, False, console)
    return console.file.getvalue()


def test_a_figure_is_made_and_a_second_time_nothing_is_left(tmp_path, instant):
    text = run(tmp_path, "fig3")
    assert "12 tasks left" in text
    assert "holds  The certificates pass the sanity checks" in text
    folder = results_folder(tmp_path, "cpu")
    assert {path.name for path in folder.iterdir()} == {"fig3.json", "fig3.png", "fig3.svg"}
    assert "### Figure 3" in (tmp_path / "results.md").read_text()
    done = (tmp_path / "tasks.jsonl").read_text()
    assert done.count("\n") == 12
    text = run(tmp_path, "fig3")
    assert "Nothing is left to train or certify." in text
    assert "holds  The certificates pass the sanity checks" in text
    assert (tmp_path / "tasks.jsonl").read_text() == done


def test_figures_share_models_and_speak_of_each_other(tmp_path, instant):
    run(tmp_path, "fig3")
    text = run(tmp_path, "fig4", "fig3")
    assert "10 tasks left" in text
    assert text.count("Larger sigma is lower but wider (0.5 against 0.25") == 2


def test_more_seeds_are_added_to_what_is_there(tmp_path, instant):
    run(tmp_path, "fig3")
    text = run(tmp_path, "fig3", num_seeds=3)
    assert "16 tasks left" in text
    assert re.search(r"fig3 +3 +SmoothAdv", text)
    assert text.count("3 seeds x 4 images") == 3


def test_the_name_of_the_data_stays_and_the_command_makes_all_of_the_figure(tmp_path, instant):
    path = results_folder(tmp_path, "cpu") / "fig3.json"
    run(tmp_path, "fig3", "training.momentum=0.5", num_seeds=2, data="My digits")
    wanted = (
        "fedsmooth reproduce fig3 --scale cpu --seeds 2 --data 'My digits' training.momentum=0.5"
    )
    for _ in range(2):
        result = FigureResult.load(path)
        assert (result.data, result.command) == ("My digits", wanted)
        # Another process, that says less: what is shown is still of two seeds.
        run(tmp_path, "fig4", "fig3", "training.momentum=0.5")


def test_what_was_measured_is_not_lost(tmp_path, instant):
    path = results_folder(tmp_path, "cpu") / "fig3.json"
    run(tmp_path, "fig3", num_seeds=2)
    done = path.read_bytes()
    with pytest.raises(ConfigError, match=r"was measured with other settings, namely n=500 \(was"):
        run(tmp_path, "fig3", "certification.n=500")
    member = planned(tmp_path, num_seeds=2).members[NOISE][1]
    (member.certifying.folder / "summary.json").unlink()
    lost = r"shows a model that would be lost \(.*, seed 1\).* give --seeds 2 or more"
    for num_seeds in (1, 2):
        with pytest.raises(ConfigError, match=lost):
            run(tmp_path, "fig3", num_seeds=num_seeds)
    assert path.read_bytes() == done
    path.rename(path.with_suffix(".old"))
    assert "1 task left" in run(tmp_path, "fig3", num_seeds=2)
    assert len(FigureResult.load(path).of(NOISE).models) == 2
    # The step of the table's radii is free: nothing else was measured.
    assert "0.1" in run(tmp_path, "fig3", "certification.radius_step=0.1", num_seeds=2)


def test_models_of_other_images_are_refused_before_anything_is_trained(tmp_path, console):
    overrides = ["dataset=digits", "model=small_cnn", "certification.num_images=4"]
    (plan,) = make_plan([FIGURES["fig3"]], "cpu", 1, overrides, tmp_path)
    refuse_other_data([plan])
    member = plan.members[NOISE][0]
    train(member.training, console)
    with pytest.raises(ConfigError, match=f"{member.training.name} is of other images than digits"):
        refuse_other_data([plan])
    images = load_dataset(plan.config.dataset, "train").info.fingerprint
    sidecar = member.training.checkpoint.with_suffix(".json")
    sidecar.write_text(sidecar.read_text().replace("of training", images))
    refuse_other_data([plan])
    certify(member.certifying, console)
    with pytest.raises(ConfigError, match="is of other images"):
        refuse_other_data([plan])


def test_more_images_than_there_are_is_told_before_anything_is_trained(tmp_path):
    words = ["fig3", "dataset=digits", "model=small_cnn"]
    with pytest.raises(CertificationError, match="num_images=500 cannot be taken from 359"):
        run(tmp_path, *words)
    assert not (tmp_path / "models").exists()


def test_certificates_of_a_model_that_was_trained_anew_are_made_anew(
    tmp_path, console, monkeypatch
):
    task = planned(tmp_path).members[SMOOTHADV][0].certifying
    rows = []
    monkeypatch.setattr(tasks, "certify_checkpoint", lambda *_: rows.append(task.rows.exists()))
    train(task.model, console)
    for weights, is_kept in (("of weights", True), ("of others", False)):
        certify(task, console)
        parameters_path(task.rows).write_text(json.dumps({"weights": weights}))
        task.run(console)
        assert rows.pop() == is_kept
        assert parameters_path(task.rows).exists() == is_kept
        assert (task.folder / "summary.json").exists() == is_kept


def test_whoever_goes_on_with_a_model_drops_its_other_checkpoints(tmp_path, console, monkeypatch):
    """As a process leaves them that is killed right after the last round."""
    task = planned(tmp_path).members[SMOOTHADV][0].certifying
    monkeypatch.setattr(tasks, "certify_checkpoint", lambda *_: None)
    train(task.model, console)
    for server_round in (0, 5, 15):
        weights = task.model.run_directory.checkpoint(server_round)
        weights.touch()
        weights.with_suffix(".json").touch()
    task.run(console)
    final = task.model.checkpoint
    assert set(final.parent.iterdir()) == {final, final.with_suffix(".json")}


def test_a_model_that_diverges_leaves_the_others(tmp_path, instant, monkeypatch):
    def diverge(task, console):
        if "no-noise-eps128" in task.name:
            raise TrainingError("Training diverged in round 3.")
        train(task, console)

    monkeypatch.setattr(Training, "run", diverge)
    name = "federated-gamma0.1-no-noise-eps128-stochastic-seed0"
    text = run(tmp_path, "fig3", failure=f"Failed, as said above: train {name}.$")
    assert f"Failed: train {name}: Training diverged in round 3." in text
    result = FigureResult.load(results_folder(tmp_path, "cpu") / "fig3.json")
    assert {one.label: len(one.models) for one in result.series} == {
        SMOOTHADV: 1,
        NOISE: 1,
        ADVERSARIAL: 0,
        STANDARD: 1,
    }
    (line,) = [line for line in text.splitlines() if line.startswith(f" {ADVERSARIAL}")]
    assert line.split()[-2:] == ["0", "-"]
    assert not (tmp_path / "certificates" / name).exists()
    monkeypatch.setattr(Training, "run", train)
    assert "3 tasks left" in run(tmp_path, "fig3")
    result = FigureResult.load(results_folder(tmp_path, "cpu") / "fig3.json")
    assert result.of(ADVERSARIAL) is not None


def test_a_figure_of_which_no_model_could_be_trained_says_so(tmp_path, instant, monkeypatch):
    def diverge(task, console):
        raise TrainingError("Training diverged in round 1.")

    monkeypatch.setattr(Training, "run", diverge)
    text = run(tmp_path, "fig3", failure="Failed, as said above: train .*, train ")
    assert text.count("Failed: ") == 4
    assert "fig3: none of its models is certified yet." in text


def test_two_processes_do_not_work_in_one_folder(tmp_path, instant):
    with (tmp_path / ".lock").open("w") as lock:
        assert try_lock(lock)
        with pytest.raises(ConfigError, match="Another process works in"):
            run(tmp_path, "fig3")
    assert not (tmp_path / "models").exists()


def test_what_else_is_known_on_the_same_terms_is_taken_from_the_folder(tmp_path):
    result, other, speed = comparison("fig1"), comparison("fig2", sigma=0.5), speed_up(2.2, 2.8)

    def statements():
        return [check.statement.partition(" ")[0] for check in checks_in(tmp_path, result)]

    alone = ["Federated", "Gamma", "One-point", "The"]
    result.save(tmp_path / "fig1.json")
    assert statements() == alone
    speed.save(tmp_path / "speed.json")
    other.save(tmp_path / "fig2.json")
    (tmp_path / "notes.json").write_text("{}")
    both = ["Federated", "Gamma", "One-point", "One-point", "Larger", "The"]
    assert statements() == both
    # What is damaged is that figure's to say.
    for path in ("fig2.json", "speed.json"):
        (tmp_path / path).write_text("{")
    assert statements() == alone
    # Of other images, or of another size.
    speed.save(tmp_path / "speed.json")
    for different in (
        replace(other, fingerprints=["of training", "of another test"]),
        replace(other, settings=SETTINGS | {"num_rounds": 10}),
    ):
        different.save(tmp_path / "fig2.json")
        assert statements() == [one for one in both if one != "Larger"]
    for different in (
        replace(speed, model="small_cnn"),
        replace(speed, precision="float32"),
        replace(speed, attack_steps=3),
        replace(speed, batch_size=2),
        replace(speed, num_noise_vectors=4),
    ):
        different.save(tmp_path / "speed.json")
        assert statements() == alone


# Drawn and written

EVERY_KIND = [comparison(), ablation(), recipe((0.4, 0.5)), comparison(seeds=(0,))]
PARTIAL = [
    without(comparison(), *FEDERATED, CENTRALIZED[0]),
    without(ablation(), STANDARD),
    without(recipe((0.4, 0.5)), STRONG),
    figure("fig1", series(FEDERATED[0], (0.0, 0.0)), series(FEDERATED[1], (0.5, 0.0))),
]


@pytest.mark.parametrize("result", EVERY_KIND + PARTIAL)
def test_every_kind_of_figure_is_drawn_with_a_curve_a_series(tmp_path, result):
    stem = tmp_path / "deep" / result.figure
    png, svg = draw(result, stem)
    assert (png, svg) == (stem.with_suffix(".png"), stem.with_suffix(".svg"))
    assert png.read_bytes().startswith(b"\x89PNG")
    text = svg.read_text()
    assert text.rstrip().endswith("</svg>")
    for one in result.series:
        assert (f"<!-- {one.label} -->" in text) == bool(one.models)
    for line in title(result).split("; "):
        assert f"<!-- {line} -->" in text
    assert "<!-- certified accuracy -->" in text


def test_a_picture_says_where_draws_and_not_models_end_the_curves(tmp_path):
    cap = comparison().largest_radius
    for radius, is_said in [(cap, True), (cap / 2, False)]:
        _, svg = draw(figure("fig3", series(SMOOTHADV, (0.2, radius))), tmp_path / "fig3")
        assert ("1,000 draws certify no more" in svg.read_text()) == is_said


def test_a_curve_is_certified_accuracy_against_the_radius(tmp_path, monkeypatch):
    drawn = {}
    really_plot = Axes.plot

    def plot(axes, radii, shares, *, label, **style):
        drawn[label] = dict(zip(radii, shares, strict=True))
        return really_plot(axes, radii, shares, label=label, **style)

    monkeypatch.setattr(Axes, "plot", plot)
    result = figure("fig3", series(SMOOTHADV, (0.2, 0.5), (0.3, 0.1)), series(STANDARD, (0.1, 0.3)))
    draw(result, tmp_path / "fig3")
    falls = {SMOOTHADV: [(0.1, 0.5), (0.5, 0.2)], STANDARD: [(0.3, 0.1)]}
    for label, steps in falls.items():
        for radius, share in drawn[label].items():
            wanted = next((s for end, s in steps if radius <= end), 0.0)
            assert share == pytest.approx(wanted), (label, radius)


def test_a_title_says_figure_settings_data_and_scale():
    assert title(comparison("fig6", sigma=0.12, epsilon_255=64.0)) == (
        "Figure 6: sigma 0.12, epsilon 64/255; digits, scale cpu"
    )
    assert title(recipe((0.4, 0.5))).startswith("Beyond the paper: a stronger recipe, sigma 0.25")


def test_the_radii_of_a_table_go_as_far_as_certificates_can():
    assert table_radii(comparison()) == [0, 0.25, 0.5]
    assert table_radii(figure("fig1", n=100_000)) == [0, 0.25, 0.5, 0.75]
    tenths = [0, 0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6]  # sigma is where statements are decided
    assert table_radii(figure("fig1", radius_step=0.1)) == tenths


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def table_of(text):
    """Rows of a figure's table, by their first cell."""
    rows = [cells(line) for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in rows}


@pytest.mark.parametrize("result", EVERY_KIND + PARTIAL)
def test_markdown_has_all_that_explains_the_figure(result):
    checks = checks_of(result, [], speed_up(2.2, 2.8))
    text = markdown(result, checks, "results/cpu")
    for check in checks:
        assert f"**{check.verdict.capitalize()}**: {check.statement}." in text
        for line in check.measured:
            assert f"\n- {line}\n" in text
    assert f"![{title(result)}](results/cpu/{result.figure}.png)" in text
    assert f"```bash\n{result.command}\n```" in text
    assert f"Data: {result.data}, 500 test images." in text
    assert "A CPU, 2 cores, A GPU, torch 2.9, flwr 1.41" in text
    assert "Program: abcdef0123-dirty." in text  # that files were changed is not cut off
    assert "100 devices of 500 samples, 10 a round, 20 rounds" in text
    assert "n0 = 100, n = 1000, alpha = 0.001" in text
    rows = table_of(text)
    for one in result.series:
        seeds = [cell for cell in rows[one.label] if cell == str(len(one.models))]
        assert seeds, rows[one.label]
        assert (rows[one.label][0] == "-") == (not one.models)
    assert "nan" not in text


def test_a_row_is_mean_and_spread_over_seeds_in_percent():
    label = FEDERATED[0]
    models = [model([0.5, 0.3, None, None], 0), model([0.5, 0.3, 0.3, None], 1)]
    text = markdown(figure("fig1", SeriesResult(label, ["a.b=1"], models)), [], "results/cpu")
    assert table_of(text)[label] == [
        "62.5 ± 17.7",
        "62.5 ± 17.7",
        "25.0 ± 0.0",
        "0.2375 ± 0.0530",
        "2",
        "60 s",
    ]
    assert f"- {label}: `a.b=1`" in text
    alone = markdown(figure("fig1", SeriesResult(label, [], models[:1])), [], "results/cpu")
    assert table_of(alone)[label] == ["50.0", "50.0", "25.0", "0.2000", "1", "60 s"]


@pytest.mark.parametrize("width", [40, 200])
@pytest.mark.parametrize("result", EVERY_KIND + PARTIAL)
def test_what_is_printed_are_the_same_numbers(result, width):
    checks = checks_of(result, [], None)
    console = Console(file=io.StringIO(), width=width)
    print_figure(result, checks, console)
    lines = console.file.getvalue().splitlines()
    assert title(result) in lines[0]
    for label, row in table_of(markdown(result, [], "results/cpu")).items():
        if label.startswith("certified accuracy"):
            continue
        (line,) = [line for line in lines if line.startswith(f" {label} ")]
        assert line.split() == " ".join([label, *row]).split()
    for check in checks:
        assert f"{check.verdict:>13}  {check.statement}" in lines
        for measured in check.measured:
            assert f"{'':>15}{measured}" in lines


def test_the_name_of_the_data_is_no_markup():
    console = Console(file=io.StringIO(), width=200)
    print_figure(replace(comparison(), data="CIFAR-10 [red]"), [], console)
    assert "CIFAR-10 [red], scale cpu" in console.file.getvalue()


def test_a_page_has_all_figures_of_all_scales_in_the_papers_order(tmp_path):
    for scale, results in {
        "cpu": [comparison("fig2", sigma=0.5), ablation(), comparison("fig1")],
        "paper": [recipe((0.4, 0.5))],
    }.items():
        (tmp_path / scale).mkdir()
        for result in results:
            replace(result, scale=scale).save(tmp_path / scale / f"{result.figure}.json")
    speed_up(2.2, 2.8).save(tmp_path / "cpu" / "speed.json")
    text = page_of(tmp_path)
    heads = [line for line in text.splitlines() if line.startswith("### ")]
    assert [head.partition(":")[0] for head in heads] == [
        "### Figure 1",
        "### Figure 3",
        "### Figure 2",
        "### Beyond the paper",
    ]
    verdicts = text.partition("### ")[0]
    assert "| Figure 1; cpu | Gamma makes no difference (within 5 points) | **holds** |" in verdicts
    assert "| Beyond the paper; paper | The recipe certifies more" in verdicts
    for result in (comparison(), ablation(), recipe((0.4, 0.5))):
        for check in checks_of(result, [], None):
            assert f" | {check.statement} | **{check.verdict}** |" in verdicts
    # A statement about several figures: said once in the overview, and under each of them.
    assert verdicts.count("Larger sigma is lower but wider") == 1
    assert "| Figure 1, Figure 3, Figure 2; cpu | Larger sigma is lower but wider" in verdicts
    assert text.count("Larger sigma is lower but wider") == 1 + 3
    assert page_of(tmp_path / "nowhere").count("\n") == 1
    # One that is damaged does not take the others with it.
    (tmp_path / "cpu" / "fig2.json").write_text("{")
    text = page_of(tmp_path)
    assert "fig2.json holds no results of a figure" in text
    assert text.count("\n### ") == 3
