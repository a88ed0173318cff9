"""Certify a few images of this device's own, and count; nothing but the counts leaves it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from flwr.app import MetricRecord
from torch import Tensor, nn

from client.local_data import OwnImages
from fedsmooth_core import wire
from fedsmooth_core.certification.bounds import ABSTAIN
from fedsmooth_core.certification.procedure import Procedure, certify_images
from fedsmooth_core.config import from_flat
from fedsmooth_core.errors import ConfigError
from fedsmooth_core.seeding import Purpose, derive_seed

_BATCH_SIZE = 512
"""Noisy images in one forward pass where the device sets no limit; changes no certificate."""


@dataclass(frozen=True)
class Order:
    """What an evaluate message asks for."""

    procedure: Procedure
    num_images: int
    radii: list[float]
    """In [0, 1] pixel units, ascending."""

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> "Order":
        """Take an order from the ``config`` record of a message.

        Raises:
            ConfigError: when it is no order of this version.
        """
        prefix = wire.CERTIFY_PREFIX
        flat = {k.removeprefix(prefix): v for k, v in config.items() if k.startswith(prefix)}
        match config.get(wire.NUM_IMAGES), config.get(wire.RADII):
            case int(num_images), list(radii) if num_images > 0:
                return cls(from_flat(Procedure, flat), num_images, [float(r) for r in radii])
        raise ConfigError(
            f"The server's message does not say what to certify ({wire.NUM_IMAGES} and {wire.RADII}): "
            "server and client must be of the same version."
        )


def certified_counts(
    model: nn.Module,
    own: OwnImages,
    order: Order,
    client: int,
    max_batch: int | None,
    device: torch.device,
) -> MetricRecord:
    """Certify this client's images; return how many are certified to be right at each radius.

    The noise of an image is named by the run's seed, the client and the image's place, so it is the
    same in every round, and never that of another client's image.

    Args:
        model: on ``device``.
        own: the images.
        order: what is asked for.
        client: this client's number.
        max_batch: the most images that fit into one forward pass; None sets no limit.
        device: where to compute.

    Raises:
        CertificationError: when the model's scores are not finite.
    """
    seed = (
        derive_seed(order.procedure.seed, Purpose.ON_DEVICE, client) >> 1
    )  # below 2^62, as a run's
    rows = list(
        certify_images(
            model if max_batch is None else _InParts(model, max_batch),
            own.data.images,
            own.data.labels,
            own.indices,
            max_value=own.data.max_value,
            procedure=replace(order.procedure, seed=seed),
            batch_size=_BATCH_SIZE if max_batch is None else max_batch,
            device=device,
        )
    )
    certified = np.array([row.radius for row in rows if row.correct and row.predict != ABSTAIN])
    correct = (certified >= np.array(order.radii)[:, np.newaxis]).sum(axis=1)
    return MetricRecord(
        {
            wire.NUM_EXAMPLES: len(rows),
            wire.HELD_OUT: len(rows) if own.are_held_out else 0,
            wire.ABSTAINED: sum(row.predict == ABSTAIN for row in rows),
            wire.CORRECT: correct.tolist(),
        }
    )


class _InParts(nn.Module):
    """A model that sees no more images at once than fit: a block of noise may be more than that."""

    def __init__(self, model: nn.Module, max_batch: int) -> None:
        super().__init__()
        self._model, self._max_batch = model, max_batch

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([self._model(part) for part in images.split(self._max_batch)])
