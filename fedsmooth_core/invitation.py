"""What a device may know of a federation before it joins: enough to check itself, and no secret."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsmooth_core.config import TrainingPlan, from_flat, to_flat
from fedsmooth_core.durable import write_atomically
from fedsmooth_core.errors import ConfigError
from fedsmooth_core.models import ModelSpec


@dataclass(frozen=True)
class Invitation:
    """What every train message repeats, and what the server takes at most."""

    class_names: tuple[str, ...]
    plan: TrainingPlan
    spec: ModelSpec
    max_num_examples: int
    """The most images that the server believes one device to have trained on."""

    def write(self, path: Path) -> None:
        """Write it as JSON, atomically."""
        facts = {
            "class-names": self.class_names,
            "plan": to_flat(self.plan),
            "spec": to_flat(self.spec),
            "max-num-examples": self.max_num_examples,
        }
        write_atomically(path, (json.dumps(facts, indent=1) + "\n").encode())

    @classmethod
    def read(cls, path: Path) -> "Invitation":
        """Read what :meth:`write` wrote.

        Raises:
            ConfigError: when the file cannot be read, contradicts itself, or is of another version.
        """
        try:
            facts: Any = json.loads(path.read_text(encoding="utf-8"))
            names = tuple(str(name) for name in facts["class-names"])
            plan, spec = dict(facts["plan"]), dict(facts["spec"])
            cap = facts["max-num-examples"]
            if type(cap) is not int or cap < 1:
                raise ValueError(cap)
        except OSError as error:
            raise ConfigError(
                f"{path} cannot be read ({error.strerror}): ask the federation's operator for the "
                "federation.json that `fedsmooth invite` wrote."
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path} is no invitation to a federation, or one of an older version: ask its operator "
                "for the federation.json that `fedsmooth invite` wrote."
            ) from error
        try:
            invitation = cls(names, from_flat(TrainingPlan, plan), from_flat(ModelSpec, spec), cap)
        except ConfigError as error:
            raise ConfigError(
                f"{path} was written by another version of this program: install the server's version "
                f"on this device ({str(error).rstrip('.?')})."
            ) from error
        if not len(set(names)) == len(names) == invitation.spec.num_classes:
            raise ConfigError(
                f"{path} was changed after it was written: it names the classes {', '.join(names)}, but "
                f"its model has {invitation.spec.num_classes} classes; ask the federation's operator for "
                "the federation.json that `fedsmooth invite` wrote."
            )
        return invitation
