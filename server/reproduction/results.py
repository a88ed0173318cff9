"""What was measured for a figure, as one small JSON file: everything its picture and checks are made of."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsmooth_core.certification.bounds import certified_radius, p_a_lower
from fedsmooth_core.certification.comparison import certified_at, radii_of
from fedsmooth_core.certification.rows import read_parameters, read_rows
from fedsmooth_core.certification.subset import subset_indices
from fedsmooth_core.config import RunConfig, to_flat
from fedsmooth_core.data import load_dataset
from fedsmooth_core.durable import write_atomically
from fedsmooth_core.errors import CertificationError, ConfigError
from server.report import rows_sha256
from server.reproduction.plan import FigurePlan, Member
from server.reproduction.timing import Log

_DIGITS = 6


@dataclass(frozen=True)
class ModelResult:
    """One model of a series."""

    seed: int
    radii: list[float | None]
    """Each image's certified radius in [0, 1] pixel units; None where the model is wrong or abstains."""
    rows_sha256: str
    clean_accuracy: float | None
    noisy_accuracy: float | None
    """On all test images, one noise draw each at the noise level of training; None if not known."""
    idle_rounds: int
    """Rounds that had too few good replies, so that the model stayed as it was."""
    train_seconds: float
    """Local training and what it waits for, over all rounds."""
    certify_seconds: float | None
    """None where the time is not known; less than it took where a process was killed over it."""
    git_revisions: list[str]
    """Of the program, in each process that trained the model."""
    attack: list[dict[str, Any]] | None
    """At each radius what ``fedsmooth attack`` found; None where this model was not attacked."""


@dataclass(frozen=True)
class SeriesResult:
    """One curve."""

    label: str
    settings: list[str]
    """What its training has otherwise than the figure's first series, as ``key=value``."""
    models: list[ModelResult]

    def outcomes(self, radius: float) -> NDArray[np.bool_]:
        """Return (seeds, images): which images are certified at ``radius``."""
        return self._radii >= radius

    def certified_radii(self) -> NDArray[np.float64]:
        """Return (seeds, images): certified radii, 0 where a model is wrong or abstains."""
        return np.maximum(self._radii, 0.0)

    @cached_property
    def _radii(self) -> NDArray[np.float64]:
        """Minus infinity where nothing is certified: not even at radius 0."""
        return np.asarray(
            [[-np.inf if r is None else r for r in one.radii] for one in self.models],
            dtype=np.float64,
        )

    @property
    def average_certified_radius(self) -> NDArray[np.float64]:
        """Of each seed's model, in [0, 1] pixel units."""
        return np.asarray(self.certified_radii().mean(1))


@dataclass(frozen=True)
class FigureResult:
    """All that is known of a figure; to and from JSON."""

    figure: str
    scale: str
    data: str
    """What the test and training images are."""
    command: str
    sigma: float
    """Noise level of the certified classifiers."""
    epsilon_255: float
    fingerprints: list[str]
    """Of the training and the test set."""
    num_classes: int
    settings: dict[str, Any]
    """Size of the federation, of training and of the certificates."""
    machine: dict[str, Any]
    series: list[SeriesResult]

    def of(self, label: str) -> SeriesResult | None:
        """Return the series of that label, if any of its models is there."""
        return next((one for one in self.series if one.label == label and one.models), None)

    @property
    def largest_radius(self) -> float:
        """sigma Phi^-1(alpha^(1/n)): no certificate of these terms can be larger."""
        n, alpha = int(self.settings["n"]), float(self.settings["alpha"])
        return certified_radius(p_a_lower(n, n, alpha), self.sigma)

    def save(self, path: Path) -> None:
        """Write it, atomically, a model on one line."""
        content = asdict(self)
        series = ",\n".join(_one_a_line(one) for one in content.pop("series"))
        text = json.dumps(content, indent=1).removesuffix("\n}")
        write_atomically(path, f'{text},\n "series": [\n{series}\n ]\n}}\n'.encode())

    @classmethod
    def load(cls, path: Path) -> "FigureResult":
        """Read what :meth:`save` wrote.

        Raises:
            CertificationError: when the file is something else.
        """
        try:
            content = json.loads(path.read_bytes())
            if not shared_settings(RunConfig()).keys() <= content["settings"].keys():
                raise ValueError("settings are missing")
            series = [
                SeriesResult(**{**one, "models": [ModelResult(**model) for model in one["models"]]})
                for one in content.pop("series")
            ]
            return cls(**content, series=series)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CertificationError(
                f"{path} holds no results of a figure: let fedsmooth reproduce write it anew."
            ) from error


def refuse_other_data(plans: Sequence[FigurePlan]) -> None:
    """Refuse to go on with models of other images, before one more is trained on these.

    Raises:
        ConfigError: naming a model of other images.
        CertificationError: if the test set has fewer images than are to be certified.
        DataError: when the data set cannot be loaded.
    """
    config = plans[0].config
    train_set, test_set = (load_dataset(config.dataset, split) for split in ("train", "test"))
    subset_indices(len(test_set), config.certification.num_images)
    here = (train_set.info.fingerprint, test_set.info.fingerprint)
    for member in (one for plan in plans for of in plan.members.values() for one in of):
        trained_on, certified_on = _images_of(member)
        for found, of_these in zip((trained_on, certified_on), here, strict=True):
            if found not in (None, of_these):
                raise ConfigError(
                    f"{member.training.name} is of other images than {config.dataset.name} as it is set "
                    "now: set dataset.name and dataset.root to the images of the models that are there, "
                    "or name another folder with -o."
                )


def _images_of(member: Member) -> tuple[str | None, str | None]:
    """Return the fingerprints of what a model was trained and certified on, as far as that is there."""
    trained_on = certified_on = None
    if member.training.run_directory.has_checkpoint(member.training.config.federation.num_rounds):
        trained_on = str(_sidecar(member)["dataset"]["fingerprint"])
        parameters = read_parameters(member.certifying.rows) or {}
        certified_on = parameters.get("dataset")
    return trained_on, certified_on


def gather(plan: FigurePlan, scale: str, data: str, command: str, log: Log) -> FigureResult:
    """Collect what is finished of a figure.

    Raises:
        CertificationError: when models of a figure were trained or certified on different images.
    """
    config = plan.config
    series, sessions = [], []
    # Compared all together: every model of a figure is certified on the same images.
    done = {
        label: [member for member in members if not member.certifying.work_left()]
        for label, members in plan.members.items()
    }
    everyone = [member for members in done.values() for member in members]
    rows = [read_rows(member.certifying.rows) for member in everyone]
    fingerprints = _fingerprints(everyone)
    radii = dict(zip(map(id, everyone), _radii(rows) if rows else [], strict=True))
    for one in plan.figure.series:
        models = []
        for member in done[one.label]:
            found = member.training.run_directory.read_sessions()
            sessions += found
            models.append(_model(member, radii[id(member)], found, log))
        different = _differences(plan.members[one.label][0].training.config, config)
        series.append(SeriesResult(one.label, different, models))
    return FigureResult(
        figure=plan.figure.name,
        scale=scale,
        data=data,
        command=command,
        sigma=config.certified_sigma,
        epsilon_255=255 * config.attack.l2_budget,
        fingerprints=fingerprints,
        num_classes=_num_classes(everyone),
        settings=shared_settings(config),
        machine=_machine(sessions),
        series=series,
    )


def _one_a_line(series: dict[str, Any]) -> str:
    head = json.dumps({key: value for key, value in series.items() if key != "models"})
    models = ",\n   ".join(json.dumps(model) for model in series["models"])
    return f'  {head.removesuffix("}")}, "models": [\n   {models}\n  ]}}'


def _fingerprints(members: Sequence[Member]) -> list[str]:
    """Return those of the training and the test set, which must be all members'."""
    found = {tuple(str(one) for one in _images_of(member)) for member in members}
    if len(found) > 1:
        raise CertificationError(
            f"{members[0].training.name} and other models of its figure are of different images: "
            "reproduce each data set into a folder of its own with -o."
        )
    return list(min(found)) if found else []


def _num_classes(members: Sequence[Member]) -> int:
    """Return that of the first model, or 0 where there is none: all are of the same images."""
    return int(_sidecar(members[0])["model"]["num_classes"]) if members else 0


def _sidecar(member: Member) -> dict[str, Any]:
    content = json.loads(member.training.checkpoint.with_suffix(".json").read_bytes())
    metadata: dict[str, Any] = content["metadata"]
    return metadata


def _radii(rows: Sequence[Any]) -> list[list[float | None]]:
    certified, radii = certified_at(rows, 0.0), radii_of(rows)
    return [
        [
            _rounded_down(float(r)) if is_certified else None
            for r, is_certified in zip(*one, strict=True)
        ]
        for one in zip(radii, certified, strict=True)
    ]


def _rounded_down(radius: float) -> float:
    """Shorten a radius, claiming no more than it did."""
    unit = 10.0**_DIGITS
    return math.floor(radius * unit) / unit


def _model(
    member: Member, radii: list[float | None], sessions: list[dict[str, Any]], log: Log
) -> ModelResult:
    attack = None if member.attacking is None else member.attacking.read()
    rounds = member.training.run_directory.read_metrics()
    last = rounds[-1] if rounds else {}
    return ModelResult(
        seed=member.seed,
        radii=radii,
        idle_rounds=sum(not line.get("num_examples") for line in rounds),
        rows_sha256=rows_sha256(member.certifying.rows),
        clean_accuracy=last.get("clean-accuracy"),
        noisy_accuracy=last.get("noisy-accuracy"),
        # Of the rounds, for what a killed process took is in no log.
        train_seconds=sum(one["seconds"]["train"] for one in rounds),
        certify_seconds=log.seconds_of(member.certifying.title),
        git_revisions=sorted({str(one.get("git_revision")) for one in sessions}),
        attack=attack,
    )


def _differences(config: RunConfig, reference: RunConfig) -> list[str]:
    mine, theirs = to_flat(config.plan), to_flat(reference.plan)
    keys = [key for key in mine | theirs if mine.get(key) != theirs.get(key)]
    return [f"{key.replace('-', '_')}={mine.get(key, 'null')}" for key in keys]


def shared_settings(config: RunConfig) -> dict[str, Any]:
    """Return, by name, what all curves of all figures in one folder of results share."""
    partition, training, terms = config.partition, config.training, config.certification
    return {
        "model": config.model.name,
        "init": config.model.init,
        "num_clients": partition.num_clients,
        "samples_per_client": partition.samples_per_client,
        "cohort": config.cohort_size,
        "num_rounds": config.federation.num_rounds,
        "local_steps": training.local_steps,
        "batch_size": training.batch_size,
        "learning_rate": training.learning_rate,
        "momentum": training.momentum,
        "weight_decay": training.weight_decay,
        "num_noise_vectors": config.smoothing.num_noise_vectors,
        "attack_steps": config.attack.attack_steps,
        "step_rule": config.attack.step_rule,
        "step_size": config.attack.step_size,
        "variance_reduction": config.attack.variance_reduction,
        "loss": training.loss,
        "flip": config.dataset.flip,
        "crop_padding": config.dataset.crop_padding,
        "over_selection": config.federation.over_selection,
        **to_flat(config.aggregation, "aggregation."),
        "num_images": terms.num_images,
        "training_precision": config.runtime.precision,
        "n0": terms.n0,
        "n": terms.n,
        "alpha": terms.alpha,
        "certification_precision": terms.precision,
        "radius_step": terms.radius_step,
    }


def _machine(sessions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return hardware and versions of the processes that trained, a list each: of all that differ."""
    found: dict[str, Any] = {}
    for key in ("cpu", "cpu_count", "gpu", "python", "versions"):
        values = [one.get(key) for one in sessions]
        found[key] = [value for i, value in enumerate(values) if value not in values[:i]]
    return found
