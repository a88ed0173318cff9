import itertools
import threading
import time
from dataclasses import replace

import pytest
import torch
from known_classifiers import random_images, small_network
from torch import nn

from fedsmooth_core.certification import procedure as procedure_module
from fedsmooth_core.certification import sharding
from fedsmooth_core.certification.procedure import Procedure, certify_images
from fedsmooth_core.errors import CertificationError

SHAPE = (3, 5, 5)


def rows_on(devices, *, model=None, count=40, batch_size=256, **changes):
    labels = torch.arange(count) % 10
    indices = range(0, 3 * count, 3)
    rows = certify_images(
        model or small_network(SHAPE),
        random_images(count, SHAPE),
        labels,
        indices,
        max_value=255,
        procedure=Procedure(n0=50, n=2000, radius_step=0.1, **changes),
        batch_size=batch_size,
        device=devices,
    )
    return rows


def untimed(rows):
    return [replace(row, time=0.0) for row in rows]


def workers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("certify-")]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["fixed", "sequential"])
def test_rows_do_not_depend_on_the_number_of_workers(method, precision):
    terms = {"method": method, "precision": precision}
    reference = untimed(rows_on("cpu", **terms))
    assert [row.idx for row in reference] == list(range(0, 120, 3))
    assert len({row.radius for row in reference}) > 3
    for number, batch_size in itertools.product((1, 2, 3), (128, 512, None)):
        rows = untimed(rows_on(["cpu"] * number, batch_size=batch_size, **terms))
        assert rows == reference
    assert not workers()


def test_all_workers_take_part_and_rows_nobody_takes_bound_them(monkeypatch):
    monkeypatch.setattr(sharding, "IMAGES_AHEAD", 4)
    threads = set()
    true = procedure_module.fixed_rows

    def noted(passes, handout, *args, **kwargs):
        for position, row in true(passes, handout, *args, **kwargs):
            threads.add(threading.current_thread().name)
            handed_out.append(position)
            yield position, row

    handed_out = []
    monkeypatch.setattr(procedure_module, "fixed_rows", noted)
    rows = rows_on(["cpu"] * 2, batch_size=128)
    next(rows)
    due = time.monotonic() + 10
    while len(handed_out) < 9 and time.monotonic() < due:
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(handed_out) == 9  # the first, and 4 for each of two
    assert len(list(rows)) == 39
    assert threads == {"certify-0", "certify-1"}


def test_threads_end_when_the_rows_are_dropped_and_the_number_of_threads_stays():
    torch.set_num_threads(2)
    rows = rows_on(["cpu"] * 2, count=100)
    next(rows)
    assert len(workers()) == 2
    rows.close()
    assert not workers()
    assert torch.get_num_threads() == 2


def test_an_error_of_a_worker_is_raised_and_all_end():
    model = small_network(SHAPE)
    nn.init.constant_(model[-1].bias, torch.nan)
    with pytest.raises(CertificationError, match="not finite"):
        list(rows_on(["cpu"] * 3, model=model))
    assert not workers()


def test_no_images_give_no_rows():
    assert list(rows_on(["cpu"] * 2, count=0)) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_several_gpus_give_the_rows_of_one():
    reference = untimed(rows_on("cuda:0"))
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    assert untimed(rows_on(devices + devices[:1])) == reference
