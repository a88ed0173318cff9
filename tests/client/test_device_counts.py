"""A client certifies images of its own, and nothing but counts leaves it."""

import shutil

import asked_client
import numpy as np
import pytest
import torch
from asked_client import SIMULATED, sentence
from flwr.app import ArrayRecord, ConfigRecord, MessageType, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from PIL import Image

from client.certification import Order, certified_counts
from client.local_data import OwnImages, images_to_certify
from client.node import NodeFacts
from fedsmooth_core import wire
from fedsmooth_core.certification.certify import certify
from fedsmooth_core.certification.procedure import Procedure
from fedsmooth_core.certification.row_format import CertifiedRow
from fedsmooth_core.config import PartitionConfig, TrainingPlan, to_flat
from fedsmooth_core.data import ClientData, client_indices, load_dataset
from fedsmooth_core.models import ModelSpec, build_model
from fedsmooth_core.seeding import Purpose, derive_seed

CPU = torch.device("cpu")
PLAN = TrainingPlan(seed=5, partition=PartitionConfig(num_clients=4, samples_per_client=40))
DIGITS = [str(k) for k in range(10)]
SPEC = ModelSpec("small_cnn", "he", 10, 1, 8, 8)
RGB = ModelSpec("small_cnn", "he", 2, 3, 8, 8)
PROCEDURE = Procedure(sigma=0.25, n0=20, n=100, alpha=0.001, seed=5)
RADII = [0.0, 0.25]


@pytest.fixture(autouse=True)
def speaking_as_the_server(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDSMOOTH_CACHE", str(tmp_path / "cache"))
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1


def some_model(spec=SPEC):
    values = [0.5] * spec.channels
    return build_model(spec, values, values, torch.Generator().manual_seed(0))


def question(spec=SPEC, model=None, class_names=DIGITS, **facts):
    """An evaluate message as the server sends it; None among the facts leaves one out."""
    known = {"server-round": 3, "partition-id": 2, "class-names": list(class_names)}
    known |= to_flat(PLAN, "plan.") | to_flat(spec, "spec.") | to_flat(PROCEDURE, "certify.")
    known |= {"num-images": 6, "radii": RADII} | facts
    config = ConfigRecord({key: value for key, value in known.items() if value is not None})
    arrays = ArrayRecord((model or some_model(spec)).state_dict())
    return RecordDict({"arrays": arrays, "config": config})


def answer(content, node_config=SIMULATED):
    return asked_client.answer(content, node_config, MessageType.EVALUATE)


def write_images(root, classes=("cat", "dog"), splits=("train", "test"), per_class=5):
    rng = np.random.default_rng(0)
    for split in splits:
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for number in range(per_class):
                pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


def own_images(folder, num_images, classes=("cat", "dog")):
    facts = NodeFacts(data_path=str(folder))
    return images_to_certify(facts, PLAN, RGB, classes, 2, num_images, CPU)


# --- what is counted


class Linear(torch.nn.Module):
    """Class 1 where the mean pixel is above 1/2: the smoothed classifier's radius is known."""

    def forward(self, images):
        above = images.flatten(1).mean(dim=1) - 0.5
        return torch.stack([-above, above], dim=1)


def test_the_counts_of_a_linear_classifier_are_those_of_its_known_radii():
    # 64 pixels: the gradient of the mean has norm 1/8, so the radius is 8 times the distance to 1/2.
    radii = torch.tensor([0.1, 0.4, 2.0, 2.0, 0.0])
    labels = torch.tensor([1, 1, 1, 0, 1])
    images = (0.5 + radii / 8).view(-1, 1, 1, 1).expand(5, 1, 8, 8)
    own = OwnImages(ClientData(images, labels, 1), list(range(5)), are_held_out=True)
    order = Order(Procedure(sigma=0.25, n0=100, n=1000, alpha=0.001), 5, [0.0, 0.25, 0.5])
    counts = certified_counts(Linear(), own, order, 0, None, CPU)
    # One image lies on the boundary (no certificate), one is certified to be wrong.
    assert dict(counts) == {"num-examples": 5, "held-out": 5, "abstained": 1, "correct": [3, 2, 1]}


def test_a_radius_that_is_reached_exactly_is_certified(monkeypatch):
    rows = [CertifiedRow(0, 1, 1, 0.25, 1, 0.0), CertifiedRow(1, 1, 1, 0.0, 1, 0.0)]
    monkeypatch.setattr("client.certification.certify_images", lambda *a, **k: iter(rows))
    images = ClientData(torch.zeros(2, 1, 8, 8), torch.tensor([1, 1]), 1)
    own = OwnImages(images, [0, 1], are_held_out=True)
    counts = certified_counts(Linear(), own, Order(PROCEDURE, 2, [0.0, 0.25, 0.5]), 0, None, CPU)
    assert counts["correct"] == [2, 1, 0]


def test_a_client_counts_what_certifying_its_images_at_one_place_gives():
    reply = answer(question())
    assert list(reply.content) == ["metrics"]  # no image, no label, no row
    metrics = reply.content["metrics"]
    assert set(metrics) == wire.CERTIFY_METRICS
    assert (metrics["num-examples"], metrics["held-out"]) == (6, 6)

    facts = NodeFacts(partition=(2, 4))
    own = images_to_certify(facts, PLAN, SPEC, DIGITS, 2, 6, CPU)
    terms = {"sigma": 0.25, "n0": 20, "n": 100, "alpha": 0.001, "batch_size": 512, "device": CPU}
    seed = derive_seed(5, Purpose.ON_DEVICE, 2) >> 1
    images, labels = own.data.images, own.data.labels
    model = some_model()
    rows = list(certify(model, images, labels, own.indices, max_value=16, seed=seed, **terms))
    radii = np.array([row.radius if row.correct else -1.0 for row in rows])
    assert metrics["correct"] == [int((radii >= radius).sum()) for radius in RADII]
    assert metrics["abstained"] == sum(row.predict == -1 for row in rows)


def test_each_client_draws_noise_of_its_own_and_the_same_in_every_round(monkeypatch):
    seeds = []

    def certify_images(*args, procedure, **rest):
        seeds.append(procedure.seed)
        return iter(())

    monkeypatch.setattr("client.certification.certify_images", certify_images)
    for number, server_round in [(0, 1), (1, 1), (1, 2)]:
        answer(
            question(**{"partition-id": number, "server-round": server_round}), {"device": "cpu"}
        )
    assert seeds[0] != seeds[1] == seeds[2]
    assert all(0 <= seed < 2**62 for seed in seeds)


def test_a_small_device_sees_no_more_images_at_once_than_fit():
    seen = []

    class Counting(Linear):
        def forward(self, images):
            seen.append(len(images))
            return super().forward(images)

    images = torch.full((2, 1, 8, 8), 0.7)
    own = OwnImages(ClientData(images, torch.tensor([1, 1]), 1), [0, 1], are_held_out=False)
    order = Order(PROCEDURE, 2, RADII)
    small = certified_counts(Counting(), own, order, 0, 48, CPU)
    assert max(seen) == 48
    seen.clear()
    assert dict(certified_counts(Counting(), own, order, 0, None, CPU)) == dict(small)
    assert max(seen) == 512


# --- which images


def test_a_simulated_client_takes_test_images_of_the_classes_that_it_trains_on():
    facts = NodeFacts(partition=(1, 4))
    own = images_to_certify(facts, PLAN, SPEC, DIGITS, 3, 12, CPU)  # what it says of itself counts
    train, test = (load_dataset(PLAN.dataset, split) for split in ("train", "test"))
    held = train.labels[client_indices(train.labels, PLAN.partition, 5, 1)]
    assert own.are_held_out
    assert np.array_equal(own.data.images.numpy(), test.images[own.indices])
    assert np.array_equal(own.data.labels.numpy(), test.labels[own.indices])
    assert set(own.data.labels.tolist()) <= set(held.tolist())


def test_a_device_takes_its_test_images_where_it_has_some(tmp_path):
    own = own_images(write_images(tmp_path / "own"), 4)
    assert own.are_held_out
    test = tmp_path / "own" / "test"
    first = np.asarray(Image.open(test / "cat" / "0.png")).transpose(2, 0, 1)
    assert np.array_equal(own.data.images[0].numpy(), first)
    assert own.data.labels.tolist() == [0, 0, 1, 1]
    reply = answer(
        question(RGB, class_names=["cat", "dog"]),
        {"data-path": str(tmp_path / "own"), "device": "cpu"},
    )
    assert reply.content["metrics"]["held-out"] == reply.content["metrics"]["num-examples"] == 6


def test_a_device_without_test_images_takes_training_images_and_says_so(tmp_path):
    folder = write_images(tmp_path / "own", splits=("train",))
    assert not own_images(folder, 4).are_held_out
    reply = answer(
        question(RGB, class_names=["cat", "dog"]), {"data-path": str(folder), "device": "cpu"}
    )
    assert (reply.content["metrics"]["num-examples"], reply.content["metrics"]["held-out"]) == (
        6,
        0,
    )


@pytest.mark.parametrize("wanted", [1, 3, 7, 10, 11, 50])
def test_a_devices_images_are_spread_over_all_of_its_folder(tmp_path, wanted):
    """Its images are ordered by class: the first ones alone would be of one class."""
    folder = write_images(tmp_path / "own")
    indices = own_images(folder, wanted).indices
    assert len(indices) == len(set(indices)) == min(wanted, 10)
    assert indices[0] == 0
    gaps = np.diff([*indices, 10])
    assert gaps.max() - gaps.min() <= 1


def test_test_images_may_lack_classes_and_training_needs_none_of_them(tmp_path):
    folder = write_images(tmp_path / "own")
    shutil.rmtree(folder / "test" / "cat")
    assert set(own_images(folder, 4).data.labels.tolist()) == {1}


# --- what is refused


def test_strange_classes_among_the_test_images_are_a_sentence(tmp_path):
    folder = write_images(tmp_path / "own", splits=("train",))
    write_images(folder, classes=("eel",), splits=("test",))
    message = question(RGB, class_names=["cat", "dog"])
    reason = sentence(answer(message, {"data-path": str(folder), "device": "cpu"}))
    assert "rename or remove eel in test/" in reason


@pytest.mark.parametrize(
    "facts",
    [
        {"num-images": None},
        {"radii": None},
        {"num-images": 0},
        {"num-images": 2.5},
        {"radii": 0.25},
    ],
    ids=str,
)
def test_an_order_of_another_version_is_refused(facts):
    reason = sentence(answer(question(**facts)))
    assert "num-images and radii" in reason
    assert "of the same version" in reason


def test_a_setting_of_the_order_that_is_missing_or_wrong_is_named():
    assert "sigma is missing" in sentence(answer(question(**{"certify.sigma": None})))
    assert "colour is not a setting" in sentence(answer(question(**{"certify.colour": "red"})))
    assert "n=0 is out of range" in sentence(answer(question(**{"certify.n": 0})))


def test_weights_that_diverged_are_a_sentence():
    model = some_model()
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    assert "are not finite" in sentence(answer(question(model=model)))


def test_a_device_out_of_memory_says_what_to_lower(monkeypatch):
    def too_large(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("client.certification.certified_counts", too_large)
    assert "set a smaller max-batch" in sentence(answer(question()))
