"""The figures of the paper, and the recipe beyond it: which models each of them shows."""

from dataclasses import dataclass

from fedsmooth_core.errors import ConfigError

GAMMAS = (0.1, 0.5)
ESTIMATORS = ("stochastic", "one_point")

PAPER = "the paper's settings"
STRONG = "experiment=strong"

STANDARD, ADVERSARIAL, NOISE, SMOOTHADV = (
    "standard training",
    "adversarial training alone",
    "smoothing alone",
    "SmoothAdv",
)


@dataclass(frozen=True)
class Series:
    """One curve: what it is called, and how its models are trained."""

    label: str
    experiment: str
    """A file of conf/experiment."""
    settings: tuple[str, ...] = ()
    """Hydra overrides on top of it."""
    is_centralized: bool = False


@dataclass(frozen=True)
class Figure:
    """What one figure shows."""

    name: str
    kind: str
    """``comparison``: centralised and federated, both estimators. ``ablation``: without noise, without
    the attack, without either. ``recipe``: the paper's settings against a stronger recipe."""
    series: tuple[Series, ...]

    @property
    def number(self) -> str:
        """How a person calls it."""
        return (
            f"Figure {self.name.removeprefix('fig')}"
            if self.name in PAPER_ORDER
            else "Beyond the paper"
        )


def centralized_label(estimator: str) -> str:
    """Return the label of the pooled baseline."""
    return f"centralised, {estimator.replace('_', '-')}"


def federated_label(gamma: float, estimator: str) -> str:
    """Return the label of a federated curve."""
    return f"federated, gamma {gamma:g}, {estimator.replace('_', '-')}"


def _comparison(name: str) -> Figure:
    series = []
    for estimator in ESTIMATORS:
        attack = f"attack.estimator={estimator}"
        series.append(Series(centralized_label(estimator), name, (attack,), is_centralized=True))
        series += [
            Series(federated_label(gamma, estimator), name, (attack, f"partition.gamma={gamma:g}"))
            for gamma in GAMMAS
        ]
    return Figure(name, "comparison", tuple(series))


def _ablation(name: str) -> Figure:
    no_noise, no_attack = "smoothing.sigma=0", "attack.attack_steps=0"
    return Figure(
        name,
        "ablation",
        (
            Series(SMOOTHADV, name),
            Series(NOISE, name, (no_attack,)),
            Series(ADVERSARIAL, name, (no_noise,)),
            Series(STANDARD, name, (no_noise, no_attack)),
        ),
    )


PAPER_ORDER = ("fig1", "fig3", "fig2", "fig4", *(f"fig{number}" for number in range(5, 12)))
"""The paper's figures, the ones that say most first."""

FIGURES = {
    name: _ablation(name) if name in ("fig3", "fig4") else _comparison(name) for name in PAPER_ORDER
} | {"strong": Figure("strong", "recipe", (Series(PAPER, "fig1"), Series(STRONG, "strong")))}
"""By the name that the command line takes."""


def figures_named(names: list[str]) -> list[Figure]:
    """Return the figures that a command line names, each once; ``all`` is every figure of the paper.

    Raises:
        ConfigError: for a name that is none, or no name at all.
    """
    known = f"fig1 to fig{len(PAPER_ORDER)}, strong, or all"
    if not names:
        raise ConfigError(f"Which figure? Name one or more: {known}.")
    wanted: dict[str, Figure] = {}
    for name in names:
        if name != "all" and name not in FIGURES:
            raise ConfigError(f"{name!r} is no figure: allowed are {known}.")
        for one in PAPER_ORDER if name == "all" else (name,):
            wanted[one] = FIGURES[one]
    return list(wanted.values())
