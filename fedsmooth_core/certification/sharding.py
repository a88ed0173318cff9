"""Certification on several devices at a time: a thread for each, images as they come, rows in order."""

import copy
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import nn

from fedsmooth_core.certification.handout import Handout, in_order
from fedsmooth_core.certification.passes import Passes, StoppedError
from fedsmooth_core.certification.row_format import CertifiedRow

IMAGES_AHEAD = 64
"""Images for each device that are handed out and whose rows nobody has taken, at most."""

Rows = Iterator[tuple[int, CertifiedRow]]


def rows_of_all(
    devices: Sequence[torch.device],
    model: nn.Module,
    num_images: int,
    passes_of: Callable[[nn.Module, torch.device], Passes],
    rows_of: Callable[[Passes, Handout], Rows],
) -> Iterator[CertifiedRow]:
    """Certify images on several devices; yield their rows in order.

    Each device has a thread, and a CPU as many as it is named times, which share its threads of PyTorch.
    When the result is dropped, or a thread raises, all threads end after their pass under way.

    Args:
        devices: at least two.
        model: from :func:`~fedsmooth_core.certification.precision.in_precision`: threads share it on a
            CPU, and each CUDA device has a copy.
        num_images: how many there are.
        passes_of: makes the passes of a model on a device.
        rows_of: certifies what is handed out, by passes.

    Raises:
        Exception: the first that a thread raised.
    """
    handout = Handout(num_images, IMAGES_AHEAD * len(devices), len(devices))
    all_passes = [passes_of(_on(model, device), device) for device in devices]
    results: queue.SimpleQueue[tuple[int, CertifiedRow] | BaseException | None]
    results = queue.SimpleQueue()
    num_cpu_threads = torch.get_num_threads()
    cores_each = max(1, num_cpu_threads // len(devices))

    def work(passes: Passes) -> None:
        is_cuda = passes.device.type == "cuda"
        if not is_cuda:
            torch.set_num_threads(cores_each)  # OpenMP's: of this thread alone
        try:
            with torch.cuda.device(passes.device) if is_cuda else nullcontext():
                for row in rows_of(passes, handout):
                    results.put(row)
        except StoppedError:
            pass
        except BaseException as error:
            results.put(error)
        results.put(None)

    threads = [
        threading.Thread(target=work, args=(passes,), name=f"certify-{i}", daemon=True)
        for i, passes in enumerate(all_passes)
    ]
    for thread in threads:
        thread.start()
    try:
        for row in in_order(_until_all_end(results, len(threads))):
            handout.advance()
            yield row
    finally:
        handout.close()
        for passes in all_passes:
            passes.stop.set()
        for thread in threads:
            thread.join()
        # MKL keeps one number for all threads.
        torch.set_num_threads(num_cpu_threads)


def _on(model: nn.Module, device: torch.device) -> nn.Module:
    return model if device.type == "cpu" else copy.deepcopy(model).to(device)


def _until_all_end(
    results: "queue.SimpleQueue[tuple[int, CertifiedRow] | BaseException | None]", num_threads: int
) -> Rows:
    num_ended = 0
    while num_ended < num_threads:
        match results.get():
            case None:
                num_ended += 1
            case BaseException() as error:
                raise error
            case position, row:
                yield position, row
