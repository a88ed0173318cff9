"""The service, driven by its Python client and by a client that knows nothing but reflection."""

import asyncio
import base64
import resource
import socket
import stat
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
import safetensors.torch
import torch
from certification_harness import SPEC, Running, serving, terms, weights
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from fedsmooth_core.certification.analysis import Rows, summary
from fedsmooth_core.certification.procedure import certify_images
from fedsmooth_core.certification.subset import subset_indices
from fedsmooth_core.checkpoint import state_sha256
from fedsmooth_core.config import DatasetConfig
from fedsmooth_core.data import load_dataset
from fedsmooth_core.errors import ServiceError, ServiceUnreachableError
from fedsmooth_core.models import build_model
from server.certification.guard import CALLER, Caller
from server.certification.jobs import JobState, Submission
from server.certification.main import NAME, _take_all_descriptors

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 1, 8, 8), np.uint8)


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("service"), http="127.0.0.1:0") as running:
        yield running


@pytest.fixture
def client(service):
    with service.client() as client:
        yield client


def _last(progress):
    *_, last = progress
    return last


def _local_rows(state, job_terms):
    """What local certification says, without its seconds."""
    model = build_model(SPEC, [1.0], [1.0], torch.Generator())
    model.load_state_dict(state)
    images = load_dataset(DatasetConfig("digits"), "test")
    indices = list(subset_indices(len(images), job_terms.num_images))
    rows = certify_images(
        model,
        torch.from_numpy(images.images[indices]),
        torch.from_numpy(images.labels[indices]),
        indices,
        max_value=images.info.max_value,
        procedure=job_terms.procedure,
        batch_size=512,
        device="cpu",
    )
    return [_without_seconds(row) for row in rows]


def _without_seconds(row):
    return (row.idx, row.label, row.predict, row.radius, row.correct, row.n)


# --------------------------------------------------------------------------------------------------
# The Python client


@pytest.mark.parametrize("method", ["fixed", "sequential"])
def test_a_submitted_model_gets_the_rows_of_local_certification(client, method):
    state, wanted = weights(1), terms(method=method, n=300)
    job = client.submit(SPEC, wanted, state, Submission("run one", 7))
    assert (job.terms, job.spec.name, job.num_images) == (wanted, "small_cnn", 4)
    assert job.weights == state_sha256(state)
    assert job.submissions == (Submission("run one", 7),)
    last = _last(client.watch(job.key))
    assert last.job.state is JobState.DONE
    rows, job = client.fetch(job.key)
    assert [_without_seconds(row) for row in rows] == _local_rows(state, wanted)
    radii = [one["radius"] for one in last.summary["certified_accuracy"]]
    assert last.summary == summary(Rows.of(rows), radii)
    assert radii[:2] == [0, 0.25]


def test_submitting_twice_is_one_job(client):
    state = weights(2)
    first = client.submit(SPEC, terms(), state, Submission("a", 1))
    again = client.submit(SPEC, terms(), safetensors.torch.save(state), Submission("b", 5))
    assert again.key == first.key
    assert again.submissions == (Submission("a", 1), Submission("b", 5))
    assert client.submit(SPEC, terms(seed=1), state).key != first.key


def test_watching_brings_every_row_once_also_to_whoever_comes_back(client):
    job = client.submit(SPEC, terms(num_images=30, n=300), weights(3))
    seen, states = [], []
    for progress in client.watch(job.key):
        seen += progress.new_rows
        states.append(progress.job.state)
        assert progress.job.images_done == len(seen) == progress.summary["num_images"]
        if 0 < len(seen) < 30:
            assert progress.seconds_left > 0
            break  # hangs up; the service goes on
    for progress in client.watch(job.key, rows_seen=len(seen)):
        seen += progress.new_rows
    assert progress.job.state is JobState.DONE
    rows, _ = client.fetch(job.key)
    assert [row.idx for row in seen] == [row.idx for row in rows]
    assert sorted(rows, key=lambda row: row.idx) == rows
    assert _last(client.watch(job.key)).new_rows == seen


def test_jobs_are_listed_by_run_and_state_the_latest_first(client):
    keys = [
        client.submit(SPEC, terms(), weights(10 + i), Submission("listed", i)).key for i in range(3)
    ]
    for key in keys:
        _last(client.watch(key))
    assert [job.key for job in client.jobs(run="listed")] == keys[::-1]
    assert [job.key for job in client.jobs(run="listed", limit=2)] == keys[:0:-1]
    assert client.jobs(run="listed", states=[JobState.FAILED]) == []
    assert len(client.jobs(run="listed", states=[JobState.DONE, JobState.FAILED])) == 3


def test_a_job_is_cancelled_and_queued_again(client):
    job = client.submit(SPEC, terms(num_images=300, n=100_000), weights(4))
    assert client.cancel(job.key).state is JobState.CANCELLED
    assert _last(client.watch(job.key)).job.state is JobState.CANCELLED
    assert client.cancel(job.key).state is JobState.CANCELLED
    assert not client.submit(SPEC, job.terms, weights(4)).state.has_ended
    client.cancel(job.key)


def test_cancelling_a_job_that_is_done_leaves_it_as_it_is(client):
    job = client.submit(SPEC, terms(), weights(5))
    _last(client.watch(job.key))
    assert client.cancel(job.key).state is JobState.DONE


def test_a_model_that_cannot_be_certified_fails_with_a_sentence(client):
    state = weights(6)
    state = {name: value * 1e20 if value.ndim > 1 else value for name, value in state.items()}
    state["normalise.mean"] = weights()["normalise.mean"]
    state["normalise.std"] = weights()["normalise.std"]
    job = _last(client.watch(client.submit(SPEC, terms(), state).key)).job
    assert job.state is JobState.FAILED
    assert "not finite" in job.problem
    with pytest.raises(ServiceError, match="not finite") as refused:
        client.predict(job.key, IMAGES, n=100, alpha=0.01)
    assert refused.value.status == "FAILED_PRECONDITION"


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_smoothed_classifier_answers(client, precision):
    job = client.submit(SPEC, terms(precision=precision), weights(7))
    for model in (job.key, job.weights):
        predicted = client.predict(model, IMAGES, n=300, alpha=0.01, seed=3)
        assert predicted == client.predict(model, IMAGES, n=300, alpha=0.01, seed=3)
        certified = client.certify(model, IMAGES, n0=20, n=300, alpha=0.01, seed=3)
        for answer, certificate in zip(predicted, certified, strict=True):
            assert answer.radius is None
            assert (certificate.label == -1) == (certificate.radius == 0)
            assert certificate.class_name in ("", str(certificate.label))
            if -1 not in (answer.label, certificate.label):
                assert answer.label == certificate.label
    # Images are 8-bit here and everywhere: certification of the same pixels says the same.
    model = build_model(SPEC, [1.0], [1.0], torch.Generator())
    model.load_state_dict(weights(7))
    rows = certify_images(
        model,
        torch.from_numpy(IMAGES),
        torch.zeros(3, dtype=torch.int64),
        range(3),
        max_value=255,
        procedure=terms(n0=20, n=300, alpha=0.01, seed=3, precision=precision).procedure,
        batch_size=512,
        device="cpu",
    )
    found = [(one.label, one.radius) for one in certified]
    assert found == [(row.predict, row.radius) for row in rows]


def test_fresh_noise_is_never_the_same(client, monkeypatch):
    job, seeds = client.submit(SPEC, terms(), weights(8)), []

    def predict(*arguments, seed, **others):
        seeds.append(seed)
        return np.zeros(3, np.int64)

    monkeypatch.setattr("server.certification.online.predict", predict)
    for _ in range(3):
        client.predict(job.key, IMAGES, n=10, alpha=0.01)
    assert len(set(seeds)) == 3
    client.predict(job.key, IMAGES, n=10, alpha=0.01, seed=0)
    assert seeds[-1] == 0


# --------------------------------------------------------------------------------------------------
# A client that knows an address alone


class Reflected:
    """Calls whatever a server says that it can, as grpcurl does: messages are plain dicts."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel
        self._ask = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
        self._pool = descriptor_pool.DescriptorPool()

    def services(self) -> list[str]:
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        (response,) = self._ask(iter([request]))
        return [service.name for service in response.list_services_response.service]

    def learn(self, service: str) -> None:
        request = reflection_pb2.ServerReflectionRequest(file_containing_symbol=service)
        (response,) = self._ask(iter([request]))
        files = [
            descriptor_pb2.FileDescriptorProto.FromString(data)
            for data in response.file_descriptor_response.file_descriptor_proto
        ]
        for file in sorted(files, key=lambda file: len(file.dependency)):
            self._pool.Add(file)
        self._service = self._pool.FindServiceByName(service)

    def call(self, name: str, *requests: dict[str, Any]) -> list[dict[str, Any]]:
        method = self._service.methods_by_name[name]
        request_class = message_factory.GetMessageClass(method.input_type)
        response_class = message_factory.GetMessageClass(method.output_type)
        kind = (
            f"{'stream' if method.client_streaming else 'unary'}_"
            f"{'stream' if method.server_streaming else 'unary'}"
        )
        call = getattr(self._channel, kind)(
            f"/{self._service.full_name}/{name}",
            request_serializer=request_class.SerializeToString,
            response_deserializer=response_class.FromString,
        )
        messages = [json_format.ParseDict(request, request_class()) for request in requests]
        found = call(iter(messages) if method.client_streaming else messages[0])
        return [
            json_format.MessageToDict(one, preserving_proto_field_name=True)
            for one in (found if method.server_streaming else [found])
        ]


def test_a_client_that_knows_reflection_alone_drives_it(service):
    data = safetensors.torch.save(weights(9))
    header = {
        "architecture": {
            "name": "small_cnn", "num_classes": 10, "channels": 1, "height": 8, "width": 8,
        },
        "terms": {
            "dataset": "digits", "num_images": 4, "sigma": 0.25, "n0": 10, "n": 100, "alpha": 0.001,
            "method": "fixed", "radius_step": 0.25, "seed": 5, "precision": "float32",
        },
        "submission": {"run": "elsewhere", "round": 3},
        "num_bytes": len(data),
    }  # fmt: skip
    half = len(data) // 2
    parts = [base64.b64encode(part).decode() for part in (data[:half], data[half:])]
    with grpc.insecure_channel(service.address) as channel:
        other = Reflected(channel)
        assert NAME in other.services()
        other.learn(NAME)
        (job,) = other.call("Submit", {"header": header}, *({"weights": part} for part in parts))
        *_, last = other.call("Watch", {"key": job["key"]})
        assert last["job"]["state"] == "JOB_STATE_DONE"
        *_, fetched = other.call("Fetch", {"key": job["key"]})
        assert fetched["summary"]["num_images"] == 4
        (listed,) = other.call("List", {"run": "elsewhere"})
        assert [one["key"] for one in listed["jobs"]] == [job["key"]]
        images = {
            "pixels": base64.b64encode(IMAGES.tobytes()).decode(),
            "count": 3, "channels": 1, "height": 8, "width": 8,
        }  # fmt: skip
        request = {"model": job["key"], "images": images, "n": 200, "alpha": 0.01}
        (predicted,) = other.call("Predict", request)
        assert len(predicted["predictions"]) == 3
        assert predicted["sigma"] == 0.25
        (certified,) = other.call("Certify", request | {"n0": 10})
        assert len(certified["certificates"]) == 3
        with pytest.raises(grpc.RpcError) as refused:
            other.call("Get", {"key": "0" * 64})
    assert refused.value.code() == grpc.StatusCode.NOT_FOUND
    # And the Python client sees the same job.
    with service.client() as client:
        rows, mine = client.fetch(job["key"])
    assert mine.key == job["key"]
    assert [_without_seconds(row) for row in rows] == _local_rows(weights(9), terms(seed=5))


# --------------------------------------------------------------------------------------------------
# Many at a time, and the end


@pytest.mark.slow
def test_32_submitters_and_watchers_at_a_time(tmp_path):
    wanted = terms(num_images=4, n=200)
    with serving(tmp_path) as service:
        barrier = threading.Barrier(32)
        # Beforehand: PyTorch's layers draw from one global generator.
        states = [weights(number) for number in range(8)]

        def submit_and_watch(number):
            with service.client() as client:
                barrier.wait()
                job = client.submit(
                    SPEC, wanted, states[number % 8], Submission(f"run {number}", 1)
                )
                rows = [row for progress in client.watch(job.key) for row in progress.new_rows]
                return job.key, [_without_seconds(row) for row in rows]

        with ThreadPoolExecutor(32) as pool:
            found = list(pool.map(submit_and_watch, range(32)))
        assert len({key for key, _ in found}) == 8  # four submit each model
        for number, (key, rows) in enumerate(found):
            assert rows == _local_rows(states[number % 8], wanted)
            assert len(service.store.get(key).submissions) == 4
        assert service.left_behind()["calls"] == service.left_behind()["feeds"] == 0
        assert service.server._engine.images_certified == 8 * 4


def test_draining_ends_watchers_with_a_sentence_and_lets_nobody_in(tmp_path):
    with serving(tmp_path) as service, service.client() as client:
        job = client.submit(SPEC, terms(num_images=300, n=20_000), weights())
        watched = client.watch(job.key)
        next(watched)
        drained = asyncio.run_coroutine_threadsafe(service.server._guard.drain(0.3), service.loop)
        while not service.server._guard._draining:
            time.sleep(0.01)
        with pytest.raises(ServiceUnreachableError, match="shutting down"):
            client.jobs()
        with pytest.raises(ServiceUnreachableError, match="shutting down"):
            for _ in watched:
                pass
        drained.result(10)
        assert service.left_behind()["calls"] == 0
        client_rows = service.store.rows(job.key)
    # What was certified is kept, and the rest follows when the service is back.
    with serving(tmp_path) as service:
        assert service.store.rows(job.key)[: len(client_rows)] == client_rows
        assert not service.store.get(job.key).state.has_ended


def test_health_follows_the_engine_and_needs_no_token(tmp_path, monkeypatch):
    monkeypatch.setattr("server.certification.main._HEALTH_SECONDS", 0.01)
    tokens = tmp_path / "tokens"
    tokens.write_text("")
    serving_status = health_pb2.HealthCheckResponse
    with (
        serving(tmp_path / "service", tokens=tokens, http="127.0.0.1:0") as service,
        grpc.insecure_channel(service.address) as channel,
    ):
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", NAME):
            found = stub.Check(health_pb2.HealthCheckRequest(service=name))
            assert found.status == serving_status.SERVING
        page = f"http://127.0.0.1:{service.server.http_port}"
        assert urllib.request.urlopen(f"{page}/health").read() == b"ok\n"
        service.server._engine._problem = "the disk is full."
        watched = stub.Watch(health_pb2.HealthCheckRequest(service=NAME))
        while next(watched).status != serving_status.NOT_SERVING:
            pass
        with pytest.raises(urllib.error.HTTPError) as unhealthy:
            urllib.request.urlopen(f"{page}/health")
        assert unhealthy.value.code == 503
        assert unhealthy.value.read() == b"the disk is full.\n"


def test_a_watcher_of_health_who_leaves_leaves_the_others_their_news(tmp_path, monkeypatch):
    monkeypatch.setattr("server.certification.main._HEALTH_SECONDS", 0.01)
    with (
        serving(tmp_path) as service,
        grpc.insecure_channel(service.address) as channel,
    ):
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=NAME)
        leaves, stays = stub.Watch(request), stub.Watch(request, timeout=10)
        assert next(leaves).status == next(stays).status == health_pb2.HealthCheckResponse.SERVING
        leaves.cancel()
        while service.server._guard._health_calls["Watch"] > 1:
            time.sleep(0.01)
        service.server._engine._problem = "the disk is full."
        assert next(stays).status == health_pb2.HealthCheckResponse.NOT_SERVING


def test_metrics_count_calls_jobs_and_draws(tmp_path):
    with serving(tmp_path, http="127.0.0.1:0") as service, service.client() as client:
        _last(client.watch(client.submit(SPEC, terms(), weights()).key))
        with pytest.raises(ServiceError):
            client.get("nothing")
        url = f"http://127.0.0.1:{service.server.http_port}/metrics"
        lines = urllib.request.urlopen(url).read().decode().splitlines()
    for line in (
        'fedsmooth_certifier_jobs{state="done"} 1.0',
        "fedsmooth_certifier_images_total 4.0",
        "fedsmooth_certifier_draws_total 440.0",
        'fedsmooth_certifier_calls_total{code="NOT_FOUND",method="Get"} 1.0',
        'fedsmooth_certifier_calls_total{code="OK",method="Submit"} 1.0',
        "fedsmooth_certifier_healthy 1.0",
    ):
        assert line in lines


def test_the_page_is_served(service):
    url = f"http://127.0.0.1:{service.server.http_port}/"
    assert b"<html" in urllib.request.urlopen(url).read()


def test_a_service_that_is_not_there_is_one_sentence(tmp_path):
    with serving(tmp_path) as service:
        gone = service.client()
    with gone, pytest.raises(ServiceUnreachableError, match="is not available"):
        gone.jobs()


def test_nothing_of_a_strangers_file_is_kept_but_its_tensors(service: Running, client):
    state = weights(20)
    data = safetensors.torch.save(state, metadata={"note": "x" * 1000})
    job = client.submit(SPEC, terms(), data)
    assert service.store.weights(job.weights) == safetensors.torch.save(state)


def test_an_http_connection_that_asks_nothing_is_closed(tmp_path, monkeypatch):
    monkeypatch.setattr("server.certification.http_connections.SECONDS", 0.05)
    with serving(tmp_path, http="127.0.0.1:0") as service:
        address = ("127.0.0.1", service.server.http_port)
        with socket.create_connection(address) as half, socket.create_connection(address) as idle:
            half.sendall(b"GET /health HTTP/1.1\r\nHost: ")
            for one in (half, idle):
                one.settimeout(10)
                assert one.recv(1) == b""


def test_the_messages_of_a_snapshot_are_made_once_for_all_watchers(client, service):
    job = client.submit(SPEC, terms(), weights(77))
    *_, last = client.watch(job.key)

    async def follow():
        return [now async for now in service.server._service._feeds.follow(job.key)]

    (now,) = asyncio.run_coroutine_threadsafe(follow(), service.loop).result(30)
    assert now.messages(0) is now.messages(0)
    assert [len(message.new_rows) for message in now.messages(0)] == [4]
    # Another start, another message; the shared one stays as it was.
    assert [len(message.new_rows) for message in now.messages(3)] == [1]
    assert [len(message.new_rows) for message in now.messages(4)] == [0]
    assert [len(message.new_rows) for message in now.messages(0)] == [4]
    assert last.job.images_done == 4


def test_one_caller_leaves_places_for_others(service):
    online = service.server._service._online

    async def at_once(names):
        free = threading.Event()
        job = SimpleNamespace(
            weights="", spec=None, terms=SimpleNamespace(procedure=SimpleNamespace(precision=""))
        )
        computing = []

        async def call(name):
            CALLER.set(Caller(name, "here"))
            await online._compute(job, lambda _: (computing.append(name), free.wait(10)))

        tasks = [asyncio.create_task(call(name)) for name in names]
        while len(computing) < 2:
            await asyncio.sleep(0.01)
        first = list(computing)
        free.set()
        return first, await asyncio.gather(*tasks, return_exceptions=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(online._engine, "loaded", lambda *_: torch.nn.Identity())
        first, ends = asyncio.run_coroutine_threadsafe(
            at_once(["hog"] * 10 + ["other"]), service.loop
        ).result(30)
    # One of the two that compute is the other caller's, though all of the hog's came before.
    assert first == ["hog", "other"]
    assert [type(end) for end in ends] == [type(None)] * 8 + [ServiceUnreachableError] * 2 + [
        type(None)
    ]
    assert "as many as one caller may have" in str(ends[8])
    assert online._shares == {}


def test_a_service_takes_all_descriptors_and_shows_its_directory_to_nobody_else(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before[1] - 1, before[1]))
        _take_all_descriptors()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    with serving(tmp_path / "service"):
        assert stat.S_IMODE((tmp_path / "service").stat().st_mode) == 0o700
