"""From figures, a scale and seeds to the tasks that they need, models that they share once."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedsmooth_core.config import RunConfig
from fedsmooth_core.errors import ConfigError
from server.attacked import AttackTerms
from server.configuration import CONF, compose
from server.reproduction.figures import Figure, Series
from server.reproduction.speed import SpeedMeasurement
from server.reproduction.tasks import Attacking, Certifying, Task, Training

SCALES = ("paper", *sorted(path.stem for path in (CONF / "scale").glob("*.yaml")))
"""``paper`` is the size that the experiments are written in; the others are files of conf/scale."""

_CENTRALIZED_BATCH = 60
_CHECKPOINTS = 4
_ATTACK = {"steps": 10, "draws": 8, "n": 500, "images": 100}

# Settings that say what a series is.
_FIXED = {
    *("experiment", "scale", "seed", "name", "run_dir", "resume"),
    *("attack", "attack.estimator", "attack.epsilon", "attack.epsilon_255"),
    *("smoothing", "smoothing.sigma", "training", "partition.gamma", "partition.scheme"),
    *("certification.sigma", "certification.at_end", "certification.every"),
}


@dataclass(frozen=True)
class Member:
    """One model of a series: how it is trained, certified and, for the first seed, attacked."""

    seed: int
    training: Training
    certifying: Certifying
    attacking: Attacking | None

    @property
    def tasks(self) -> list[Task]:
        """In the order in which they can be done."""
        return [self.training, self.certifying, *([self.attacking] if self.attacking else [])]


@dataclass(frozen=True)
class FigurePlan:
    """A figure, and the models of each of its series, a seed each."""

    figure: Figure
    members: dict[str, list[Member]]
    """By the series' label."""
    speed: SpeedMeasurement | None
    """Of a comparison: how fast the two estimators are. One file for all figures of a scale."""

    @property
    def config(self) -> RunConfig:
        """Settings of the figure's first series, which all of them share but for what a series is."""
        return next(iter(self.members.values()))[0].certifying.config

    @property
    def tasks(self) -> list[Task]:
        """All of them, a seed after another: the first seed's models make a figure already."""
        tasks = [
            task
            for of_seed in zip(*self.members.values(), strict=True)
            for member in of_seed
            for task in member.tasks
        ]
        return [*tasks, self.speed] if self.speed else tasks


def make_plan(
    figures: Sequence[Figure], scale: str, num_seeds: int, overrides: Sequence[str], root: Path
) -> list[FigurePlan]:
    """Compose all configurations, so that none is found wrong after an hour.

    Args:
        figures: what is wanted.
        scale: one of ``SCALES``.
        num_seeds: models of each series, with seeds 0, 1, ...; >= 1.
        overrides: settings of the machine, the data, or of all series alike.
        root: where models, certificates and figures go.

    Raises:
        ConfigError: for a setting that the plan makes itself or that is not valid, and for a model that
            is in ``root`` already but was trained with other settings.
    """
    if num_seeds < 1:
        raise ConfigError(f"--seeds {num_seeds} trains nothing: allowed is 1 or more.")
    for override in overrides:
        key = override.partition("=")[0]
        if key in _FIXED or key.partition(".")[0] == "service":
            raise ConfigError(
                f"{override} says what a curve is or where it goes, which the plan does itself: allowed "
                "are settings that all curves share, such as dataset.root or training.momentum."
            )
    trainings: dict[str, Training] = {}
    return [
        _figure_plan(figure, scale, num_seeds, overrides, root, trainings) for figure in figures
    ]


def results_folder(root: Path, scale: str) -> Path:
    """Return where the figures' results go."""
    return root / "results" / scale


def _figure_plan(
    figure: Figure,
    scale: str,
    num_seeds: int,
    overrides: Sequence[str],
    root: Path,
    trainings: dict[str, Training],
) -> FigurePlan:
    members = {
        series.label: [
            _member(series, scale, seed, overrides, root, trainings) for seed in range(num_seeds)
        ]
        for series in figure.series
    }
    speed = None
    if figure.kind == "comparison":
        config = next(iter(members.values()))[0].certifying.config
        speed = SpeedMeasurement(config, results_folder(root, scale))
    return FigurePlan(figure, members, speed)


def _member(
    series: Series,
    scale: str,
    seed: int,
    overrides: Sequence[str],
    root: Path,
    trainings: dict[str, Training],
) -> Member:
    settings = [
        f"experiment={series.experiment}",
        *([] if scale == "paper" else [f"scale={scale}"]),
        *overrides,
        *series.settings,
        f"seed={seed}",
        "certification.at_end=false",
    ]
    as_figure = compose(settings)
    training = _training(series, as_figure, settings, root)
    training = trainings.setdefault(training.name, training)
    certifying = Certifying(
        training, as_figure, root / "certificates" / training.name / _terms(as_figure)
    )
    sigma = as_figure.certified_sigma
    terms = AttackTerms(radii=(sigma, 2 * sigma), **_ATTACK)
    return Member(seed, training, certifying, Attacking(certifying, terms) if seed == 0 else None)


def _training(series: Series, as_figure: RunConfig, settings: list[str], root: Path) -> Training:
    name = _name(as_figure, series)
    folder = root / "models" / name
    num_rounds = as_figure.federation.num_rounds
    settings = [
        *settings,
        f"run_dir='{folder}'",
        f"name={name}",
        # A model may be certified at several noise levels: none of them is its own.
        "certification.sigma=null",
        f"federation.checkpoint_every={max(1, math.ceil(num_rounds / _CHECKPOINTS))}",
    ]
    if series.is_centralized:
        # As many samples a round as a cohort, in the paper's larger mini-batches.
        training = as_figure.training
        samples = as_figure.cohort_size * training.local_steps * training.batch_size
        settings += [
            f"training.batch_size={_CENTRALIZED_BATCH}",
            f"training.local_steps={max(1, round(samples / _CENTRALIZED_BATCH))}",
        ]
    if (folder / "config.yaml").is_file():
        compose([*settings, "resume=true"])  # refuses a model of other settings
    return Training(name, replace(compose(settings), resume=False), series.is_centralized)


def _name(config: RunConfig, series: Series) -> str:
    """Name a model by how it is trained, so that figures which want the same model find it."""
    attack, smoothing = config.attack, config.smoothing
    parts = [
        "centralized" if series.is_centralized else f"federated-gamma{config.partition.gamma:g}"
    ]
    parts.append(f"sigma{smoothing.sigma:g}" if smoothing.sigma else "no-noise")
    if attack.attack_steps:
        parts.append(f"eps{255 * attack.l2_budget:g}-{attack.estimator.replace('_', '-')}")
    else:
        parts.append("no-attack")
    if series.experiment == "strong":
        parts.append("strong")
    return "-".join([*parts, f"seed{config.seed}"])


def _terms(config: RunConfig) -> str:
    """Name certificates by their terms: other terms are another folder."""
    terms = config.certification
    parts = [
        f"sigma{config.certified_sigma:g}",
        f"n{terms.n}",
        f"images{terms.num_images or 'all'}",
    ]
    if terms.method != "fixed":
        parts.append(terms.method)
    return "-".join([*parts, terms.precision])
