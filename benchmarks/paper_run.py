"""The paper's run, whole: 150 rounds of 100 of 1000 clients, with evaluation, by our engine.

Sampling, training, the weighted mean and the test accuracies of every fifth round are inside the clock;
data and model are on the device before it starts, and nothing is written to disk. One run is one shot:
the seconds of the single rounds show the spread.

    python benchmarks/paper_run.py [--quick] [--device cuda] [-o FILE]

A CPU takes hours for it, so there the full size is left out.
"""

import time

import torch
import workload
from harness import Headline, Section, Size, Timing, main, peak_memory

from fedsmooth_core.aggregation import weighted_mean
from fedsmooth_core.cohort import CohortTrainer
from fedsmooth_core.config import EvaluationConfig, FederationConfig, PartitionConfig, RunConfig
from fedsmooth_core.data import ClientData, client_indices
from server.evaluation import Evaluator
from server.sampling import sample_cohort

_TITLE = "The paper's run: AlexNet, m = 2, T = 2, B = 30, stochastic, evaluation included"
_COLUMNS = {
    "what": "Precision",
    "total_seconds": "Seconds in all",
    "median_seconds": "Seconds a round, median",
    "least_seconds": "least",
    "most_seconds": "most",
    "memory_mb": "Memory, MB",
    "clean": "Clean test accuracy",
    "noisy": "Noisy test accuracy",
    "runs": "Rounds",
}


def paper_config(size: Size = Size.FULL) -> RunConfig:
    """Return the paper's setting, or a toy of it."""
    rounds, clients, samples, fraction, steps = 150, 1000, 500, 0.1, 20
    if size is Size.QUICK:
        rounds, clients, samples, fraction, steps = 2, 4, 20, 0.5, 1
    plan = workload.paper_plan(local_steps=steps)
    return RunConfig(
        model=plan.model,
        attack=plan.attack,
        training=plan.training,
        partition=PartitionConfig(num_clients=clients, samples_per_client=samples),
        federation=FederationConfig(num_rounds=rounds, cohort_fraction=fraction),
        evaluation=EvaluationConfig(every=5 if size is Size.FULL else 1),
    )


class _Federation:
    """The clients on the device, and the global model."""

    def __init__(self, config: RunConfig, size: Size, device: torch.device) -> None:
        train, test = (50_000, 10_000) if size is Size.FULL else (200, 20)
        self.config, self.device = config, device
        dataset = workload.random_images(train)
        self.spec = workload.model_spec(config.plan, dataset)
        self.clients = [
            ClientData.from_dataset(
                dataset, client_indices(dataset.labels, config.partition, config.seed, k), device
            )
            for k in range(config.partition.num_clients)
        ]
        self.model = workload.new_model(self.spec, dataset.info, device)
        self.state = {name: value.clone() for name, value in self.model.state_dict().items()}
        test_set = workload.random_images(test, "test")
        self.evaluate = Evaluator(config, self.spec, test_set, device)
        self.accuracies: dict[str, float] = {}

    @property
    def megabytes(self) -> float:
        """Of the clients' images on the device."""
        return sum(data.images.nbytes for data in self.clients) / 1e6

    def train(self, engine: CohortTrainer, num_rounds: int) -> Timing:
        """Train from the initial weights; return the seconds of each round."""
        config, model = self.config, self.model
        state = self.state
        everybody = range(config.partition.num_clients)
        seconds = []
        for server_round in range(1, num_rounds + 1):
            started = time.perf_counter()
            chosen = sample_cohort(everybody, config.cohort_size, config.seed, server_round)
            clients = [self.clients[number] for number in chosen]
            cohort = workload.Cohort(
                config.plan, self.spec, model, state, clients, chosen, server_round
            )
            weights = [data.num_examples for data in clients]
            state = weighted_mean(cohort.train(engine), weights)
            if server_round == num_rounds or server_round % config.evaluation.every == 0:
                self.accuracies = self.evaluate(state)
            elif self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            seconds.append(time.perf_counter() - started)
        return Timing(tuple(seconds))


def run(size: Size, device: torch.device) -> Section:
    """Run it in each precision."""
    if size is Size.FULL and device.type == "cpu":
        why = "It takes hours on a CPU: see the seconds a round of training.py."
        return Section(_TITLE, _COLUMNS, [], left_out={"150 rounds": why})
    config = paper_config(size)
    federation = _Federation(config, size, device)
    rows, headlines = [], []
    for precision in workload.precisions(device)[-2:]:
        engine = workload.default_engine(device, precision)
        federation.train(engine, num_rounds=1)  # it plans, captures and allocates, once a process
        results: list[Timing] = []

        def train(engine: CohortTrainer = engine, results: list[Timing] = results) -> None:
            results.append(federation.train(engine, config.federation.num_rounds))

        memory = peak_memory(train, device)
        (timing,) = results
        total = sum(timing.seconds)
        rows.append(
            {
                "what": precision,
                "total_seconds": total,
                "memory_mb": None if memory is None else memory / 1e6,
                "clean": federation.accuracies["clean-accuracy"],
                "noisy": federation.accuracies["noisy-accuracy"],
                **timing.record(),
            }
        )
        rounds = config.federation.num_rounds
        target = "< 60 s on an H200" if size is Size.FULL else ""
        headlines.append(
            Headline(f"{rounds} rounds with evaluation, {precision}", f"{total:.1f} s", target)
        )
    return Section(
        title=_TITLE,
        columns=_COLUMNS,
        rows=rows,
        notes=[
            f"{config.cohort_size} of {config.partition.num_clients} clients a round, "
            f"E = {config.training.local_steps}, evaluation every {config.evaluation.every} rounds. "
            f"Memory: beyond the clients' images, which take {federation.megabytes:,.0f} MB. "
            "Images are random, a pattern for each class: their accuracy says that it trains, no more."
        ],
        headlines=headlines,
    )


if __name__ == "__main__":
    main(__doc__ or "", run)
