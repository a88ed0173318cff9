"""What has to be done for a figure: train a model, certify it, attack it. Each continues where it was."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from fedsmooth_core.certification.rows import parameters_path, read_parameters
from fedsmooth_core.config import RunConfig, TrainingPlan
from server.attacked import AttackTerms, attack_checkpoint
from server.certify import certify_checkpoint
from server.owed import ROWS, SUMMARY
from server.report import rows_sha256
from server.run_directory import RunDirectory


class Task(Protocol):
    """One step of a plan.

    Attributes:
        title: for people.
        category: tasks of one category are equally fast, measured in forward passes a second.
    """

    @property
    def title(self) -> str: ...

    @property
    def category(self) -> str: ...

    def work_left(self) -> int:
        """Return the forward passes of single images that it still needs; 0 when it is done."""

    def run(self, console: Console) -> None:
        """Do what is left of it."""


@dataclass(frozen=True)
class Training:
    """Train one model into its run directory."""

    name: str
    config: RunConfig
    """``run_dir`` is where; nothing is certified in it."""
    is_centralized: bool

    @property
    def title(self) -> str:
        return f"train {self.name}"

    @property
    def category(self) -> str:
        return "centralised training" if self.is_centralized else "federated training"

    @property
    def run_directory(self) -> RunDirectory:
        assert self.config.run_dir is not None
        return RunDirectory(Path(self.config.run_dir))

    @property
    def checkpoint(self) -> Path:
        """The final model's weights."""
        return self.run_directory.checkpoint(self.config.federation.num_rounds)

    def read_weights_sha256(self) -> str:
        """Return the hash of the final model's weights.

        Raises:
            OSError, ValueError, TypeError, KeyError: while there is none, or its record is damaged.
        """
        return str(json.loads(self.checkpoint.with_suffix(".json").read_bytes())["sha256"])

    def work_left(self) -> int:
        run, num_rounds = self.run_directory, self.config.federation.num_rounds
        clients = 1 if self.is_centralized else self.config.cohort_size
        of_round = clients * passes_of_round(self.config)
        if run.has_checkpoint(num_rounds):
            # Where no round had good replies the final weights are the first ones: that is no model.
            is_trained = any(line.get("num_examples") for line in run.read_metrics())
            return 0 if is_trained else of_round
        every = self.config.federation.checkpoint_every
        kept = [done for done in range(0, num_rounds, every) if run.has_checkpoint(done)]
        return (num_rounds - max(kept, default=0)) * of_round

    def run(self, console: Console) -> None:
        # Imported here: Flower takes seconds, and to show a plan needs none of it.
        from server.centralized import run_centralized
        from server.observers import standard_observers
        from server.progress import TrainingProgress
        from server.simulation import quiet_flower, simulate

        quiet_flower()
        progress = TrainingProgress(console)
        observers = standard_observers(progress, console)
        is_begun = (self.run_directory.path / "config.yaml").is_file()
        config = replace(self.config, resume=is_begun)
        if self.is_centralized:
            run_centralized(config, console, observers)
        else:
            simulate(config, console, observers, progress.client_done)
        self.keep_the_final_checkpoint()

    def keep_the_final_checkpoint(self) -> None:
        """Drop those that were for an interruption: all figures of the paper are many models.

        A process may be killed before it does so: whoever goes on with the model calls it again.
        """
        for weights in self.run_directory.checkpoints.glob("*.safetensors"):
            if weights != self.checkpoint:
                weights.with_suffix(".json").unlink(missing_ok=True)
                weights.unlink()


@dataclass(frozen=True)
class Certifying:
    """Certify a trained model on a figure's terms, into a folder of its own."""

    model: Training
    config: RunConfig
    folder: Path

    category = "certification"

    @property
    def title(self) -> str:
        return f"certify {self.model.name} at sigma {self.config.certified_sigma:g}"

    @property
    def rows(self) -> Path:
        """The finished rows."""
        return self.folder / ROWS

    def _is_done(self) -> bool:
        """Whether the summary is there, which comes last, and of these weights."""
        try:
            summary = json.loads((self.folder / SUMMARY).read_bytes())
            return bool(summary["parameters"]["weights"] == self.model.read_weights_sha256())
        except (OSError, ValueError, TypeError, KeyError):
            return False

    def _drop_those_of_other_weights(self) -> None:
        """Drop the certificates of a model that was trained anew: nobody has that model any more."""
        parameters = read_parameters(self.rows)
        if parameters is not None and parameters.get("weights") != self.model.read_weights_sha256():
            for path in (self.folder / SUMMARY, self.rows, parameters_path(self.rows)):
                path.unlink(missing_ok=True)

    def work_left(self) -> int:
        if self._is_done():
            return 0
        terms = self.config.certification
        # Lines, not rows: a file may be empty or its last line torn by a crash, until it is continued.
        lines = self.rows.read_bytes().count(b"\n") if self.rows.is_file() else 0
        # What all test images are is known once they are loaded; the figures take a part of them.
        num_images = terms.num_images or 10_000
        return max(1, num_images - max(0, lines - 1)) * (terms.n0 + terms.n)

    def run(self, console: Console) -> None:
        self.model.keep_the_final_checkpoint()
        self._drop_those_of_other_weights()
        certify_checkpoint(self.model.checkpoint, self.config, self.folder, console)


@dataclass(frozen=True)
class Attacking:
    """Attack a certified model: no certificate may break."""

    certified: Certifying
    terms: AttackTerms

    category = "attack"

    @property
    def title(self) -> str:
        return (
            f"attack {self.certified.model.name} at sigma {self.certified.config.certified_sigma:g}"
        )

    @property
    def result(self) -> Path:
        """The figures of the attack, once it is done."""
        return self.certified.folder / "attack-of-figure.json"

    def read(self) -> list[dict[str, Any]] | None:
        """Return what was found at each radius; None while the model was not attacked on these terms.

        Another model's attack, or one of other certificates, is none of this.
        """
        terms = self.terms
        wanted: dict[str, Any] = {"steps": terms.steps, "draws": terms.draws, "n": terms.n}
        try:
            wanted["weights"] = self.certified.model.read_weights_sha256()
            wanted["rows"] = rows_sha256(self.certified.rows)
            content = json.loads(self.result.read_bytes())
            found: list[dict[str, Any]] = content["radii"]
            is_wanted = all(content["parameters"][key] == value for key, value in wanted.items())
            radii = tuple(one["radius"] for one in found)
        except (OSError, ValueError, TypeError, KeyError):
            return None
        return found if is_wanted and radii == terms.radii else None

    def work_left(self) -> int:
        if self.read() is not None:
            return 0
        terms = self.terms
        assert terms.radii is not None
        # Each step is a forward pass of every draw and a backward pass to the image.
        of_radius = terms.steps * terms.draws * 2 + terms.n
        images = min(terms.images, self.certified.config.certification.num_images or terms.images)
        return images * of_radius * sum(radius > 0 for radius in terms.radii)

    def run(self, console: Console) -> None:
        certified = self.certified
        attack_checkpoint(
            certified.model.checkpoint,
            certified.config,
            certified.rows,
            self.terms,
            console,
            self.result,
        )


def passes_of_round(plan: TrainingPlan) -> int:
    """Return the forward passes of single images that LocalTrain of one client is worth.

    A backward pass to the input alone counts as one more, one to weights and input as two.
    """
    attack, smoothing, training = plan.attack, plan.smoothing, plan.training
    if attack.estimator == "stochastic":
        of_step = 2
    else:
        of_step = 2 if attack.variance_reduction == "antithetic" else 1
    copies = smoothing.num_noise_vectors if smoothing.sigma > 0 else 1
    return training.local_steps * training.batch_size * copies * (attack.attack_steps * of_step + 3)
