"""What the service refuses: with which status and sentence, and that nothing is left behind."""

import asyncio
import dataclasses
import math
import re
import threading
import time

import grpc
import numpy as np
import pytest
import safetensors.torch
import torch
from certification_harness import SPEC, serving, terms, weights
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedsmooth_core.errors import ServiceError, ServiceUnreachableError
from server.certification import certification_pb2 as pb
from server.certification import service as service_module
from server.certification.certification_pb2_grpc import CertificationStub
from server.certification.jobs import JobTerms, Submission
from server.certification.limits import Limits
from server.certification.messages import architecture_message, terms_message
from server.certification.store import StorageError
from server.certification.uploads import Uploads

LIMITS = Limits(
    max_model_bytes=300_000,
    max_uploads=2,
    max_queued=2,
    max_images=100,
    max_n=1000,
    max_images_per_call=4,
    max_draws_per_call=2500,
    stall_seconds=0.5,
)
DATA = safetensors.torch.save(weights())
_HEADER_BYTES = len(DATA[8:].partition(b"}}")[0])


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("service"), limits=LIMITS) as running:
        yield running


@pytest.fixture(scope="module")
def client(service):
    with service.client() as client:
        yield client


@pytest.fixture(scope="module")
def stub(service):
    with grpc.insecure_channel(service.address) as channel:
        yield CertificationStub(channel)


@pytest.fixture(autouse=True)
def nothing_is_left(service):
    before = service.left_behind()
    yield
    for _ in range(100):
        if service.left_behind() == before:
            break
        time.sleep(0.02)
    assert service.left_behind() == before


def _header(spec=SPEC, job_terms=None, num_bytes=None, **changes):
    header = pb.SubmitRequest.Header(
        architecture=architecture_message(spec),
        terms=terms_message(job_terms or terms()),
        num_bytes=len(DATA) if num_bytes is None else num_bytes,
    )
    for name, value in changes.items():
        section, _, key = name.partition("__")
        setattr(getattr(header, section), key, value)
    return pb.SubmitRequest(header=header)


def _part(data):
    return pb.SubmitRequest(weights=data)


def _refusal(call, *arguments):
    with pytest.raises(grpc.RpcError) as refused:
        call(*arguments)
    code, sentence = refused.value.code(), refused.value.details()
    assert sentence.endswith(".")
    assert "\n" not in sentence
    assert "Traceback" not in sentence
    return code.name, sentence


# --------------------------------------------------------------------------------------------------
# Models


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.one_of(
        st.binary(min_size=1, max_size=300),
        st.integers(1, len(DATA) - 1).map(lambda length: DATA[:length]),
        # The header's own length and JSON, changed a little.
        st.tuples(st.integers(0, _HEADER_BYTES), st.binary(min_size=1, max_size=8)).map(
            lambda change: DATA[: change[0]] + change[1] + DATA[change[0] + len(change[1]) :]
        ),
        st.binary(min_size=1, max_size=50).map(lambda more: DATA + more),
    ).filter(lambda data: data != DATA)
)
def test_bytes_that_are_no_model_are_refused(client, data):
    with pytest.raises(ServiceError) as refused:
        client.submit(SPEC, terms(), data)
    assert refused.value.status == "INVALID_ARGUMENT"
    assert str(refused.value).endswith(".")


def _changed(name, change):
    state = weights()
    state[name] = change(state[name])
    return state


def _without(name):
    state = weights()
    del state[name]
    return state


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (_changed("network.0.bias", lambda t: t.double()), "network.0.bias"),
        (_changed("network.0.bias", lambda t: t.to(torch.int32)), "network.0.bias"),
        (_changed("network.0.bias", lambda t: t[:-1]), "network.0.bias"),
        (_changed("network.0.bias", lambda t: t[None]), "network.0.bias"),
        (_without("normalise.std"), "normalise.std"),
        (weights() | {"more": torch.zeros(1)}, "more"),
        ({}, "first differing"),
        (_changed("network.0.bias", lambda t: t * math.nan), "not finite"),
        (_changed("network.0.bias", lambda t: t + math.inf), "not finite"),
        (_changed("normalise.mean", lambda t: t * math.nan), "not finite"),
    ],
    ids=str,
)
def test_weights_that_are_not_the_architectures_are_refused(client, state, said):
    with pytest.raises(ServiceError, match=said) as refused:
        client.submit(SPEC, terms(), state)
    assert refused.value.status == "INVALID_ARGUMENT"
    # Its caller knows of no checkpoint, and no version that wrote one.
    assert not {"checkpoint", "version"} & set(re.findall(r"\w+", str(refused.value)))


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "no_such_model"},
        {"name": "resnet20"},
        {"name": "alexnet"},
        {"height": 4_000_000_000, "width": 4_000_000_000},
        {"channels": 4_000_000_000},
        {"num_classes": 4_000_000_000},
        {"height": 9},
        {"channels": 3},
        {"num_classes": 11},
    ],
    ids=str,
)
def test_other_architectures_are_refused_before_anything_of_their_size_is_built(client, changes):
    with pytest.raises(ServiceError) as refused:
        client.submit(dataclasses.replace(SPEC, **changes), terms(), DATA)
    assert refused.value.status == "INVALID_ARGUMENT"


@pytest.mark.parametrize(
    "changes",
    [
        {"architecture__height": 0},
        {"architecture__num_classes": 0},
        {"architecture__name": "no_such_model"},
        {"architecture__name": "alexnet"},
        {"terms__sigma": 0.0},
        {"terms__sigma": math.nan},
        {"terms__sigma": math.inf},
        {"terms__alpha": 1.0},
        {"terms__n0": 0},
        {"terms__n": 0},
        {"terms__method": "guess"},
        {"terms__precision": "float8"},
        {"terms__radius_step": 0.0},
        {"terms__radius_step": 1e-9},
        {"terms__seed": 2**63},
        {"terms__num_images": 0},
        {"terms__image_size": 0},
        {"terms__dataset": "../../secret"},
        {"submission__run": "a\nb"},
        {"submission__run": "a" * 10_000},
    ],
    ids=str,
)
def test_impossible_terms_are_refused_before_the_upload(stub, changes):
    # No weights follow: had it waited for them, it would have said so.
    status, sentence = _refusal(stub.Submit, iter([_header(**changes)]))
    assert status == "INVALID_ARGUMENT"
    section, _, name = next(iter(changes)).partition("__")
    assert name.split("_")[0] in sentence
    if section == "architecture":
        assert "model." not in sentence


@pytest.mark.parametrize(
    ("job_terms", "status", "said"),
    [
        (terms(n=1001), "RESOURCE_EXHAUSTED", "1000"),
        (terms(n0=1001), "RESOURCE_EXHAUSTED", "1000"),
        (terms(num_images=101), "RESOURCE_EXHAUSTED", "100 "),
        (terms(num_images=None), "RESOURCE_EXHAUSTED", "100 "),
        (terms(num_images=100_000), "INVALID_ARGUMENT", "num_images"),
        (JobTerms("flags", terms().procedure), "FAILED_PRECONDITION", "digits"),
        (JobTerms("digits", terms().procedure, image_size=8), "FAILED_PRECONDITION", "image_size"),
        (JobTerms("digits", terms().procedure, image_size=9), "INVALID_ARGUMENT", "image_size"),
    ],
    ids=str,
)
def test_what_the_service_has_not_or_does_not_do_is_refused(client, job_terms, status, said):
    with pytest.raises(ServiceError, match=said) as refused:
        client.submit(SPEC, job_terms, DATA)
    assert refused.value.status == status
    assert not isinstance(refused.value, ServiceUnreachableError)


def test_images_are_not_resized_to_absurd_sizes(client):
    vast = dataclasses.replace(SPEC, name="resnet20", height=100_000, width=100_000)
    wanted = JobTerms("digits", terms().procedure, image_size=100_000)
    with pytest.raises(ServiceError, match="1024") as refused:
        client.submit(vast, wanted, DATA)
    assert refused.value.status == "RESOURCE_EXHAUSTED"


def test_a_disk_that_refuses_is_unavailable_and_may_be_tried_again(service, client, monkeypatch):
    def full(*arguments):
        raise StorageError("a file of the service cannot be used now (database or disk is full).")

    monkeypatch.setattr(service.store, "submit", full)
    with pytest.raises(ServiceUnreachableError, match="cannot use its directory") as refused:
        client.submit(SPEC, terms(), DATA)
    assert refused.value.status == "UNAVAILABLE"


def test_other_images_than_the_submitter_means_are_refused(client):
    with pytest.raises(ServiceError, match="other images") as refused:
        client.submit(SPEC, terms(), DATA, fingerprint="0" * 32)
    assert refused.value.status == "FAILED_PRECONDITION"


def test_submissions_of_one_job_have_an_end(tmp_path):
    limits = dataclasses.replace(LIMITS, max_submissions=2)
    with serving(tmp_path, limits=limits) as service, service.client() as client:
        for number in (1, 2):
            client.submit(SPEC, terms(), DATA, Submission("a", number))
        with pytest.raises(ServiceError, match="submitted for 2 models already") as refused:
            client.submit(SPEC, terms(), DATA, Submission("a", 3))
        assert refused.value.status == "RESOURCE_EXHAUSTED"
        assert not isinstance(refused.value, ServiceUnreachableError)
        # The same one again is none more.
        assert len(client.submit(SPEC, terms(), DATA, Submission("a", 1)).submissions) == 2


def test_a_list_is_no_longer_than_a_message_may_be(tmp_path, monkeypatch):
    monkeypatch.setattr(service_module, "_LIST_BYTES", 1000)
    with serving(tmp_path, limits=LIMITS) as service, service.client() as client:
        for seed in range(2):
            key = client.submit(
                SPEC, terms(num_images=1), weights(seed), Submission("a" * 200, seed)
            ).key
            list(client.watch(key))
        for number in range(6):
            client.submit(SPEC, terms(num_images=1), weights(1), Submission("b" * 200, number))
        # The latest comes, however large it is.
        assert [job.key for job in client.jobs()] == [key]


def test_a_full_queue_is_refused_and_may_be_tried_again(tmp_path):
    with (
        serving(tmp_path, limits=dataclasses.replace(LIMITS, max_queued=1)) as service,
        service.client() as client,
    ):
        long = terms(num_images=100, n=1000)
        first = client.submit(SPEC, long, DATA)
        with pytest.raises(ServiceUnreachableError, match="unfinished") as refused:
            client.submit(SPEC, long, weights(1))
        assert refused.value.status == "RESOURCE_EXHAUSTED"
        assert service.left_behind()["models"] == 1
        client.cancel(first.key)
        assert not client.submit(SPEC, long, weights(1)).state.has_ended


# --------------------------------------------------------------------------------------------------
# Uploads


@pytest.mark.parametrize(
    ("requests", "said"),
    [
        ([], "begins with a header"),
        ([_part(DATA)], "begins with a header"),
        ([pb.SubmitRequest()], "begins with a header"),
        ([_header(num_bytes=0)], "announces no bytes"),
        ([_header(), _header()], "only weights"),
        ([_header(), _part(DATA[:100]), _header()], "only weights"),
        ([_header(), pb.SubmitRequest()], "only weights"),
        ([_header(), _part(DATA[:-1])], "bytes came of the"),
        ([_header()], "0 bytes came of the"),
        ([_header(), _part(DATA), _part(b"x")], "more bytes came"),
        ([_header(num_bytes=10), _part(DATA)], "more bytes came"),
    ],
    ids=range(11),
)
def test_uploads_that_are_none_are_refused(stub, requests, said):
    status, sentence = _refusal(stub.Submit, iter(requests))
    assert status == "INVALID_ARGUMENT"
    assert said in sentence


def test_a_model_that_is_too_large_is_refused_at_its_header(stub):
    announced = LIMITS.max_model_bytes + 1
    status, sentence = _refusal(stub.Submit, iter([_header(num_bytes=announced)]))
    assert status == "RESOURCE_EXHAUSTED"
    assert "300000" in sentence
    assert _refusal(stub.Submit, iter([_header(num_bytes=2**64 - 1)]))[0] == "RESOURCE_EXHAUSTED"


def test_a_message_that_is_too_large_is_refused(stub):
    requests = [_header(num_bytes=LIMITS.max_model_bytes), _part(bytes(17 << 20))]
    with pytest.raises(grpc.RpcError) as refused:
        stub.Submit(iter(requests))
    assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("sent", [[], [_header()], [_header(), _part(DATA[:1000])]], ids=len)
def test_an_upload_that_stalls_is_ended(stub, sent):
    def requests():
        yield from sent
        time.sleep(1.5)

    status, sentence = _refusal(stub.Submit, requests())
    assert status == "DEADLINE_EXCEEDED"
    assert "stalled" in sentence


@pytest.mark.parametrize(
    ("limits", "size"),
    [
        # Slow on the average, though it never stalls; fast enough, but without an end.
        (Limits(stall_seconds=0.2), 100),
        (Limits(upload_seconds=0.2), 50_000),
    ],
    ids=["slow", "long"],
)
def test_an_upload_that_goes_on_for_too_long_is_ended(limits, size):
    async def parts():
        for _ in range(500):
            await asyncio.sleep(0.02)
            yield _part(bytes(size))

    with pytest.raises(ServiceUnreachableError, match="too slow") as refused:
        asyncio.run(Uploads(limits).content(parts(), 500 * size))
    assert refused.value.status == "DEADLINE_EXCEEDED"


@pytest.mark.parametrize("sent", [[_header()], [_header(), _part(DATA[:1000])]], ids=len)
def test_a_client_that_vanishes_leaves_nothing(service, sent):
    gone = threading.Event()

    def requests():
        yield from sent
        gone.wait(5)

    with grpc.insecure_channel(service.address) as channel:
        call = CertificationStub(channel).Submit.future(requests())
        while not service.left_behind()["calls"]:
            time.sleep(0.01)
        time.sleep(0.1)
    gone.set()
    with pytest.raises((grpc.RpcError, grpc.FutureCancelledError)):
        call.result()


def test_uploads_wait_for_a_place_and_not_for_ever(service, stub):
    places = service.server._service._uploads._places

    async def take():
        for _ in range(LIMITS.max_uploads):
            await places.acquire()

    asyncio.run_coroutine_threadsafe(take(), service.loop).result()
    with pytest.raises(grpc.RpcError) as refused:
        stub.Submit(iter([_header(), _part(DATA)]))
    for _ in range(LIMITS.max_uploads):
        service.loop.call_soon_threadsafe(places.release)
    assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "2 models at a time" in refused.value.details()
    assert [item.key for item in refused.value.trailing_metadata()] == ["retry-after-seconds"]


# --------------------------------------------------------------------------------------------------
# Other calls


@pytest.mark.parametrize("key", ["", "0" * 64, "x" * 10_000, "é\n"])
def test_unknown_jobs_are_not_found(client, stub, key):
    for call in (client.get, client.cancel, client.fetch, lambda key: next(client.watch(key))):
        with pytest.raises(ServiceError, match="there is no job") as refused:
            call(key)
        assert refused.value.status == "NOT_FOUND"
    with pytest.raises(ServiceError, match="there is no model") as refused:
        client.predict(key, np.zeros((1, 1, 8, 8), np.uint8), n=10, alpha=0.1)
    assert refused.value.status == "NOT_FOUND"


@pytest.mark.parametrize("state", [0, 99])
def test_a_state_that_is_none_is_not_every_state(stub, state):
    status, sentence = _refusal(stub.List, pb.ListRequest(states=[state]))
    assert status == "INVALID_ARGUMENT"
    assert f"states={state}" in sentence


@pytest.mark.parametrize("method", ["Get", "List", "Predict", "Watch"])
def test_bytes_that_are_no_message_are_refused(service, method):
    with grpc.insecure_channel(service.address) as channel:
        call = channel.unary_unary(f"/fedsmooth.certification.v1.Certification/{method}")
        status, sentence = _refusal(call, b"\xff\xff\xff\xff")
    assert status == "INVALID_ARGUMENT"
    assert "no message" in sentence


def test_unknown_methods_are_unimplemented(service):
    with grpc.insecure_channel(service.address) as channel:
        call = channel.unary_unary("/fedsmooth.certification.v1.Certification/Erase")
        with pytest.raises(grpc.RpcError) as refused:
            call(b"")
    assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_an_unexpected_error_is_one_sentence_and_a_trace_in_the_log(
    service, stub, monkeypatch, caplog
):
    def broken(*arguments):
        raise ZeroDivisionError("a secret of the service")

    monkeypatch.setattr(service.store, "get", broken)
    status, sentence = _refusal(stub.Get, pb.JobRequest(key="a"))
    assert status == "INTERNAL"
    assert "secret" not in sentence
    assert "a secret of the service" in caplog.text


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    with (
        serving(tmp_path_factory.mktemp("online"), limits=LIMITS) as service,
        service.client() as client,
        grpc.insecure_channel(service.address) as channel,
    ):
        job = client.submit(SPEC, terms(), DATA, Submission())
        yield CertificationStub(channel), job.key


def _images(count=1, channels=1, height=8, width=8, num_bytes=None):
    size = count * channels * height * width if num_bytes is None else num_bytes
    return pb.Images(pixels=bytes(size), count=count, channels=channels, height=height, width=width)


@pytest.mark.parametrize(
    ("changes", "status", "said"),
    [
        ({"images": pb.Images()}, "INVALID_ARGUMENT", "no images"),
        ({"images": _images(5)}, "RESOURCE_EXHAUSTED", "4"),
        ({"images": _images(height=9)}, "INVALID_ARGUMENT", "resize"),
        ({"images": _images(channels=3)}, "INVALID_ARGUMENT", "resize"),
        ({"images": _images(num_bytes=63)}, "INVALID_ARGUMENT", "bytes"),
        ({"images": _images(count=4, num_bytes=0)}, "INVALID_ARGUMENT", "bytes"),
        ({"n": 0}, "INVALID_ARGUMENT", "n=0"),
        ({"n": 1001}, "RESOURCE_EXHAUSTED", "1000"),
        ({"images": _images(3), "n": 1000}, "RESOURCE_EXHAUSTED", "2500"),
        ({"alpha": 0.0}, "INVALID_ARGUMENT", "alpha"),
        ({"alpha": math.nan}, "INVALID_ARGUMENT", "alpha"),
        ({"sigma": 0.0}, "INVALID_ARGUMENT", "sigma"),
        ({"sigma": math.nan}, "INVALID_ARGUMENT", "sigma"),
        ({"seed": 2**63}, "INVALID_ARGUMENT", "seed"),
    ],
    ids=str,
)
@pytest.mark.parametrize("call", ["Predict", "Certify"])
def test_questions_that_cannot_be_answered_are_refused(model, call, changes, status, said):
    stub, key = model
    request = {"Predict": pb.PredictRequest, "Certify": pb.CertifyRequest}[call]
    values = {"model": key, "images": _images(), "n": 10, "alpha": 0.1}
    if call == "Certify":
        values["n0"] = 10
    found, sentence = _refusal(getattr(stub, call), request(**values | changes))
    assert found == status
    assert said in sentence


def test_calls_beyond_the_limit_are_refused(tmp_path):
    limits = Limits(max_calls=2)
    with serving(tmp_path, limits=limits) as service, service.client() as client:
        job = client.submit(SPEC, terms(num_images=300, n=50_000), DATA)
        watched = [client.watch(job.key) for _ in range(2)]
        for one in watched:
            next(one)
        with pytest.raises(ServiceUnreachableError, match="2 calls at a time") as refused:
            client.get(job.key)
        assert refused.value.status == "RESOURCE_EXHAUSTED"
        watched.pop().close()
        for _ in range(200):
            try:
                client.cancel(job.key)
                break
            except ServiceUnreachableError:
                time.sleep(0.01)
        *_, last = watched.pop()
        assert last.job.state.has_ended
