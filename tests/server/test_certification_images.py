"""The service's images: opened once, in few sizes, and nobody waits for those of another."""

import dataclasses
import threading

import pytest
from certification_harness import SPEC, serving, terms, weights

from fedsmooth_core.checkpoint import save_checkpoint
from fedsmooth_core.config import CertificationConfig, DatasetConfig, RunConfig, to_nested
from fedsmooth_core.data import load_dataset
from fedsmooth_core.errors import DataError, ServiceError, ServiceUnreachableError
from server.certification import datasets as module
from server.certification.datasets import Datasets
from server.certification.jobs import JobTerms
from server.certification.limits import Limits
from server.service_jobs import submit_checkpoint


class Loading:
    """Stands for the decoding of folders: it counts, and blocks while told to. Digits are digits."""

    def __init__(self):
        self.loads = []
        self.running = 0
        self.most = 0
        self.started = threading.Event()
        self.may_end = threading.Event()
        self.may_end.set()
        self.problem = None

    def __call__(self, config, split):
        if config.name == "digits":
            return load_dataset(config, split)
        self.loads.append(config.image_size)
        self.running += 1
        self.most = max(self.most, self.running)
        self.started.set()
        assert self.may_end.wait(30)
        self.running -= 1
        if self.problem:
            raise self.problem
        return load_dataset(dataclasses.replace(config, name="digits", image_size=None), split)


@pytest.fixture
def loading(monkeypatch):
    loading = Loading()
    monkeypatch.setattr(module, "load_dataset", loading)
    yield loading
    loading.may_end.set()


def test_nobody_waits_for_the_opening_of_a_set_that_he_has_not_asked_for(tmp_path, loading):
    datasets = Datasets({"pets": tmp_path, "birds": tmp_path})
    loading.may_end.clear()
    asked = datasets.ask("pets", None, 4)
    assert loading.started.wait(10)
    # Neither another call nor the engine, which opens for itself.
    assert len(datasets.ask("digits", None, 4).result(10)) == len(datasets.test_set("digits"))
    assert not asked.done()
    loading.may_end.set()
    first = asked.result(10)
    assert datasets.ask("pets", None, 4).result(0) is first
    assert datasets.test_set("pets") is first
    assert loading.loads == [None]


def test_folders_are_opened_one_after_the_other_and_each_once(tmp_path, loading):
    datasets = Datasets({"pets": tmp_path})
    loading.may_end.clear()
    asked = [datasets.ask("pets", size, 3) for size in (8, 9, 8, 10)]
    assert loading.started.wait(10)
    loading.may_end.set()
    found = [one.result(10) for one in asked]
    assert found[0] is found[2]
    assert sorted(loading.loads) == [8, 9, 10]
    assert loading.most == 1


def test_the_images_of_a_folder_are_open_in_few_sizes(tmp_path, loading):
    datasets = Datasets({"pets": tmp_path, "birds": tmp_path})
    loading.may_end.clear()
    asked = [datasets.ask("pets", size, 2) for size in (None, 8)]
    # Those that are being opened count, and those that are open.
    with pytest.raises(ServiceError, match=r"2 sizes already \(8, its own\)") as refused:
        datasets.ask("pets", 9, 2)
    assert refused.value.status == "RESOURCE_EXHAUSTED"
    loading.may_end.set()
    assert [one.result(10) is not None for one in asked] == [True, True]
    with pytest.raises(ServiceError, match="2 sizes already"):
        datasets.ask("pets", 9, 2)
    datasets.ask("pets", 8, 2).result(0)
    datasets.ask("birds", 9, 2).result(10)


def test_images_that_could_not_be_read_are_tried_again(tmp_path, loading):
    datasets = Datasets({"pets": tmp_path})
    loading.problem = DataError("an image is damaged: remove it.")
    with pytest.raises(DataError, match="damaged"):
        datasets.ask("pets", 8, 1).result(10)
    loading.problem = None
    # What failed takes no place.
    assert len(datasets.ask("pets", 9, 1).result(10))


def test_a_submission_waits_for_images_for_a_bounded_time(tmp_path, loading):
    wanted = JobTerms("pets", terms().procedure, num_images=4)
    with (
        serving(
            tmp_path / "service",
            data={"pets": tmp_path},
            limits=Limits(opening_seconds=0.2),
        ) as service,
        service.client() as client,
    ):
        loading.may_end.clear()
        with pytest.raises(ServiceUnreachableError, match="being opened") as refused:
            client.submit(SPEC, wanted, weights())
        assert refused.value.status == "UNAVAILABLE"
        *_, last = client.watch(client.submit(SPEC, terms(), weights()).key)
        assert last.job.images_done == 4
        loading.may_end.set()
        service.server._datasets.ask("pets", None, 4).result(10)
        assert client.submit(SPEC, wanted, weights()).num_images == 4
    assert loading.loads == [None]


def test_all_images_and_their_number_are_one_job(tmp_path):
    total = len(load_dataset(DatasetConfig("digits"), "test"))
    with serving(tmp_path) as service, service.client() as client:
        first = client.submit(SPEC, terms(num_images=None), weights())
        client.cancel(first.key)
        again = client.submit(SPEC, terms(num_images=total), weights())
        client.cancel(first.key)
        assert (again.key, again.terms.num_images, again.num_images) == (first.key, None, total)


@pytest.mark.parametrize("all_of_them", [True, False])
def test_a_run_may_name_the_number_of_all_images(tmp_path, all_of_them):
    num_images = len(load_dataset(DatasetConfig("digits"), "test")) if all_of_them else 4
    config = dataclasses.replace(
        RunConfig(),
        dataset=DatasetConfig("digits"),
        certification=CertificationConfig(num_images=num_images),
    )
    metadata = {"model": to_nested(SPEC), "dataset": {"fingerprint": ""}}
    path = tmp_path / "round-0001.safetensors"
    save_checkpoint(path, weights(), metadata)
    with serving(tmp_path / "service") as service, service.client() as client:
        job = submit_checkpoint(client, path, config)
        client.cancel(job.key)
    assert job.num_images == num_images
    assert (job.terms.num_images is None) == all_of_them
