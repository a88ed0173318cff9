"""Clean and noisy test accuracy of the global model, on the server."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedsmooth_core.config import RunConfig
from fedsmooth_core.data import ArrayDataset, ClientData
from fedsmooth_core.models import ModelSpec, build_model
from fedsmooth_core.seeding import Purpose, torch_generator
from fedsmooth_core.smoothing import draw_noise

_LOOK = 16
_LARGEST_LOGIT = 1e6  # classifiers that were trained at all stay below 1e3


class Evaluator:
    """Keeps the test set and one model on the device and scores states of that model.

    Noisy accuracy takes one draw an image at the level that will be certified, the same draws at
    every evaluation: differences between rounds are the model's, not the noise's.
    """

    def __init__(
        self, config: RunConfig, spec: ModelSpec, test_set: ArrayDataset, device: torch.device
    ) -> None:
        info = test_set.info
        self._config = config
        self._data = ClientData.from_dataset(test_set, None, device)
        self._model: nn.Module = build_model(spec, info.mean, info.std, torch.Generator()).to(
            device
        )
        self._model.eval()

    @torch.inference_mode()
    def problem(self, state: Mapping[str, Tensor]) -> str | None:
        """Say what is wrong with a state that makes no classifier of some test images, or None."""
        self._model.load_state_dict(state)
        x, _ = self._data.batch(
            torch.arange(min(_LOOK, len(self._data)), device=self._data.images.device)
        )
        largest = self._model(x).abs().max().item()
        if largest <= _LARGEST_LOGIT:  # false for NaN, too
            return None
        return f"on test images its model's outputs reach {largest:g}, which no classifier's do"

    @torch.inference_mode()
    def __call__(self, state: Mapping[str, Tensor]) -> dict[str, float]:
        """Return ``clean-accuracy`` and ``noisy-accuracy``, each in [0, 1]."""
        self._model.load_state_dict(state)
        device = self._data.images.device
        stream = torch_generator(self._config.seed, Purpose.EVALUATION, device=device)
        correct = torch.zeros(2, dtype=torch.int64, device=device)
        positions = torch.arange(len(self._data), device=device)
        for part in positions.split(self._config.evaluation.batch_size):
            x, labels = self._data.batch(part)
            noise = draw_noise(x, self._config.certified_sigma, 1, stream)
            predictions = self._model(torch.cat([x, x + noise[0]])).argmax(-1).unflatten(0, (2, -1))
            correct += (predictions == labels).sum(-1)
        clean, noisy = (correct.double() / len(self._data)).tolist()
        return {"clean-accuracy": clean, "noisy-accuracy": noisy}
