"""From figures, a scale and seeds to the tasks that they need, models that they share once."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedsmooth_core.config import RunConfig
from fedsmooth_core.errors import ConfigError
from server.configuration import CONF, compose
from server.reproduction.figures import Figure, Series
from server.reproduction.tasks import Certifying, Task, Training

SCALES = ("paper", *sorted(path.stem for path in (CONF / "scale").glob("*.yaml")))
"""``paper`` is the size that the experiments are written in; the others are files of conf/scale."""

_CENTRALIZED_BATCH = 60
_CHECKPOINTS = 4

# Settings that say what a series is.
_FIXED = (
    "experiment",
    "scale",
    "seed",
    "name",
    "run_dir",
    "resume",
    "attack",
    "smoothing",
    "training",
    "partition.gamma",
    "partition.scheme",
    "certification.sigma",
    "certification.at_end",
    "certification.every",
    "service",
)


@dataclass(frozen=True)
class Member:
    """One model of a series: how it is trained and certified."""

    seed: int
    training: Training
    certifying: Certifying

    @property
    def tasks(self) -> list[Task]:
        """In the order in which they can be done."""
        return [self.training, self.certifying]


@dataclass(frozen=True)
class FigurePlan:
    """A figure, and the models of each of its series, a seed each."""

    figure: Figure
    members: dict[str, list[Member]]
    """By the series' label."""

    @property
    def config(self) -> RunConfig:
        """Settings of the figure's first series, which all of them share but for what a series is."""
        return next(iter(self.members.values()))[0].certifying.config

    @property
    def tasks(self) -> list[Task]:
        """All of them, a seed after another: the first seed's models make a figure already."""
        return [
            task
            for of_seed in zip(*self.members.values(), strict=True)
            for member in of_seed
            for task in member.tasks
        ]


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
        if (key.startswith(_FIXED) and key.partition(".")[0] != "service") or key == "service":
            raise ConfigError(
                f"{override} is the figures' own: allowed are settings that say nothing of a series, "
                "such as dataset.root, runtime.* or certification.n."
            )
    trainings: dict[str, Training] = {}
    return [
        FigurePlan(
            figure,
            {
                series.label: [
                    _member(series, scale, seed, overrides, root, trainings)
                    for seed in range(num_seeds)
                ]
                for series in figure.series
            },
        )
        for figure in figures
    ]


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
    return Member(seed, training, certifying)


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
