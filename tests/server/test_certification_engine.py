"""The worker of the certification service: whose turn it is, and what goes wrong."""

import itertools
import re
import threading
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from fedsmooth_core.certification.procedure import Procedure, certify_images
from fedsmooth_core.certification.row_format import CertifiedRow
from fedsmooth_core.checkpoint import save_checkpoint, state_sha256
from fedsmooth_core.config import to_nested
from fedsmooth_core.errors import CertificationError, CheckpointError, ConfigError, DataError
from fedsmooth_core.models import ModelSpec, build_model
from server.certification import engine as engine_module
from server.certification import models as models_module
from server.certification.datasets import Datasets
from server.certification.engine import Engine
from server.certification.jobs import Job, JobState, JobTerms, Submission
from server.certification.main import ServiceOptions, run_service
from server.certification.models import LoadedModels, read_model
from server.certification.store import JobStore, UnknownJobError, UnreadableJobError
from server.certification.turns import TakingTurns, Turns
from server.certify import certify_checkpoint

CPU = torch.device("cpu")
SPEC = ModelSpec("small_cnn", "he", 10, 1, 8, 8)
DATASETS = Datasets()
ENDLESS = 3 * 10**6
"""Draws of an image that no test waits for."""

_numbers = itertools.count()


@pytest.fixture
def store(tmp_path):
    with JobStore(tmp_path / "jobs") as opened:
        yield opened


@pytest.fixture
def engine(store):
    """An engine that is not started yet; it ends with the test."""
    made = Engine(store, DATASETS, CPU, 128)
    yield made
    if made._threads[0].ident is not None:
        made.stop(0)


@pytest.fixture
def one_image_a_turn(monkeypatch):
    monkeypatch.setattr(engine_module, "TURN_SECONDS", 0.0)
    # However slow this machine is: one turn after the other.
    monkeypatch.setattr(engine_module, "OVERDUE_SECONDS", 1e9)


def state_of(seed):
    return build_model(SPEC, [0.3], [0.4], torch.Generator().manual_seed(seed)).state_dict()


def submit(store, run="", server_round=0, state=None, num_images=3, edit=lambda job: job, **terms):
    """Submit a job of weights of its own, and return its key."""
    state = state_of(next(_numbers)) if state is None else state
    info = DATASETS.test_set("digits").info
    procedure = Procedure(**({"n0": 10, "n": 100} | terms))
    job = Job(
        SPEC,
        JobTerms("digits", procedure, num_images=num_images),
        state_sha256(state),
        info.fingerprint,
        info.class_names,
        "cpu",
        num_images,
    )
    weights = safetensors.torch.save(dict(state))
    return store.submit(edit(job), weights, Submission(run, server_round), 100).key


def wait_for(store, key, wanted=lambda job: job.state.has_ended):
    """Wait until a job is as wanted; pytest's time limit ends it."""
    changed = threading.Event()
    unsubscribe = store.subscribe(lambda _: changed.set())
    while not wanted(store.get(key)):
        changed.wait()
        changed.clear()
    unsubscribe()
    return store.get(key)


def wait_for_all(store, *keys):
    return [wait_for(store, key) for key in keys]


def record_turns(store, monkeypatch, then=lambda turns: None):
    """Return a list that grows by the key of each turn; ``then`` is called after each."""
    turns, append = [], store.append

    def recording(key, rows, **options):
        append(key, rows, **options)
        turns.extend([key] * len(rows))
        then(turns)

    monkeypatch.setattr(store, "append", recording)
    return turns


def without_time(rows):
    return [replace(row, time=0.0) for row in rows]


def expected_rows(job, state, batch_size=512):
    """Rows as the core certifies them, in one go."""
    test_set = DATASETS.test_set("digits")
    skip = len(test_set) // job.num_images
    indices = list(range(0, skip * job.num_images, skip))
    _, model = read_model(safetensors.torch.save(dict(state)), SPEC)
    rows = certify_images(
        model,
        torch.from_numpy(test_set.images[indices]),
        torch.from_numpy(test_set.labels[indices]),
        indices,
        max_value=16,
        procedure=job.terms.procedure,
        batch_size=batch_size,
        device=CPU,
    )
    return without_time(rows)


def test_rows_are_those_of_local_certification(store, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(engine_module, "TURN_SECONDS", 0.02)
    state = state_of(0)
    metadata = {"model": to_nested(SPEC)}
    save_checkpoint(tmp_path / "round-0001.safetensors", state, metadata)
    config = tiny("certification.num_images=12", "certification.n=300", "seed=5")
    local = certify_checkpoint(tmp_path / "round-0001.safetensors", config, tmp_path / "local")

    # A batch of 128 images and one of 512 round alike from 50 images on.
    engine = Engine(store, DATASETS, CPU, 256)
    engine.start()
    key = submit(store, state=state, num_images=12, n0=20, n=300, seed=5)
    job = wait_for(store, key)
    engine.stop()
    assert job.state is JobState.DONE
    columns = [line.split("\t")[:5] for line in local.read_text().splitlines()[1:]]
    assert [
        [str(row.idx), str(row.label), str(row.predict), repr(row.radius), str(row.correct)]
        for row in store.rows(key)
    ] == columns
    assert engine.images_certified == 12
    assert engine.draws == 12 * 320
    assert job.seconds == pytest.approx(sum(row.time for row in store.rows(key)))


@pytest.mark.parametrize("method", ["fixed", "sequential"])
def test_rows_do_not_depend_on_company_and_restarts(store, method, one_image_a_turn):
    state = state_of(1)
    key = submit(store, "a", 1, state, num_images=6, n=1000, method=method, radius_step=0.1)
    others = [submit(store, run, num_images=2) for run in ("a", "b", "")]
    for images in (1, 3, 6):
        engine = Engine(store, DATASETS, CPU, 256)
        engine.start()
        wait_for(store, key, lambda job, images=images: job.images_done >= images)
        engine.stop(0)
    assert (store.rows(key)[0].n is None) == (method == "fixed")
    assert without_time(store.rows(key)) == expected_rows(store.get(key), state)
    engine = Engine(store, DATASETS, CPU)
    engine.start()
    assert all(job.state is JobState.DONE for job in wait_for_all(store, *others))
    engine.stop()


def test_runs_take_turns_and_the_newest_round_goes_first(
    store, engine, monkeypatch, one_image_a_turn
):
    turns = record_turns(store, monkeypatch)
    old, newest, middle = (submit(store, "a", number) for number in (1, 3, 2))
    other = submit(store, "b", 7)
    lone = submit(store, num_images=2)
    engine.start()
    wait_for_all(store, old, newest, middle, other, lone)
    assert turns == [
        *(newest, other, lone) * 2,
        *(newest, other),
        *(middle,) * 3,
        *(old,) * 3,
    ]


def test_a_round_that_comes_meanwhile_goes_first_and_a_new_run_at_once(
    store, engine, monkeypatch, one_image_a_turn
):
    come = []

    def then(turns):
        if len(turns) == 3:
            come.extend([submit(store, "a", 2, num_images=2), submit(store, "c", num_images=1)])

    turns = record_turns(store, monkeypatch, then)
    first, other = submit(store, "a", 1), submit(store, "b", num_images=4)
    engine.start()
    wait_for_all(store, first, other, *come)
    newer, new_run = come
    assert turns == [first, other, first, new_run, other, newer, other, newer, other, first]


def test_a_job_of_two_runs_has_the_turns_of_both(store, engine, monkeypatch, one_image_a_turn):
    turns = record_turns(store, monkeypatch)
    state = state_of(2)
    shared = submit(store, "a", 1, state, num_images=4)
    assert submit(store, "b", 1, state, num_images=4) == shared
    other = submit(store, "c", 1, num_images=2)
    engine.start()
    wait_for_all(store, shared, other)
    assert turns == [shared, shared, other, shared, shared, other]


def test_superseded_jobs_are_dropped_by_policy(store, monkeypatch, one_image_a_turn):
    turns = record_turns(store, monkeypatch)
    engine = Engine(store, DATASETS, CPU, 128, drop_superseded=True)
    old, newest = submit(store, "a", 1), submit(store, "a", 2)
    another = submit(store, "b", 1)
    engine.start()
    dropped, *done = wait_for_all(store, old, newest, another)
    engine.stop()
    assert dropped.state is JobState.SUPERSEDED
    assert [job.state for job in done] == [JobState.DONE] * 2
    assert old not in turns


def test_a_model_that_cannot_be_certified_drops_no_older_one(store, one_image_a_turn):
    diverged = {name: tensor.clone() for name, tensor in state_of(3).items()}
    diverged["network.0.weight"][0, 0, 0, 0] = torch.nan
    old, newest = submit(store, "a", 1), submit(store, "a", 2, diverged)
    engine = Engine(store, DATASETS, CPU, 128, drop_superseded=True)
    engine.start()
    done, failed = wait_for_all(store, old, newest)
    engine.stop()
    assert done.state is JobState.DONE
    assert failed.state is JobState.FAILED
    assert "not finite" in failed.problem


def _overflowing():
    state = {name: tensor.clone() for name, tensor in state_of(4).items()}
    return {name: tensor * 1e30 if "network" in name else tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("edit", "state", "sentence"),
    [
        (lambda job: replace(job, device="cuda"), None, "submitted for the device 'cuda'"),
        (lambda job: replace(job, fingerprint="f"), None, "not those that the job was"),
        (lambda job: replace(job, weights="0" * 64), None, "have changed on the disk"),
        (
            lambda job: replace(job, terms=replace(job.terms, dataset="nowhere")),
            None,
            "no data set 'nowhere'",
        ),
        (
            lambda job: replace(job, spec=replace(job.spec, num_classes=11)),
            None,
            "not those of its model",
        ),
        (lambda job: job, _overflowing(), "scores .* are not finite"),
    ],
)
def test_what_cannot_be_certified_fails_alone_with_a_sentence(store, engine, edit, state, sentence):
    bad, good = submit(store, "a", 1, state, edit=edit), submit(store, "a", 0)
    engine.start()
    failed, done = wait_for_all(store, bad, good)
    assert failed.state is JobState.FAILED
    assert re.search(sentence, failed.problem), failed.problem
    assert failed.problem.endswith(".")
    assert done.state is JobState.DONE
    assert engine.problem == ""


def test_a_mistake_of_the_program_fails_one_job(store, engine, monkeypatch, caplog):
    def broken(*arguments, procedure, **options):
        if procedure.seed == 1:
            raise ZeroDivisionError("a mistake")
        return certify_images(*arguments, procedure=procedure, **options)

    monkeypatch.setattr(engine_module, "certify_images", broken)
    bad, good = submit(store, "a", 1, seed=1), submit(store, "a", 0)
    engine.start()
    failed, done = wait_for_all(store, bad, good)
    assert "ZeroDivisionError('a mistake')" in failed.problem
    assert "Traceback" in caplog.text
    assert done.state is JobState.DONE


@pytest.mark.parametrize("trouble", ["disk", "device"])
def test_trouble_with_disk_or_device_is_waited_out(store, engine, monkeypatch, trouble):
    monkeypatch.setattr(engine_module, "RETRY_SECONDS", 0.01)
    is_broken, seen = True, []

    def certify(model, images, labels, indices, **options):
        if is_broken and trouble == "device":
            raise torch.AcceleratorError("CUDA error: unspecified launch failure\nand so on")
        return [CertifiedRow(idx, 0, 0, 0.5, 1, 0.001) for idx in indices]

    monkeypatch.setattr(engine_module, "certify_images", certify)
    key = submit(store, num_images=300)  # whose rows need pages more
    if trouble == "disk":
        pages = store._writer.execute("PRAGMA page_count").fetchone()[0]
        store._writer.execute(f"PRAGMA max_page_count = {pages}")
    wait = engine._stopping.wait
    tried = threading.Semaphore(0)

    def waiting(seconds):
        seen.append(engine.problem)
        tried.release()
        return wait(seconds)

    monkeypatch.setattr(engine._stopping, "wait", waiting)
    engine.start()
    for _ in range(3):
        tried.acquire()
    assert "disk is full" in seen[-1] if trouble == "disk" else "the device failed" in seen[-1]
    assert store.get(key).state in (JobState.QUEUED, JobState.RUNNING)
    is_broken = False
    with store._write_lock:
        store._writer.execute(f"PRAGMA max_page_count = {2**30}")
    assert wait_for(store, key).state is JobState.DONE
    assert [row.idx for row in store.rows(key)] == list(range(300))
    engine.stop()
    assert engine.problem == ""


def test_a_cancelled_job_lets_go_in_the_middle_of_an_image(store, engine):
    endless = submit(store, "a", 2, n=ENDLESS)
    waiting = submit(store, "a", 1)
    engine.start()
    wait_for(store, endless, lambda job: job.state is JobState.RUNNING)
    store.cancel(endless)
    assert wait_for(store, waiting).state is JobState.DONE
    assert store.rows(endless) == []


def test_stopping_lets_go_in_the_middle_of_an_image(store, engine):
    endless = submit(store, n=ENDLESS)
    engine.start()
    wait_for(store, endless, lambda job: job.state is JobState.RUNNING)
    engine.stop(0)
    assert store.get(endless).state is JobState.RUNNING
    assert store.rows(endless) == []


def test_stopping_commits_the_turn_under_way(store, engine, monkeypatch):
    certifying = threading.Event()

    def slow(*arguments, **options):
        certifying.set()
        engine._stopping.wait()
        return certify_images(*arguments, **options)

    monkeypatch.setattr(engine_module, "certify_images", slow)
    key = submit(store, num_images=5)
    engine.start()
    certifying.wait()
    engine.stop(60)
    assert store.get(key).images_done == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_worker_that_has_ended_is_a_problem(store, engine, monkeypatch):
    def die():
        raise SystemExit

    assert engine.problem == ""
    monkeypatch.setattr(engine, "_next_job", die)
    engine.start()
    for thread in engine._threads:
        thread.join()
    assert "has ended" in engine.problem
    assert engine.problem_is_final


def test_long_images_of_other_runs_hold_no_job_up(store, engine, monkeypatch):
    monkeypatch.setattr(engine_module, "OVERDUE_SECONDS", 0.05)
    hogs = [submit(store, "hog", 1, n=ENDLESS), submit(store, n=ENDLESS)]
    small = [submit(store, "small", 1), submit(store), submit(store, "hog", 0)]
    engine.start()
    for job in wait_for_all(store, *small[:2]):
        assert job.state is JobState.DONE
    # Of one run the newest round goes first, even if it is long.
    states = [store.get(key) for key in (*hogs, small[2])]
    assert [job.images_done for job in states] == [0, 0, 0]
    assert states[2].state is JobState.QUEUED
    store.cancel(hogs[0])
    assert wait_for(store, small[2]).state is JobState.DONE
    assert store.get(hogs[1]).state is JobState.RUNNING
    engine.stop(0)
    assert store.rows(hogs[1]) == []


def test_rows_of_turns_beside_each_other_are_those_of_one_alone(store, monkeypatch):
    monkeypatch.setattr(engine_module, "OVERDUE_SECONDS", 0.0)
    states = [state_of(seed) for seed in range(3)]
    keys = [submit(store, str(i), 1, states[i], num_images=2, n=1000) for i in range(3)]
    engine = Engine(store, DATASETS, CPU, 256)
    engine.start()
    for key, state in zip(keys, states, strict=True):
        job = wait_for(store, key)
        assert job.state is JobState.DONE
        assert without_time(store.rows(key)) == expected_rows(job, state)
    engine.stop()
    assert engine.images_certified == 6


def test_a_job_for_which_memory_never_suffices_fails_in_the_end(store, engine, monkeypatch):
    monkeypatch.setattr(engine_module, "RETRY_SECONDS", 0.0)
    asked = []

    def certify(*arguments, procedure, **options):
        asked.append(procedure.seed)
        if procedure.seed == 1 or len(asked) < 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return certify_images(*arguments, procedure=procedure, **options)

    monkeypatch.setattr(engine_module, "certify_images", certify)
    large, small = submit(store, "a", 1, seed=1), submit(store, "b", 1)
    engine.start()
    failed, done = wait_for_all(store, large, small)
    assert "too little memory" in failed.problem
    assert asked.count(1) == engine_module.MEMORY_ATTEMPTS
    assert done.state is JobState.DONE


def test_a_device_that_fails_again_and_again_needs_another_process(store, engine, monkeypatch):
    monkeypatch.setattr(engine_module, "RETRY_SECONDS", 0.0)
    is_final = threading.Event()

    def certify(*arguments, **options):
        if engine.problem_is_final:
            is_final.set()
        raise torch.AcceleratorError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(engine_module, "certify_images", certify)
    key = submit(store)
    assert not engine.problem_is_final
    engine.start()
    is_final.wait()
    assert "the device failed" in engine.problem
    assert not store.get(key).state.has_ended


def test_a_service_that_only_a_restart_can_mend_ends_with_an_error(tmp_path, monkeypatch):
    """So that whoever watches over it, Docker or systemd, starts it again."""
    monkeypatch.setattr(engine_module, "RETRY_SECONDS", 0.0)

    def certify(*arguments, **options):
        raise torch.AcceleratorError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(engine_module, "certify_images", certify)
    with JobStore(tmp_path / "service") as store:
        key = submit(store)
    said = []
    options = ServiceOptions(
        tmp_path / "service", listen="127.0.0.1:0", insecure=True, device="cpu"
    )
    with pytest.raises(CertificationError, match="the device failed"):
        run_service(options, said.append)
    assert said[1] == "The service ends."
    with JobStore(tmp_path / "service") as store:
        assert store.get(key).state is JobState.RUNNING


def test_a_job_that_cannot_be_read_fails_alone(store, engine):
    bad, worse, good = submit(store, "a", 1), submit(store, "b", 1), submit(store, "a", 0)
    with store._writing() as connection:
        connection.execute("UPDATE jobs SET terms = '{' WHERE key = ?", (bad,))
        connection.execute(
            "UPDATE jobs SET terms = replace(terms, '0.25', '-1') WHERE key = ?", (worse,)
        )
    engine.start()
    assert wait_for(store, good).state is JobState.DONE
    while store.unfinished():
        pass
    assert engine.problem == ""
    assert [job.key for job in store.jobs()] == [good]
    with pytest.raises(UnreadableJobError, match="cannot be read"):
        store.get(bad)


def test_nothing_is_remembered_of_jobs_and_runs_that_are_over(store, engine, monkeypatch):
    monkeypatch.setattr(engine_module, "_RUNS_REMEMBERED", 2)
    keys = [submit(store, str(i), 1) for i in range(4)]
    engine.start()
    wait_for_all(store, *keys)
    last = submit(store, "last", 1)
    wait_for(store, last)
    engine.stop()
    assert len(engine._last_turn) == 2
    assert engine._seconds_per_image.keys() <= {last}


def test_online_calls_get_their_turns_while_an_image_is_certified(store, engine):
    endless = submit(store, n=ENDLESS)
    engine.start()
    job = wait_for(store, endless, lambda job: job.state is JobState.RUNNING)
    model = engine.loaded(job.weights, SPEC, "float32")
    for _ in range(3):
        assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_turns_are_given_in_the_order_of_asking():
    turns, order, threads = Turns(), [], []

    def ask(number):
        with turns.taken():
            order.append(number)

    with turns.taken():
        for number in range(8):
            threads.append(threading.Thread(target=ask, args=(number,)))
            threads[-1].start()
            while len(turns._waiting) <= number:
                pass
        assert order == []
    for thread in threads:
        thread.join()
    assert order == list(range(8))
    with turns.taken():
        pass


def test_a_turn_is_given_back_by_a_pass_that_fails():
    turns = Turns()
    with pytest.raises(RuntimeError):
        TakingTurns(torch.nn.Linear(3, 2), turns)(torch.zeros(1, 4))
    assert TakingTurns(torch.nn.Linear(4, 2), turns)(torch.zeros(1, 4)).shape == (1, 2)


def test_models_used_last_stay_loaded(store, monkeypatch):
    keys = [submit(store) for _ in range(3)]
    first, second, third = (store.get(key).weights for key in keys)
    models = LoadedModels(store, CPU)
    size = models_module._num_bytes(models.get(first, SPEC, "float32"))
    monkeypatch.setattr(models_module, "_ROOM", 2 * size)
    kept = [models.get(weights, SPEC, "float32") for weights in (first, second, first)]
    assert kept[0] is kept[2]
    models.get(third, SPEC, "float32")  # second was used longest ago
    assert models.get(first, SPEC, "float32") is kept[0]
    assert models.get(second, SPEC, "float32") is not kept[1]
    with pytest.raises(UnknownJobError, match="submit it first"):
        models.get("0" * 64, SPEC, "float32")


def test_a_model_serves_in_its_precision(store):
    job = store.get(submit(store))
    models = LoadedModels(store, CPU)
    exact, rounded = (models.get(job.weights, SPEC, it) for it in ("float32", "bfloat16"))
    images = torch.rand(3, 1, 8, 8)
    assert exact(images).dtype == torch.float32
    assert rounded(images).dtype == torch.bfloat16
    torch.testing.assert_close(exact(images), rounded(images).float(), rtol=0.05, atol=0.05)


def test_what_is_no_file_of_these_weights_is_refused():
    data = safetensors.torch.save(state_of(0))
    found, model = read_model(data, SPEC)
    assert found == state_sha256(model.state_dict())
    assert not model.training
    with pytest.raises(CheckpointError, match="no complete safetensors file"):
        read_model(data[:-1], SPEC)
    with pytest.raises(CheckpointError, match="not those of its model"):
        read_model(safetensors.torch.save({"a": torch.zeros(1)}), SPEC)
    state = state_of(0)
    flat = safetensors.torch.save(state | {"normalise.std": state["normalise.std"] * 0})
    with pytest.raises(CheckpointError, match="are not all > 0"):
        read_model(flat, SPEC)


def test_a_file_of_countless_tensors_is_refused_before_it_is_loaded(monkeypatch):
    monkeypatch.setattr(safetensors.torch, "load", lambda data: pytest.fail("it was loaded"))
    empty = '"{:07}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    header = ("{" + ",".join(map(empty.format, range(20_000))) + "}").encode()
    with pytest.raises(CheckpointError, match="bytes of names and shapes"):
        read_model(len(header).to_bytes(8, "little") + header, SPEC)


@pytest.fixture
def folder(tmp_path):
    for split, name in itertools.product(("train", "test"), ("cat", "dog")):
        (tmp_path / "images" / split / name).mkdir(parents=True)
        pixels = np.full((12, 12, 3), 200, np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / split / name / "one.png")
    return tmp_path / "images"


def test_a_folder_of_images_has_the_name_its_operator_gave(folder):
    datasets = Datasets({"pets": folder})
    assert "pets" in datasets.names
    assert "imagefolder" not in datasets.names
    test_set = datasets.test_set("pets")
    assert (test_set.info.class_names, test_set.info.shape) == (("cat", "dog"), (3, 12, 12))
    assert datasets.test_set("pets", 8).info.shape == (3, 8, 8)
    assert datasets.test_set("pets") is test_set


@pytest.mark.parametrize(
    ("name", "size", "sentence"),
    [
        ("../pets", None, "no data set '../pets', only digits"),
        ("imagefolder", None, "no data set 'imagefolder'"),
        ("digits", 8, "image_size"),
        ("empty", None, "missing"),
    ],
)
def test_what_the_service_does_not_have_is_one_sentence(tmp_path, name, size, sentence):
    with pytest.raises(DataError, match=sentence):
        Datasets({"empty": tmp_path / "empty"}).test_set(name, size)


@pytest.mark.parametrize("name", ["digits", "a/b", ""])
def test_names_that_no_folder_can_have(tmp_path, name):
    with pytest.raises(ConfigError, match="name"):
        Datasets({name: tmp_path})
