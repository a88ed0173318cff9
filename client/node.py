"""What one machine knows about itself: the facts in its SuperNode's node configuration.

Hyper-parameters are no facts of a machine: they come from the server alone, with every message.
PyTorch is imported when a device is prepared, and no sooner: who only checks the facts need not wait.
"""

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fedsmooth_core import wire
from fedsmooth_core.config import Scalar
from fedsmooth_core.errors import ConfigError
from fedsmooth_core.limits import DeviceLimits

if TYPE_CHECKING:
    import torch

_KNOWN = (
    wire.PARTITION_ID,
    wire.NUM_PARTITIONS,
    wire.DATA_PATH,
    wire.DATASET_ROOT,
    wire.DEVICE,
    wire.THREADS,
    wire.MAX_BATCH,
    wire.BF16,
    wire.TF32,
    wire.ENGINE,
)

_THREADS_PER_CORE = 4  # more are of no use, and thousands of them crash PyTorch

_PAIR = r"""\S+?=('[^']*'|"[^"]*"|\S+)"""  # as Flower reads it

OUT_OF_MEMORY = (
    f"This device's accelerator ran out of memory: set a smaller {wire.MAX_BATCH} in its node "
    f'configuration, or {wire.DEVICE}="cpu".'
)


@dataclass(frozen=True)
class NodeFacts:
    """The facts of one node, as ``flower-supernode --node-config "key=value ..."`` gives them.

    A node trains on its own images (``data_path``), on a partition of the federation's data set that
    it names itself (``partition``), or on the partition whose number the server hands out (neither).
    """

    partition: tuple[int, int] | None = None
    """(partition-id, num-partitions)."""
    data_path: str | None = None
    """Folder that holds train/<class>/*."""
    dataset_root: str | None = None
    """Where this machine keeps the federation's data set; None takes the server's ``dataset.root``."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:K."""
    threads: int | None = None
    """CPU threads of PyTorch; None leaves its default."""
    limits: DeviceLimits = field(default_factory=DeviceLimits)
    """The largest batch that fits, and the precision."""
    engine: str = "auto"
    """How local training is computed: see ``fedsmooth_core.cohort``."""

    @classmethod
    def read(cls, node_config: Mapping[str, Scalar]) -> "NodeFacts":
        """Check a node configuration.

        Raises:
            ConfigError: for an unknown key, a value that a key does not allow, or keys that exclude
                each other.
        """
        for key in node_config:
            if key not in _KNOWN:
                near = difflib.get_close_matches(key, _KNOWN, n=1)
                hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(_KNOWN)}."
                raise ConfigError(
                    f"{key} is no fact of this node's configuration (hyper-parameters come from the "
                    f"server alone): {hint}"
                )
        facts = cls(
            partition=_partition(node_config),
            data_path=_text(node_config, wire.DATA_PATH),
            dataset_root=_text(node_config, wire.DATASET_ROOT),
            device=_text(node_config, wire.DEVICE) or cls.device,
            threads=_threads(node_config),
            limits=DeviceLimits(
                max_batch=_count(node_config, wire.MAX_BATCH),
                bf16=_flag(node_config, wire.BF16),
                tf32=_flag(node_config, wire.TF32),
            ),
            engine=_text(node_config, wire.ENGINE) or cls.engine,
        )
        if facts.data_path is not None and facts.partition is not None:
            raise ConfigError(
                "This node's configuration gives both a partition and a data path: give "
                f"'{wire.PARTITION_ID}=K {wire.NUM_PARTITIONS}=N' for a part of the federation's data "
                f"set, '{wire.DATA_PATH}=\"...\"' for images of its own, or neither."
            )
        if facts.data_path is not None and facts.dataset_root is not None:
            raise ConfigError(
                f"This node's configuration gives both {wire.DATA_PATH} (images of its own) and "
                f"{wire.DATASET_ROOT} (its copy of the federation's data set): give one of them."
            )
        return facts

    @classmethod
    def parse(cls, text: str) -> "NodeFacts":
        """Check a node configuration as it stands on a command line.

        Raises:
            ConfigError: as :meth:`read` does, and for what is no list of key=value.
        """
        # Imported here: a ClientApp is started for every message, and never comes here.
        import click
        from flwr.common.config import parse_config_args

        # Flower passes over what is no pair; a word too many is a mistake of somebody who is asked here.
        rest = "" if text.endswith(".toml") else re.sub(_PAIR, "", text).strip()
        try:
            config = parse_config_args([text])
        except (click.ClickException, OSError, ValueError):
            rest = text
            config = {}
        if rest:
            raise ConfigError(
                f"{rest!r} in the node configuration cannot be read: give key=value pairs separated by "
                "spaces, texts in double quotes, e.g. 'data-path=\"/data/images\" threads=2'."
            )
        return cls.read(config)

    def prepare(self) -> "torch.device":
        """Set this process's threads and return the device to compute on.

        Raises:
            ConfigError: for a device that is not there, or that cannot do what the facts ask for.
        """
        import torch

        from fedsmooth_core.device import choose_device

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        device = choose_device(self.device)
        if self.limits.bf16 and device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
            raise ConfigError(
                f"{wire.BF16}=true, but {torch.cuda.get_device_name(device)} cannot compute in bfloat16: "
                f"remove {wire.BF16} from this node's configuration."
            )
        return device


def _partition(config: Mapping[str, Scalar]) -> tuple[int, int] | None:
    if wire.PARTITION_ID not in config and wire.NUM_PARTITIONS not in config:
        return None
    number, total = config.get(wire.PARTITION_ID), config.get(wire.NUM_PARTITIONS)
    if type(number) is int and type(total) is int and 0 <= number < total:
        return number, total
    raise ConfigError(
        f"This node's {wire.PARTITION_ID}={number} and {wire.NUM_PARTITIONS}={total} are no "
        f"partition: allowed are two integers with 0 <= {wire.PARTITION_ID} < {wire.NUM_PARTITIONS}."
    )


def _text(config: Mapping[str, Scalar], key: str) -> str | None:
    value = config.get(key)
    if value is None or (isinstance(value, str) and value):
        return value
    raise ConfigError(f'{key}={value!r} in this node\'s configuration: allowed is {key}="a text".')


def _count(config: Mapping[str, Scalar], key: str) -> int | None:
    value = config.get(key)
    if value is None or (type(value) is int and value >= 1):
        return value
    raise ConfigError(f"{key}={value!r} in this node's configuration: allowed is an integer >= 1.")


def _threads(config: Mapping[str, Scalar]) -> int | None:
    value = _count(config, wire.THREADS)
    cores = os.cpu_count() or 1
    if value is not None and value > _THREADS_PER_CORE * cores:
        raise ConfigError(
            f"{wire.THREADS}={value} in this node's configuration: allowed is an integer in 1 to "
            f"{_THREADS_PER_CORE * cores}, {_THREADS_PER_CORE} for each CPU core of this machine."
        )
    return value


def _flag(config: Mapping[str, Scalar], key: str) -> bool:
    value = config.get(key, False)
    if isinstance(value, bool):
        return value
    raise ConfigError(f"{key}={value!r} in this node's configuration: allowed is true or false.")
