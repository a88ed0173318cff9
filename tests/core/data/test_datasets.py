"""Data sets: what they hold, what is wrong with a folder, and the cache that all processes share."""

import json
import logging
import multiprocessing
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedsmooth_core.config import DatasetConfig
from fedsmooth_core.data import cache as cache_module
from fedsmooth_core.data import dataset_names, load_dataset, load_device_folder
from fedsmooth_core.data.imagefolder import ImageFolder, decode_image
from fedsmooth_core.errors import ConfigError, DataError

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("FEDSMOOTH_CACHE", str(folder))
    return folder


def entries(cache):
    """Cache entries as a reader sees them."""
    return [path for path in cache.iterdir() if not path.name.startswith(".")]


def write_folder(root, sizes=None, per_class=3, classes=("cat", "dog"), splits=("train", "test")):
    """Write RGB PNGs of random pixels and return root and the pixels by (split, class)."""
    rng = np.random.default_rng(0)
    pixels = {}
    for split in splits:
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for number in range(per_class):
                width, height = (sizes or {}).get((split, name, number), (6, 4))
                image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
                Image.fromarray(image).save(root / split / name / f"{number}.png")
                pixels.setdefault((split, name), []).append(image)
    return pixels


def imagefolder(root, **settings):
    return DatasetConfig(name="imagefolder", root=str(root), **settings)


def one_sentence(error):
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert ". " not in message
    return message


# --- digits


def test_digits_are_raw_and_split_by_class():
    train = load_dataset(DatasetConfig(), "train")
    test = load_dataset(DatasetConfig(), "test")
    info = train.info
    assert (info.name, info.shape, info.max_value, info.num_classes) == (
        "digits",
        (1, 8, 8),
        16,
        10,
    )
    assert len(train) + len(test) == 1797
    assert train.images.dtype == np.uint8
    assert train.labels.dtype == np.int64
    assert train.images.max() == 16
    per_class = np.bincount(test.labels) / (np.bincount(train.labels) + np.bincount(test.labels))
    assert np.all(np.abs(per_class - 0.2) < 0.01)


def test_digits_split_has_every_image_once():
    from sklearn.datasets import load_digits

    both = np.concatenate(
        [load_dataset(DatasetConfig(), split).images for split in ("train", "test")]
    )
    ours = sorted(image.tobytes() for image in both)
    theirs = sorted(image.astype(np.uint8).tobytes() for image in load_digits().images)
    assert ours == theirs


def test_mean_and_std_are_those_of_the_training_images():
    train = load_dataset(DatasetConfig(), "train")
    unit = np.asarray(train.images, dtype=np.float64) / 16
    np.testing.assert_allclose(train.info.mean, unit.mean(axis=(0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(train.info.std, unit.std(axis=(0, 2, 3)), rtol=1e-12)


def test_arrays_are_mapped_and_read_only():
    train = load_dataset(DatasetConfig(), "train")
    assert isinstance(train.images, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        train.images[0, 0, 0, 0] = 1


def test_a_cached_data_set_imports_no_decoder(tmp_path):
    write_folder(tmp_path / "images")
    load_dataset(DatasetConfig(), "train")
    load_dataset(imagefolder(tmp_path / "images"), "train")
    code = f"""
import sys
from fedsmooth_core.config import DatasetConfig
from fedsmooth_core.data import load_dataset
load_dataset(DatasetConfig(), "train")
load_dataset(DatasetConfig(name="imagefolder", root={str(tmp_path / "images")!r}), "train")
assert not {{"torchvision", "sklearn", "PIL"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)


# --- what cannot be


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ConfigError) as error:
        load_dataset(DatasetConfig(name="cifar11"), "train")
    assert all(name in one_sentence(error) for name in dataset_names())


def test_unknown_split():
    with pytest.raises(ConfigError, match="allowed are train, test"):
        load_dataset(DatasetConfig(), "valid")


@pytest.mark.parametrize("name", ["digits", "cifar10"])
def test_image_size_belongs_to_imagefolder(name):
    with pytest.raises(ConfigError) as error:
        load_dataset(DatasetConfig(name=name, image_size=32), "train")
    assert "image_size=32" in one_sentence(error)


# --- imagefolder


def test_imagefolder_keeps_pixels_and_order(tmp_path):
    pixels = write_folder(tmp_path)
    for split in ("train", "test"):
        data = load_dataset(imagefolder(tmp_path), split)
        assert data.info.class_names == ("cat", "dog")
        assert (data.info.shape, data.info.max_value) == ((3, 4, 6), 255)
        expected = np.stack(pixels[split, "cat"] + pixels[split, "dog"]).transpose(0, 3, 1, 2)
        np.testing.assert_array_equal(data.images, expected)
        assert data.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_imagefolder_agrees_with_torchvision(tmp_path):
    from torchvision.datasets import ImageFolder as Theirs

    write_folder(tmp_path, per_class=12)
    ours = load_dataset(imagefolder(tmp_path), "train")
    theirs = Theirs(tmp_path / "train")
    assert ours.info.class_names == tuple(theirs.classes)
    assert ours.labels.tolist() == theirs.targets
    for image, (other, _) in zip(ours.images, theirs, strict=True):
        np.testing.assert_array_equal(image, np.asarray(other).transpose(2, 0, 1))


def test_grey_rgba_and_palette_files_become_rgb(tmp_path):
    write_folder(tmp_path, per_class=1)
    grey = Image.new("L", (6, 4), 77)
    grey.save(tmp_path / "train" / "cat" / "1.png")
    Image.new("RGBA", (6, 4), (1, 2, 3, 128)).save(tmp_path / "train" / "cat" / "2.png")
    Image.new("RGB", (6, 4), (4, 5, 6)).convert("P").save(tmp_path / "train" / "cat" / "3.png")
    images = load_dataset(imagefolder(tmp_path), "train").images
    assert np.all(images[1] == 77)
    assert images[2, :, 0, 0].tolist() == [1, 2, 3]
    assert images.shape == (5, 3, 4, 6)


def test_images_are_resized_on_demand(tmp_path):
    write_folder(tmp_path, sizes={("train", "dog", 1): (9, 9), ("test", "cat", 0): (5, 5)})
    data = load_dataset(imagefolder(tmp_path, image_size=5), "test")
    assert data.info.shape == (3, 5, 5)
    native = np.asarray(Image.open(tmp_path / "test" / "cat" / "0.png")).transpose(2, 0, 1)
    np.testing.assert_array_equal(data.images[0], native)


def test_hidden_and_other_files_are_passed_over(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "train" / "cat" / "._0.png").write_bytes(b"\0")
    (tmp_path / "train" / "cat" / "notes.txt").write_text("x")
    (tmp_path / "train" / ".ipynb_checkpoints").mkdir()
    (tmp_path / "train" / "README").write_text("x")
    assert len(load_dataset(imagefolder(tmp_path), "train")) == 6


def test_a_constant_channel_has_a_usable_std(tmp_path):
    for folder in ("train/grey", "train/gray", "test/grey", "test/gray"):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("RGB", (2, 2), (9, 9, 9)).save(tmp_path / folder / "0.png")
    assert load_dataset(imagefolder(tmp_path), "train").info.std == (1 / 255,) * 3


def spoil_broken(root):
    path = root / "train" / "dog" / "1.png"
    path.write_bytes(path.read_bytes()[:-30])
    return path


def spoil_one_class(root):
    for split in ("train", "test"):
        for folder in sorted((root / split).iterdir())[1:]:
            shutil.rmtree(folder)
    return root


def spoil_no_image(root):
    path = root / "test" / "dog" / "0.png"
    path.write_bytes(b"no image at all")
    return path


def spoil_foreign_format(root):
    path = root / "test" / "dog" / "0.png"
    Image.new("RGB", (6, 4)).save(path, format="EPS")
    return path


def spoil_deep(root):
    path = root / "train" / "cat" / "0.png"
    Image.fromarray(np.full((4, 6), 30_000, dtype=np.uint16)).save(path)
    return path


def spoil_mixed_sizes(root):
    path = root / "train" / "dog" / "2.png"
    Image.new("RGB", (5, 5)).save(path)
    return path


def spoil_dangling(root):
    path = root / "train" / "dog" / "9.png"
    path.symlink_to(root / "nowhere.png")
    return path


def spoil_pipe(root):
    path = root / "train" / "dog" / "9.png"
    os.mkfifo(path)
    return path


def spoil_empty_class(root):
    for path in (root / "test" / "dog").iterdir():
        path.unlink()
    return root / "test" / "dog"


def spoil_nested(root):
    (root / "train" / "cat" / "more").mkdir()
    return root / "train" / "cat" / "more"


def spoil_missing_split(root):
    (root / "test").rename(root / "validation")
    return root / "test"


def spoil_missing_class(root):
    (root / "test" / "dog").rename(root / "test.dog")
    return root / "train" / "dog"


def spoil_extra_class(root):
    (root / "train" / "dog").rename(root / "train.dog")
    return root / "test" / "dog"


def spoil_no_class(root):
    for name in ("cat", "dog"):
        (root / "train" / name).rename(root / name)
    return root / "train"


@pytest.mark.parametrize(
    "spoil",
    [
        spoil_broken,
        spoil_no_image,
        spoil_one_class,
        spoil_foreign_format,
        spoil_deep,
        spoil_mixed_sizes,
        spoil_dangling,
        spoil_pipe,
        spoil_empty_class,
        spoil_nested,
        spoil_missing_split,
        spoil_missing_class,
        spoil_extra_class,
        spoil_no_class,
    ],
)
def test_a_spoiled_folder_is_named(tmp_path, cache, spoil):
    root = tmp_path / "images"
    write_folder(root)
    at_fault = spoil(root)
    with pytest.raises(DataError) as error:
        load_dataset(imagefolder(root), "train")
    assert str(at_fault) in one_sentence(error)
    assert not cache.exists() or not entries(cache)


def test_a_missing_root(tmp_path):
    with pytest.raises(DataError, match="nowhere"):
        load_dataset(imagefolder(tmp_path / "nowhere"), "train")


def test_root_left_at_its_default():
    with pytest.raises(ConfigError) as error:
        load_dataset(DatasetConfig(name="imagefolder"), "train")
    assert "dataset.root" in one_sentence(error)


# --- a device's own folder


def test_a_devices_folder_is_found_again_in_the_cache_and_follows_its_images(tmp_path, cache):
    write_folder(tmp_path / "own")
    shutil.rmtree(tmp_path / "own" / "test")
    first = load_device_folder(str(tmp_path / "own"), None, ["cat", "dog"])
    again = load_device_folder(str(tmp_path / "own"), None, ["dog", "eel", "cat"])
    assert len(entries(cache)) == 1
    assert np.array_equal(first.images, again.images)
    assert again.info.class_names == ("dog", "eel", "cat")
    (tmp_path / "own" / "train" / "cat" / "0.png").unlink()
    assert len(load_device_folder(str(tmp_path / "own"), None, ["cat", "dog"])) == len(first) - 1


def test_a_device_and_a_server_on_one_folder_do_not_meet_in_the_cache(tmp_path):
    write_folder(tmp_path)
    own = load_device_folder(str(tmp_path), None, ["cat", "dog"])
    config = imagefolder(tmp_path)
    assert np.array_equal(load_dataset(config, "train").images, own.images)
    assert len(load_dataset(config, "test")) > 0


# --- torchvision


def write_idx(path, array):
    magic = 0x0800 | array.ndim
    header = b"".join(int(n).to_bytes(4, "big") for n in (magic, *array.shape))
    path.write_bytes(header + array.tobytes())


def write_mnist(root, kind="MNIST"):
    rng = np.random.default_rng(1)
    raw = root / kind / "raw"
    raw.mkdir(parents=True)
    arrays = {}
    for split, prefix, count in (("train", "train", 7), ("test", "t10k", 4)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = rng.integers(0, 10, count, dtype=np.uint8)
        write_idx(raw / f"{prefix}-images-idx3-ubyte", images)
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", labels)
        arrays[split] = images, labels
    return arrays


@pytest.mark.parametrize(
    ("name", "kind", "first_class"),
    [("mnist", "MNIST", "0"), ("fashion_mnist", "FashionMNIST", "T-shirt/top")],
)
def test_mnist_from_raw_files(tmp_path, name, kind, first_class):
    arrays = write_mnist(tmp_path, kind)
    for split in ("train", "test"):
        data = load_dataset(DatasetConfig(name=name, root=str(tmp_path)), split)
        images, labels = arrays[split]
        np.testing.assert_array_equal(data.images, images[:, np.newaxis])
        assert data.labels.tolist() == labels.tolist()
        assert data.info.shape == (1, 28, 28)
        assert data.info.class_names[0] == first_class
        assert data.info.num_classes == 10


def test_changed_raw_files_are_decoded_again(tmp_path):
    config = DatasetConfig(name="mnist", root=str(tmp_path))
    write_mnist(tmp_path)
    before = load_dataset(config, "train")
    path = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    content = bytearray(path.read_bytes())
    content[-1] ^= 255
    path.write_bytes(content)
    after = load_dataset(config, "train")
    assert after.images[-1, 0, -1, -1] == before.images[-1, 0, -1, -1] ^ 255
    assert after.info.fingerprint != before.info.fingerprint


def test_cifar10_from_raw_files(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    # Tiny stand-ins cannot have the checksums that torchvision knows.
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    rng = np.random.default_rng(2)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    planes = {}
    for file, _ in CIFAR10.train_list + CIFAR10.test_list:
        planes[file] = rng.integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)
        batch = {"data": planes[file].reshape(2, 3072), "labels": [3, 8]}
        (folder / file).write_bytes(pickle.dumps(batch))
    names = [f"class {k}" for k in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    config = DatasetConfig(name="cifar10", root=str(tmp_path))
    train = load_dataset(config, "train")
    expected = np.concatenate([planes[file] for file, _ in CIFAR10.train_list])
    np.testing.assert_array_equal(train.images, expected)
    assert train.labels.tolist() == [3, 8] * 5
    assert train.info.class_names == tuple(names)
    np.testing.assert_array_equal(load_dataset(config, "test").images, planes["test_batch"])


def test_svhn_from_raw_files(tmp_path, monkeypatch):
    from scipy.io import savemat

    monkeypatch.setattr("torchvision.datasets.svhn.check_integrity", lambda *args: True)
    monkeypatch.setattr("torchvision.datasets.svhn.download_url", lambda *args: None)
    rng = np.random.default_rng(3)
    images = rng.integers(0, 256, (32, 32, 3, 5), dtype=np.uint8)
    for split in ("train", "test"):
        labels = np.array([[1], [10], [3], [10], [5]], dtype=np.uint8)
        savemat(tmp_path / f"{split}_32x32.mat", {"X": images, "y": labels})
    data = load_dataset(DatasetConfig(name="svhn", root=str(tmp_path)), "test")
    np.testing.assert_array_equal(data.images, images.transpose(3, 2, 0, 1))
    assert data.labels.tolist() == [1, 0, 3, 0, 5]  # the files call the digit 0 "10"
    assert data.info.class_names == tuple("0123456789")


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn", "mnist", "fashion_mnist"])
def test_a_failed_download_says_where_files_may_be_put(tmp_path, monkeypatch, cache, name):
    from urllib.error import URLError

    def no_network(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    monkeypatch.setattr("torchvision.datasets.utils.urllib.request.urlopen", no_network)
    root = tmp_path / "root"
    with pytest.raises(DataError) as error:
        load_dataset(DatasetConfig(name=name, root=str(root)), "train")
    assert str(root) in one_sentence(error)
    assert not entries(cache)


# --- the cache


def test_the_second_time_nothing_is_decoded(tmp_path, caplog, monkeypatch):
    write_folder(tmp_path)
    with caplog.at_level(logging.INFO, "fedsmooth_core"):
        load_dataset(imagefolder(tmp_path), "train")
    assert len(caplog.records) == 1
    assert "imagefolder" in caplog.text
    monkeypatch.setattr(ImageFolder, "decode", lambda self: pytest.fail("decoded again"))
    load_dataset(imagefolder(tmp_path), "train")
    load_dataset(imagefolder(tmp_path), "test")


@pytest.mark.parametrize("change", ["touch", "add", "remove", "image_size"])
def test_a_changed_folder_is_decoded_again(tmp_path, cache, change):
    root = tmp_path / "images"
    write_folder(root)
    load_dataset(imagefolder(root), "train")
    settings = {}
    file = root / "train" / "cat" / "1.png"
    if change == "touch":
        stat = file.stat()
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    elif change == "add":
        (root / "test" / "cat" / "new.png").write_bytes(file.read_bytes())
    elif change == "remove":
        file.unlink()
    else:
        settings["image_size"] = 3
    load_dataset(imagefolder(root, **settings), "train")
    assert len(entries(cache)) == 2


def test_equal_content_has_an_equal_fingerprint_wherever_it_lies(tmp_path, cache):
    infos = []
    for name in ("here", "there"):
        write_folder(tmp_path / name)
        infos.append(load_dataset(imagefolder(tmp_path / name), "train").info)
    assert infos[0] == infos[1]
    assert len(entries(cache)) == 2


def load_and_report(root, barrier, results):
    barrier.wait()
    decoded = []
    original = ImageFolder.decode
    ImageFolder.decode = lambda self: decoded.append(1) or original(self)
    data = load_dataset(imagefolder(root), "train")
    results.put((len(decoded), data.info.fingerprint, int(data.images.sum())))


@pytest.mark.parametrize("locks", [True, False])
def test_processes_that_start_together_share_one_entry(tmp_path, cache, monkeypatch, locks):
    if not locks:  # as on a file system or platform without them: the rename alone must do
        monkeypatch.setattr(cache_module, "fcntl", None)
    root = tmp_path / "images"
    write_folder(root, per_class=40)
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(4), context.Queue()
    processes = [
        context.Process(target=load_and_report, args=(root, barrier, results)) for _ in range(4)
    ]
    for process in processes:
        process.start()
    answers = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len({answer[1:] for answer in answers}) == 1
    assert len(entries(cache)) == 1
    assert not [path for path in cache.iterdir() if path.is_dir() and path.name.startswith(".")]
    if locks:
        assert sum(answer[0] for answer in answers) == 1


def die_while_writing(root):
    cache_module._describe = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
    load_dataset(imagefolder(root), "train")


def test_a_killed_writer_leaves_nothing_that_is_read(tmp_path, cache):
    root = tmp_path / "images"
    write_folder(root)
    process = multiprocessing.get_context("fork").Process(target=die_while_writing, args=(root,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert entries(cache) == []
    assert len(load_dataset(imagefolder(root), "train")) == 6  # and its lock is gone
    assert len(entries(cache)) == 1


def test_a_failed_write_cleans_up(cache, monkeypatch):
    def no_space(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module, "_to_disk", no_space)
    with pytest.raises(DataError) as error:
        load_dataset(DatasetConfig(), "train")
    assert "No space left on device" in one_sentence(error)
    assert "FEDSMOOTH_CACHE" in str(error.value)
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_a_cache_folder_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FEDSMOOTH_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DataError, match="FEDSMOOTH_CACHE"):
        load_dataset(DatasetConfig(), "train")


@pytest.mark.parametrize("damage", ["truncated", "pickled", "info", "missing"])
def test_a_damaged_entry_is_named_and_never_unpickled(cache, damage):
    load_dataset(DatasetConfig(), "train")
    (entry,) = entries(cache)
    images = entry / "train_images.npy"
    if damage == "truncated":
        images.write_bytes(images.read_bytes()[:500])
    elif damage == "pickled":
        np.save(images, np.array([{"an": "object"}], dtype=object), allow_pickle=True)
    elif damage == "info":
        info = json.loads((entry / "info.json").read_text())
        (entry / "info.json").write_text(json.dumps({**info, "shape": [1, 9, 9]}))
    else:
        images.unlink()
    with pytest.raises(DataError) as error:
        load_dataset(DatasetConfig(), "train")
    assert str(entry) in one_sentence(error)


# --- real images


@pytest.mark.slow
def test_real_cifar10_jpegs(tmp_path):
    archives = [parent / "shared/data/cifar10-jpg.tar.xz" for parent in REPOSITORY.parents]
    archive = next((path for path in archives if path.is_file()), None)
    if archive is None:
        pytest.skip("the CIFAR-10 JPEG copy (../shared/data/cifar10-jpg.tar.xz) is not here")
    with tarfile.open(archive) as tar:
        wanted = [m for m in tar if m.isfile() and m.name.endswith(("00.jpg", "50.jpg"))]
        tar.extractall(tmp_path, wanted, filter="data")
    train = load_dataset(imagefolder(tmp_path), "train")
    test = load_dataset(imagefolder(tmp_path), "test")
    assert train.info.num_classes == 10
    assert train.info.shape == (3, 32, 32)
    assert len(train) > len(test) > 0
    # Published for the lossless training set; a subset of the JPEG copy comes close.
    np.testing.assert_allclose(train.info.mean, (0.4914, 0.4822, 0.4465), atol=0.03)
    np.testing.assert_allclose(train.info.std, (0.2470, 0.2435, 0.2616), atol=0.02)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_images_of_more_than_8_bits_are_refused_in_grey_and_in_colour(tmp_path, channels):
    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    colour_type = {1: 0, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", 2, 2, 16, colour_type, 0, 0, 0)
    pixels = zlib.compress((b"\0" + bytes(2 * 2 * channels)) * 2)
    path = tmp_path / "deep.png"
    parts = ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b""))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts))
    with pytest.raises(DataError, match="more than 8 bits a channel"):
        decode_image(path)
