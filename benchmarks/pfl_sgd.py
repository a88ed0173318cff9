"""Rounds of FedAvg with plain SGD: Apple's pfl, the plain loop and our engines, on the same clients.

pfl (pfl-research, PyPI `pfl`) has no SmoothAdv, so noise and attack are off (T = 0, sigma = 0). Each
candidate trains a cohort of AlexNets from the same weights and averages the results.

    python benchmarks/pfl_sgd.py [--quick] [--device cpu] [-o FILE]

pfl wants other versions of absl-py and attrs than Flower's: `make bench-peers` gives it an environment
of its own on top of this project's. Left out where pfl cannot be imported.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
import workload
from harness import Headline, Section, Size, fair_clock, interleaved, main
from torch import Tensor, nn

from fedsmooth_core.aggregation import weighted_mean
from fedsmooth_core.config import SmoothingConfig


def pfl_round(cohort: workload.Cohort, device: torch.device) -> Callable[[], object]:
    """Return what trains the cohort once in pfl's simulation, from the weights where it stands."""
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.data.dataset import Dataset
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.sampling import get_user_sampler
    from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
    from pfl.metrics import Weighted
    from pfl.model.pytorch import PyTorchModel

    os.environ["PFL_PYTORCH_DEVICE"] = str(device)  # else it takes CUDA wherever there is one

    class Classifier(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

        def loss(self, x: Tensor, labels: Tensor, **_: Any) -> Tensor:
            return F.cross_entropy(self.network(x), labels)

        def metrics(self, x: Tensor, labels: Tensor, **_: Any) -> dict[str, Any]:
            return {"none": Weighted(0, len(x))}  # pfl evaluates every user: here at no cost

    training = cohort.plan.training
    model = PyTorchModel(
        Classifier(cohort.model),
        lambda weights, lr: torch.optim.SGD(weights, lr=lr, momentum=training.momentum),
        torch.optim.SGD(cohort.model.parameters(), lr=1.0),
    )
    # As float32 from the start, which saves pfl the conversion of every batch.
    everything = {
        number: data.batch(torch.arange(len(data))) for number, data in enumerate(cohort.clients)
    }
    users = FederatedDataset(
        lambda number: Dataset(everything[number], user_id=str(number)),
        get_user_sampler("minimize_reuse", list(everything)),
    )
    backend = SimulatedBackend(training_data=users, val_data=users)
    parameters = NNAlgorithmParams(
        central_num_iterations=1,
        evaluation_frequency=1,
        train_cohort_size=len(everything),
        val_cohort_size=None,
    )
    local = NNTrainHyperParams(
        local_batch_size=training.batch_size,
        local_num_epochs=None,
        local_num_steps=training.local_steps,
        local_learning_rate=training.learning_rate,
    )
    evaluation = NNEvalHyperParams(local_batch_size=None)

    def train() -> None:
        FederatedAveraging().run(
            parameters, backend, model, local, evaluation, send_metrics_to_platform=False
        )

    return train


def run(size: Size, device: torch.device) -> Section:
    """Time rounds of plain SGD."""
    clients, steps, rounds = (2, 2, 1) if size is Size.QUICK else (4, 10, 7)
    if size is Size.FULL and device.type == "cuda":
        clients, steps, rounds = 100, 20, 5
    plan = replace(
        workload.paper_plan(attack_steps=0, local_steps=steps), smoothing=SmoothingConfig(sigma=0.0)
    )
    cohort = workload.Cohort.of(plan, clients, device)
    weights = [data.num_examples for data in cohort.clients]
    engine = workload.default_engine(device)
    candidates: dict[str, Callable[[], object]] = {
        "plain loop": lambda: weighted_mean(cohort.plain_loop(), weights),
        "our engine": lambda: weighted_mean(cohort.train(engine), weights),
    }
    left_out = {}
    if find_spec("pfl") is None:
        left_out["pfl"] = "It is not installed here: make bench-peers."
    else:
        candidates["pfl"] = pfl_round(cohort, device)
    clock, unit = fair_clock(device)
    timings = interleaved(candidates, rounds, device, clock=clock)
    rows, headlines = [], []
    for name, timing in timings.items():
        row = {"what": name, **timing.record()}
        row["local_step_ms"] = 1000 * timing.median / cohort.num_steps
        if "pfl" in timings:
            row["times_pfl"] = str(timing.times_faster_than(timings["pfl"]))
            if name != "pfl":
                headlines.append(Headline(f"plain SGD, {name} against pfl", row["times_pfl"]))
        rows.append(row)
    return Section(
        title="A round of plain SGD (no noise, no attack)",
        columns={
            "what": "What",
            "median_seconds": "Seconds, median",
            "least_seconds": "least",
            "most_seconds": "most",
            "local_step_ms": "ms a local step",
            "times_pfl": "Times as fast as pfl",
            "runs": "Runs",
        },
        rows=rows,
        notes=[
            f"{clients} clients, {steps} steps of {plan.training.batch_size} images, AlexNet, float32, "
            f"aggregation included, {torch.get_num_threads()} CPU threads, {unit}."
        ],
        left_out=left_out,
        headlines=headlines,
    )


if __name__ == "__main__":
    main(__doc__ or "", run)
