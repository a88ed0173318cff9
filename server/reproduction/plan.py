"""From figures, a scale and seeds to the tasks that they need, models that they share once."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedsmooth_core.certification.bounds import certified_radius, p_a_lower
from fedsmooth_core.config import CertificationConfig, RunConfig, Scalar, to_flat
from fedsmooth_core.errors import ConfigError
from server.attacked import AttackTerms
from server.configuration import CONF, compose, load
from server.report import MOST_RADII
from server.reproduction.figures import Figure, Series
from server.reproduction.speed import SpeedMeasurement
from server.reproduction.tasks import Attacking, Certifying, Task, Training

SCALES = ("paper", *sorted(path.stem for path in (CONF / "scale").glob("*.yaml")))
"""``paper`` is the size that the experiments are written in; the others are files of conf/scale."""

_CENTRALIZED_BATCH = 60
_CHECKPOINT_EVERY = 5
_ATTACK = {"steps": 10, "draws": 8, "n": 500, "images": 100}

# Settings that say what a series is.
_FIXED = {
    *("experiment", "scale", "seed", "name", "run_dir", "resume"),
    *("attack", "attack.attack_steps", "attack.estimator"),
    *("attack.epsilon", "attack.epsilon_255"),
    *("smoothing", "smoothing.sigma", "training"),
    *("partition", "partition.gamma", "partition.scheme"),
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
    def num_seeds(self) -> int:
        """Models of each series."""
        return len(next(iter(self.members.values())))

    @property
    def chains(self) -> list[list[Task]]:
        """Tasks that each need the one before, a seed after another: the first makes a figure already."""
        chains = [
            member.tasks
            for of_seed in zip(*self.members.values(), strict=True)
            for member in of_seed
        ]
        return [*chains, [self.speed]] if self.speed else chains

    @property
    def tasks(self) -> list[Task]:
        """All of them, in the order in which they can be done."""
        return [task for chain in self.chains for task in chain]


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
    if scale not in SCALES:
        raise ConfigError(f"--scale {scale} is unknown: allowed are {', '.join(SCALES)}.")
    if num_seeds < 1:
        raise ConfigError(f"--seeds {num_seeds} trains nothing: allowed is 1 or more.")
    for override in overrides:
        key = override.partition("=")[0].lstrip("+")
        if key in _FIXED or key.partition(".")[0] == "service":
            raise ConfigError(
                f"{override} says what a curve is or where it goes, which the plan does itself: allowed "
                "are settings that all curves share, such as dataset.root or training.momentum."
            )
    return [_figure_plan(figure, scale, num_seeds, overrides, root) for figure in figures]


def results_folder(root: Path, scale: str) -> Path:
    """Return where the figures' results go."""
    return root / "results" / scale


def _figure_plan(
    figure: Figure,
    scale: str,
    num_seeds: int,
    overrides: Sequence[str],
    root: Path,
) -> FigurePlan:
    # Composed once: to compose takes a tenth of a second, and all figures are many models.
    configs = {series: compose(_settings(series, scale, overrides)) for series in figure.series}

    for config in configs.values():
        _refuse_terms(config)

    def members_of(seed: int) -> list[Member]:
        return [
            _member(series, replace(config, seed=seed), root) for series, config in configs.items()
        ]

    of_seeds = [members_of(seed) for seed in range(num_seeds)]
    # What is finished of further seeds is shown, too: to ask for fewer takes no result back.
    while (more := _finished(members_of, len(of_seeds))) is not None:
        of_seeds.append(more)
    labels = [series.label for series in figure.series]
    members = {label: [of_seed[i] for of_seed in of_seeds] for i, label in enumerate(labels)}
    speed = None
    if figure.kind == "comparison":
        config = next(iter(members.values()))[0].certifying.config
        speed = SpeedMeasurement(config, results_folder(root, scale))
    return FigurePlan(figure, members, speed)


def _refuse_terms(config: RunConfig) -> None:
    """Refuse certificates that could not be compared, before a model is trained for them."""
    terms = config.certification
    if terms.num_images == 1:
        raise ConfigError("certification.num_images=1 compares nothing: allowed is 2 or more.")
    if terms.method != "fixed":
        raise ConfigError(
            f"certification.method={terms.method} knows radii on a grid alone, but the statements are "
            "about r = sigma: allowed is fixed."
        )
    largest = certified_radius(p_a_lower(terms.n, terms.n, terms.alpha), config.certified_sigma)
    if largest / terms.radius_step >= MOST_RADII:
        raise ConfigError(
            f"certification.radius_step={terms.radius_step:g} is too small for radii up to {largest:.3g}: "
            f"allowed is a step that makes fewer than {MOST_RADII} of them."
        )


def _finished(members_of: Callable[[int], list[Member]], seed: int) -> list[Member] | None:
    """Return the members of a seed that nobody asked for, if all of them are there."""
    try:
        members = members_of(seed)
    except ConfigError:  # of other settings: not these figures'
        return None
    return None if any(member.certifying.work_left() for member in members) else members


def _settings(series: Series, scale: str, overrides: Sequence[str]) -> list[str]:
    return [
        f"experiment={series.experiment}",
        *([] if scale == "paper" else [f"scale={scale}"]),
        *overrides,
        *series.settings,
        "certification.at_end=false",
    ]


def _member(series: Series, as_figure: RunConfig, root: Path) -> Member:
    training = _training(series, as_figure, root)
    certifying = Certifying(
        training, as_figure, root / "certificates" / training.name / _terms(as_figure)
    )
    sigma = as_figure.certified_sigma
    terms = AttackTerms(radii=(sigma, 2 * sigma), **_ATTACK)
    attacking = Attacking(certifying, terms) if as_figure.seed == 0 else None
    return Member(as_figure.seed, training, certifying, attacking)


def _training(series: Series, as_figure: RunConfig, root: Path) -> Training:
    name = _name(as_figure, series)
    folder = root / "models" / name
    federation, training = as_figure.federation, as_figure.training
    if series.is_centralized:
        # As many samples a round as a cohort, in the paper's larger mini-batches.
        size = min(
            training.batch_size, as_figure.partition.samples_per_client or training.batch_size
        )
        samples = as_figure.cohort_size * training.local_steps * size
        training = replace(
            training,
            batch_size=_CENTRALIZED_BATCH,
            local_steps=max(1, round(samples / _CENTRALIZED_BATCH)),
        )
    config = replace(
        as_figure,
        name=name,
        run_dir=str(folder),
        training=training,
        federation=replace(federation, checkpoint_every=_CHECKPOINT_EVERY),
        # A model may be certified at several noise levels: none of them is its own.
        certification=replace(as_figure.certification, sigma=None),
    )
    if (folder / "config.yaml").is_file():
        _refuse_other_model(config, folder)
    return Training(name, config, series.is_centralized)


def _refuse_other_model(config: RunConfig, folder: Path) -> None:
    """Refuse a model that is there, finished or not, but that was begun with other settings."""
    wanted, there = _of_training(config), _of_training(load(folder))
    refuse_differences(wanted, there, f"{folder} holds a model that was trained")


def refuse_differences(
    wanted: Mapping[str, Any], there: Mapping[str, Any], what: str, way_out: str = ""
) -> None:
    """Refuse to go on with what is there, if any of its settings is another than is wanted.

    Raises:
        ConfigError: ``what`` "with other settings", which they are, and what to do: ``way_out`` is what
            else can be done.
    """
    different = [
        f"{key.replace('-', '_')}={wanted.get(key, 'null')} (was {there.get(key, 'null')})"
        for key in {**wanted, **there}
        if wanted.get(key) != there.get(key)
    ]
    if different:
        raise ConfigError(
            f"{what} with other settings, namely {', '.join(different)}: leave these as they were, "
            f"{way_out}or name another folder with -o."
        )


def _of_training(config: RunConfig) -> dict[str, Scalar]:
    """Return, by name, what decides the weights of a final model, the last round among it."""
    federation = config.federation
    settings = to_flat(config.plan) | to_flat(config.aggregation, "aggregation.")
    settings |= {
        "federation.num-rounds": federation.num_rounds,
        "federation.cohort-fraction": federation.cohort_fraction,
        "federation.over-selection": federation.over_selection,
        "federation.quorum": federation.quorum,
        "federation.max-num-examples": federation.max_num_examples or "null",
        "runtime.precision": config.runtime.precision,
    }
    # Where the images are is a fact of the machine.
    return {key: value for key, value in settings.items() if key != "dataset.root"}


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
    terms, usual = config.certification, CertificationConfig()
    parts = [
        f"sigma{config.certified_sigma:g}",
        f"n{terms.n}",
        f"images{terms.num_images or 'all'}",
    ]
    parts += [
        f"{key}{getattr(terms, key):g}"
        for key in ("n0", "alpha")
        if getattr(terms, key) != getattr(usual, key)
    ]
    return "-".join([*parts, terms.precision])
