"""The ClientApp: the core's local training behind a message, and every error as one sentence."""

import numpy as np
import pytest
import torch
from asked_client import SIMULATED, answer, asked, sentence
from flwr.app import Array, ArrayRecord, ConfigRecord, MessageType, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from PIL import Image

import client.app
from client.local_data import local_data
from fedsmooth_core import wire
from fedsmooth_core.cohort import CohortTrainer, Member, trainer
from fedsmooth_core.config import (
    DatasetConfig,
    PartitionConfig,
    TrainingConfig,
    TrainingPlan,
    to_flat,
)
from fedsmooth_core.data import ClientData, client_indices, load_dataset
from fedsmooth_core.models import ModelSpec, build_model
from fedsmooth_core.training import local_train

PLAN = TrainingPlan(
    seed=5,
    partition=PartitionConfig(num_clients=4, samples_per_client=40),
    training=TrainingConfig(local_steps=2, batch_size=8, learning_rate=0.1),
)
DIGITS = [str(k) for k in range(10)]
SPEC = ModelSpec("small_cnn", "he", 10, 1, 8, 8)


@pytest.fixture(autouse=True)
def speaking_as_the_server(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDSMOOTH_CACHE", str(tmp_path / "cache"))
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1


def initial_model(spec=SPEC):
    values = [0.5] * spec.channels
    return build_model(spec, values, values, torch.Generator().manual_seed(0))


def question(spec=SPEC, model=None, plan=PLAN, class_names=DIGITS, **facts):
    """A train message as the server sends it; None among the facts leaves one out."""
    known = {"server-round": 3, "partition-id": 2, "class-names": list(class_names)}
    known |= to_flat(plan, "plan.") | to_flat(spec, "spec.") | facts
    config = ConfigRecord({key: value for key, value in known.items() if value is not None})
    arrays = ArrayRecord((model or initial_model(spec)).state_dict())
    return RecordDict({"arrays": arrays, "config": config})


def write_images(root, classes=("cat", "dog"), size=8):
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for number in range(5):
                pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


def trained_alone(model, data):
    """What the core's trainer makes of this client."""
    trainer = CohortTrainer(torch.device("cpu"))
    state = dict(model.state_dict())
    ((_, trained),) = trainer.train(model, state, [Member(2, data)], PLAN, 3)
    return trained


# --- what it does


def test_a_simulated_client_trains_exactly_as_the_core_does():
    reply = answer(question())
    train = load_dataset(DatasetConfig(), "train")
    data = ClientData.from_dataset(train, client_indices(train.labels, PLAN.partition, 5, 2))
    trained = trained_alone(initial_model(), data)
    state = reply.content["arrays"].to_torch_state_dict()
    assert list(state) == list(trained.state)
    assert all(torch.equal(state[name], value) for name, value in trained.state.items())
    model = initial_model()
    result = local_train(model, data, PLAN, 3, 2)
    torch.testing.assert_close(state, dict(model.state_dict()), rtol=1e-4, atol=1e-5)
    metrics = reply.content["metrics"]
    assert set(metrics) == wire.TRAIN_METRICS
    assert metrics["num-examples"] == 40
    assert metrics["train-loss"] == trained.metrics.loss == pytest.approx(result.loss, rel=1e-4)
    assert metrics["train-accuracy"] == trained.metrics.accuracy
    assert metrics["train-seconds"] > 0


def test_a_real_device_trains_on_its_own_folder_under_the_number_it_was_given(tmp_path):
    folder = write_images(tmp_path / "own")
    spec = ModelSpec("small_cnn", "he", 2, 3, 8, 8)
    message = question(spec, class_names=["cat", "dog"])
    reply = answer(message, {"data-path": str(folder), "device": "cpu"})
    own = DatasetConfig(name="imagefolder", root=str(folder))
    data = ClientData.from_dataset(load_dataset(own, "train"))
    trained = trained_alone(initial_model(spec), data)
    state = reply.content["arrays"].to_torch_state_dict()
    assert all(torch.equal(state[name], value) for name, value in trained.state.items())
    assert reply.content["metrics"]["num-examples"] == 10


def test_nothing_of_one_message_is_left_for_the_next():
    """A process answers many messages with one model; every message overwrites all of it."""
    first = answer(question()).content["arrays"].to_torch_state_dict()
    answer(question(**{"partition-id": 1}))
    again = answer(question()).content["arrays"].to_torch_state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_the_query_answers_with_the_partition_of_a_simulated_client():
    reply = answer(RecordDict(), kind=MessageType.QUERY)
    assert dict(reply.content["config"]) == {"partition-id": 2, "num-partitions": 4}


def test_the_query_of_a_real_device_is_answered_without_a_partition():
    reply = answer(RecordDict(), {"data-path": "/data"}, MessageType.QUERY)
    assert dict(reply.content["config"]) == {}


def test_a_node_that_says_nothing_tells_the_server_so_and_trains_on_what_it_is_given():
    assert dict(answer(RecordDict(), {}, MessageType.QUERY).content["config"]) == {}
    given = answer(question(), {"device": "cpu"}).content["arrays"].to_torch_state_dict()
    named = answer(question()).content["arrays"].to_torch_state_dict()
    assert all(torch.equal(given[name], named[name]) for name in named)


def test_a_small_device_divides_its_mini_batches():
    whole = answer(question()).content["arrays"].to_torch_state_dict()
    parts = answer(question(), SIMULATED | {"max-batch": 6}).content["arrays"].to_torch_state_dict()
    torch.testing.assert_close(parts, whole)
    assert any(not torch.equal(parts[name], whole[name]) for name in whole)


# --- what it refuses


@pytest.mark.parametrize("kind", [MessageType.QUERY, MessageType.TRAIN])
def test_a_hyper_parameter_in_the_node_configuration_is_answered_with_a_sentence(kind):
    content = question() if kind == MessageType.TRAIN else RecordDict()
    reason = sentence(answer(content, SIMULATED | {"sigma": 0.1}, kind))
    assert "hyper-parameters come from the server alone" in reason


def test_a_device_out_of_memory_says_what_to_lower(monkeypatch):
    def too_large(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(trainer, "train_stacked", too_large)
    assert "set a smaller max-batch" in sentence(answer(question()))


def test_other_classes_than_the_federations_are_answered_with_a_sentence(tmp_path):
    folder = write_images(tmp_path / "own", classes=("cat", "eel"))
    spec = ModelSpec("small_cnn", "he", 2, 3, 8, 8)
    message = question(spec, class_names=["cat", "dog"])
    reason = sentence(answer(message, {"data-path": str(folder), "device": "cpu"}))
    assert "cat, eel" in reason
    assert "cat, dog" in reason


@pytest.mark.parametrize("record", ["arrays", "config"])
def test_a_message_without_one_of_its_records_names_both_versions(record):
    content = question()
    del content[record]
    reason = sentence(answer(content))
    assert "'config' or 'arrays'" in reason
    assert "of the same version" in reason


@pytest.mark.parametrize(
    "facts",
    [
        {"server-round": None},
        {"partition-id": None},
        {"class-names": None},
        {"partition-id": "two"},
        {"class-names": "cat"},
        {"server-round": 1.5},
    ],
    ids=str,
)
def test_a_message_of_other_facts_is_refused(facts):
    reason = sentence(answer(question(**facts)))
    assert "server-round" in reason
    assert "of the same version" in reason


def test_a_setting_that_this_client_lacks_or_does_not_know_is_named():
    missing = sentence(answer(question(**{"plan.smoothing.sigma": None})))
    assert "smoothing.sigma is missing" in missing
    unknown = sentence(answer(question(**{"plan.smoothing.colour": "pink"})))
    assert "smoothing.colour is not a setting" in unknown
    wrong = sentence(answer(question(**{"plan.smoothing.sigma": -1.0})))
    assert "smoothing.sigma=-1.0 is out of range" in wrong


def test_weights_that_do_not_fit_the_architecture_are_refused():
    other = initial_model(ModelSpec("resnet20", "he", 10, 1, 8, 8))
    reason = sentence(answer(question(model=other)))
    assert "weights do not fit the architecture 'small_cnn'" in reason
    assert "of the same version" in reason


def test_an_architecture_that_this_client_lacks_is_named():
    content = question(**{"spec.name": "resnet9000"})
    assert "resnet9000" in sentence(answer(content))


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="this machine has what the test says it lacks"
)
def test_an_accelerator_that_is_not_there_is_named():
    reason = sentence(answer(question(), SIMULATED | {"device": "cuda"}))
    assert "device='cuda'" in reason


def test_a_bug_is_not_dressed_up_as_a_users_error(monkeypatch):
    """Flower answers for a ClientApp that raises; only our own errors are sentences."""

    def broken(*args):
        raise ZeroDivisionError("bug")

    monkeypatch.setattr(trainer, "train_stacked", broken)
    with pytest.raises(ZeroDivisionError):
        answer(question())


def test_an_engine_that_there_is_not_is_answered_with_a_sentence():
    reason = sentence(answer(question(), SIMULATED | {"engine": "fast"}))
    assert "engine='fast' is unknown: allowed is one of auto, plain" in reason


def test_messages_that_are_answered_together_are_answered_as_if_alone():
    """Two rounds, a client that refuses, one that asks for another engine; in whatever order."""
    trainers = client.app.Trainers(workers=2, is_kept=True)
    contents = [
        (question(**{"partition-id": 2}), SIMULATED),
        (question(**{"partition-id": 2, "server-round": 4}), SIMULATED),
        (question(), SIMULATED | {"sigma": 0.1}),
        (question(), SIMULATED | {"engine": "plain"}),
    ]
    questions = [
        asked(content, facts, message_id=f"{number}")
        for number, (content, facts) in enumerate(contents)
    ]
    replies = {
        reply.metadata.reply_to_message_id: reply
        for reply in client.app.train_together(questions, trainers)
    }
    together = [replies[message.metadata.message_id] for message, _ in questions]
    alone = [answer(content, facts) for content, facts in contents]
    assert [reply.has_error() for reply in together] == [False, False, True, False]
    assert together[2].error == alone[2].error
    for one, other in zip(together, alone, strict=True):
        if not one.has_error():
            states = [reply.content["arrays"].to_torch_state_dict() for reply in (one, other)]
            torch.testing.assert_close(*states, rtol=1e-4, atol=1e-6)


def test_whatever_fails_at_one_client_the_others_are_answered(monkeypatch):
    def failing(facts, plan, spec, class_names, client, device, shared=False):
        if client == 1:
            raise OSError("the disk is gone")
        if client == 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return local_data(facts, plan, spec, class_names, client, device, shared)

    monkeypatch.setattr(client.app, "local_data", failing)
    contents = [question(**{"partition-id": number}) for number in range(4)]
    contents.append(question(**{"partition-id": 0}))
    array = contents[4]["arrays"]["network.0.weight"]
    contents[4]["arrays"]["network.0.weight"] = Array(array.dtype, array.shape, array.stype, b"?")
    node = {"device": "cpu"}
    questions = [asked(each, node, message_id=str(k)) for k, each in enumerate(contents)]
    replies = {
        reply.metadata.reply_to_message_id: reply
        for reply in client.app.train_together(questions, client.app.Trainers())
    }
    assert [replies[str(k)].has_error() for k in range(5)] == [False, True, False, True, True]
    assert replies["1"].error.reason == "OSError: the disk is gone"
    assert "set a smaller max-batch" in replies["3"].error.reason
