"""A round's replies made one model: checking and averaging them, beside Flower's FedAvg.

Flower's FedAvg gets what it gets in any Flower system: replies whose arrays are bytes. Ours gets the same
replies, or those of a simulation, whose arrays hold tensors. Ours checks every value of every reply before
it averages; Flower's averages whatever comes.

    python benchmarks/aggregation.py [--quick] [--device cpu] [-o FILE]

With one thread the seconds are CPU seconds, which another process's work does not count in.
"""

import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity
from harness import Headline, Section, Size, Timing, interleaved, main, peak_memory
from torch import Tensor

from client.tensor_array import tensor_record
from fedsmooth_core import wire
from fedsmooth_core.aggregation import weighted_mean
from fedsmooth_core.models import ModelSpec, build_model
from server.replies import GlobalModel, read_reply

State = dict[str, Tensor]

FLOWER = "Flower's FedAvg, bytes"
FLOWER_TENSORS = "Flower's FedAvg, tensors"
WIRE = "ours with its checks, bytes"
HELD = "ours with its checks, tensors"
MEAN = "the mean alone, separate tensors"
STACK = "the mean alone, slices of a stack"
READING = "reading as much memory (torch.sum)"
_MOST_EXAMPLES = 1_000_000


def run(size: Size, device: torch.device) -> Section:
    """Time one aggregation of the paper's cohort: 100 replies of the CIFAR AlexNet."""
    logging.getLogger("flwr").setLevel(logging.WARNING)
    # Flower's Message constructor reads who is speaking from here.
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    num_replies, rounds = (20, 3) if size is Size.QUICK else (100, 9)
    spec = ModelSpec("alexnet", "he", 10, 3, 32, 32)
    model = build_model(spec, [0.5] * 3, [0.2] * 3, torch.Generator().manual_seed(0))
    state = {key: tensor.to(device) for key, tensor in model.state_dict().items()}
    num_bytes = num_replies * sum(tensor.nbytes for tensor in state.values())
    candidates = _candidates(state, num_replies)

    rows: list[dict[str, Any]] = []
    headlines: list[Headline] = []
    own = torch.get_num_threads()
    memory = {key: peak_memory(call, device) for key, call in candidates.items()}
    try:
        for threads in sorted({1, own}):
            torch.set_num_threads(threads)
            clock = time.process_time if threads == 1 else time.perf_counter
            if device.type == "cuda":
                clock = time.perf_counter
            timings = interleaved(candidates, rounds, device, clock=clock)
            for what, target in ((MEAN, ">= 5x"), (HELD, ">= 5x")):
                ratio = timings[what].times_faster_than(timings[FLOWER])
                headlines.append(
                    Headline(
                        f"aggregation, {what}, against {FLOWER}; threads: {threads}",
                        str(ratio),
                        target,
                    )
                )
            rows += _rows(timings, threads, num_bytes, memory)
    finally:
        torch.set_num_threads(own)
    return Section(
        title=f"Aggregating {num_replies} replies of {num_bytes / num_replies / 1e6:.2f} MB",
        columns={
            "what": "What",
            "threads": "Threads",
            "median_seconds": "Seconds, median",
            "least_seconds": "least",
            "most_seconds": "most",
            "ratio": "Faster than Flower's, bytes",
            "gigabytes_per_second": "GB/s",
            "extra_megabytes": "Memory more, MB",
        },
        rows=rows,
        notes=[
            f"{rounds} rounds, all candidates in turns. One thread: CPU seconds; more: by the clock.",
            "GB/s: the replies' values, each counted once. Memory: at the peak, beside the replies.",
        ],
        headlines=headlines,
    )


def _candidates(state: State, num_replies: int) -> dict[str, Callable[[], object]]:
    stream = torch.Generator().manual_seed(1)
    stack = {
        key: torch.stack([_trained(tensor, stream) for _ in range(num_replies)])
        for key, tensor in state.items()
    }
    slices = [{key: rows[k] for key, rows in stack.items()} for k in range(num_replies)]
    states = [{key: tensor.clone() for key, tensor in one.items()} for one in slices]
    weights = [500 + k for k in range(num_replies)]
    as_bytes = [_reply(ArrayRecord(one), n) for one, n in zip(states, weights, strict=True)]
    as_tensors = [_reply(tensor_record(one), n) for one, n in zip(states, weights, strict=True)]

    def ours(replies: list[Message]) -> State:
        model = GlobalModel(state)
        checked = [read_reply(reply, model, _MOST_EXAMPLES)[0] for reply in replies]
        return weighted_mean(checked, weights)

    def read_all() -> list[Tensor]:
        return [rows.sum() for rows in stack.values() if rows.is_floating_point()]

    return {
        FLOWER: partial(FedAvg().aggregate_train, 1, as_bytes),
        FLOWER_TENSORS: partial(FedAvg().aggregate_train, 1, as_tensors),
        WIRE: partial(ours, as_bytes),
        HELD: partial(ours, as_tensors),
        MEAN: partial(weighted_mean, states, weights),
        STACK: partial(weighted_mean, slices, weights),
        READING: read_all,
    }


def _trained(tensor: Tensor, stream: torch.Generator) -> Tensor:
    """Return a tensor as some client's training might leave it; what is not trained stays."""
    if tensor.numel() <= 3 or not tensor.is_floating_point():
        return tensor.clone()
    return tensor + 0.01 * torch.randn(tensor.shape, generator=stream).to(tensor.device)


def _reply(arrays: ArrayRecord, num_examples: int) -> Message:
    metrics = MetricRecord(
        {name: num_examples if name == wire.NUM_EXAMPLES else 0.5 for name in wire.TRAIN_METRICS}
    )
    return Message(RecordDict({wire.ARRAYS: arrays, wire.METRICS: metrics}), 1, "train")


def _rows(
    timings: Mapping[str, Timing], threads: int, num_bytes: int, memory: Mapping[str, int | None]
) -> list[dict[str, Any]]:
    rows = []
    for what, timing in timings.items():
        extra = memory[what]
        rows.append(
            {
                "what": what,
                "threads": threads,
                **timing.record(),
                "ratio": str(timing.times_faster_than(timings[FLOWER])),
                "gigabytes_per_second": num_bytes / timing.median / 1e9,
                "extra_megabytes": None if extra is None else extra / 1e6,
            }
        )
    return rows


if __name__ == "__main__":
    main(__doc__ or "", run)
