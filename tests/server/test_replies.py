"""Replies: nothing of one is used before all of it has been checked, and no bytes are trusted."""

import contextlib
import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from client.tensor_array import tensor_record
from server import replies
from server.replies import BadReplyError, GlobalModel, state_of
from server.simulation import InProcessGrid

CAP = 1000
EXPECTED = {
    "weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "bias": torch.zeros(3, dtype=torch.float64),
    "count": torch.tensor(7),
}
METRICS = {
    "num-examples": 40,
    "train-loss": 1.5,
    "train-accuracy": 0.5,
    "setup-seconds": 1.0,
    "train-seconds": 2.0,
}


@pytest.fixture(autouse=True, scope="module")
def speaking_as_the_server():
    InProcessGrid(1)


def read_reply(message, expected, cap):
    return replies.read_reply(message, GlobalModel(expected), cap)


def reply(arrays=None, metrics=None, content=None):
    """A train reply, good but for what is given."""
    if content is None:
        content = RecordDict(
            {
                "arrays": ArrayRecord(EXPECTED) if arrays is None else arrays,
                "metrics": MetricRecord(METRICS if metrics is None else metrics),
            }
        )
    return Message(content, 1, "train")


def reason(message):
    with pytest.raises(BadReplyError) as error:
        read_reply(message, EXPECTED, CAP)
    text = str(error.value)
    assert "\n" not in text
    assert not text.endswith(".")
    return text


def with_tensor(name, tensor):
    return ArrayRecord(EXPECTED | {name: tensor})


def with_array(data, stype="numpy.ndarray"):
    """A reply whose ``weight`` says that it is what it should be, and holds these bytes."""
    arrays = ArrayRecord(EXPECTED)
    arrays["weight"] = Array("float32", (2, 3), stype, data)
    return reply(arrays)


def npy(array, allow_pickle=False):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=allow_pickle)
    return file.getvalue()


def test_a_good_reply_comes_through_as_it_is():
    state, metrics = read_reply(reply(), EXPECTED, CAP)
    assert list(state) == list(EXPECTED)
    for name, tensor in EXPECTED.items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name], tensor)
    assert dict(metrics) == METRICS


def test_the_order_of_its_tensors_does_not_matter():
    reversed_arrays = ArrayRecord(dict(reversed(EXPECTED.items())))
    state, _ = read_reply(reply(reversed_arrays), EXPECTED, CAP)
    assert list(state) == list(EXPECTED)


@pytest.mark.parametrize("kept", [["arrays"], ["metrics"], []])
def test_a_reply_without_one_of_its_records_is_refused(kept):
    whole = reply().content
    text = reason(reply(content=RecordDict({name: whole[name] for name in kept})))
    assert text == "it lacks the record 'arrays' or 'metrics'"
    other = RecordDict({"arrays": ConfigRecord(), "metrics": ConfigRecord()})
    assert reason(reply(content=other)) == text


# --- metrics


@pytest.mark.parametrize("missing", METRICS)
def test_a_missing_metric_is_named(missing):
    text = reason(reply(metrics={key: METRICS[key] for key in METRICS if key != missing}))
    assert text.startswith("its metrics are ")
    assert missing not in text.split(" instead of ")[0]
    assert missing in text.split(" instead of ")[1]


def test_a_metric_more_is_named():
    assert "'test-loss'" in reason(reply(metrics=METRICS | {"test-loss": 1.0}))


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), -float("inf"), [40], [1.0], 10**400],
    ids=["nan", "inf", "-inf", "integers", "floats", "beyond floats"],
)
def test_a_metric_is_one_finite_number(name, value):
    text = reason(reply(metrics=METRICS | {name: value}))
    assert text.startswith(f"{name}=")


@pytest.mark.parametrize("value", [0, -1, -(2**63), CAP + 1, 2**62, 40.0, 0.5])
def test_num_examples_is_a_whole_number_up_to_the_cap(value):
    assert reason(reply(metrics=METRICS | {"num-examples": value})) == (
        f"num-examples={value!r} is not an integer in [1, {CAP}]"
    )


@pytest.mark.parametrize("value", [1, CAP])
def test_num_examples_may_be_anything_up_to_the_cap(value):
    _, metrics = read_reply(reply(metrics=METRICS | {"num-examples": value}), EXPECTED, CAP)
    assert metrics["num-examples"] == value


# --- tensors


def test_a_missing_tensor_is_named():
    arrays = ArrayRecord({name: EXPECTED[name] for name in ("weight", "count")})
    assert reason(reply(arrays)) == (
        "its tensors differ from the model's: missing ['bias'], extra []"
    )


def test_a_tensor_more_is_named():
    text = reason(reply(with_tensor("backdoor", torch.zeros(1))))
    assert text == "its tensors differ from the model's: missing [], extra ['backdoor']"


@pytest.mark.parametrize(
    ("name", "shape"), [("weight", (3, 2)), ("weight", (1, 3)), ("weight", ()), ("count", (1,))]
)
def test_another_shape_is_refused_even_where_it_would_broadcast(name, shape):
    text = reason(reply(with_tensor(name, torch.zeros(shape, dtype=EXPECTED[name].dtype))))
    assert text == f"tensor {name!r} has shape {shape} instead of {tuple(EXPECTED[name].shape)}"


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("weight", "float64"), ("weight", "float16"), ("bias", "float32"), ("count", "float32")],
)
def test_another_dtype_is_refused(name, dtype):
    tensor = EXPECTED[name].to(getattr(torch, dtype))
    text = reason(reply(with_tensor(name, tensor)))
    assert text == f"tensor {name!r} is torch.{dtype} instead of {EXPECTED[name].dtype}"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_one_value_that_is_not_finite_is_enough(name, value):
    tensor = EXPECTED[name].clone()
    tensor.view(-1)[-1] = value
    text = reason(reply(with_tensor(name, tensor)))
    assert text == f"tensor {name!r} has values that are not finite"


# --- bytes


@pytest.mark.parametrize("stype", ["torch.tensor", "pickle", ""])
def test_only_numpys_format_is_read(stype):
    text = reason(with_array(npy(EXPECTED["weight"].numpy()), stype))
    assert text == f"tensor 'weight' is serialised as {stype!r}"


def archive():
    file = io.BytesIO()
    np.savez(file, weight=np.zeros((2, 3), np.float32))
    return file.getvalue()


GOOD = npy(EXPECTED["weight"].numpy())
UNDECODABLE = {
    "empty": b"",
    "header alone": GOOD[:64],
    "torn": GOOD[:-1],
    "other magic": b"\x93NUMPX" + GOOD[6:],
    "unknown version": GOOD[:6] + b"\x09\x00" + GOOD[8:],
    "huge header": GOOD[:8] + b"\xff\xff" + GOOD[10:] + b" " * 70_000,
    "archive": archive(),
    "torn archive": archive()[:50],
    "text": npy(np.array(["a", "b"])),
    "records": npy(np.zeros(2, dtype=[("a", "f4"), ("b", "i4")])),
    "other byte order": npy(np.zeros((2, 3), ">f4")),
}


@pytest.mark.parametrize("data", UNDECODABLE.values(), ids=UNDECODABLE.keys())
def test_bytes_that_are_no_array_of_numbers_are_refused(data):
    assert reason(with_array(data)).startswith("tensor 'weight' cannot be decoded (")


def test_an_array_that_claims_more_than_all_memory_is_refused():
    """The header is the sender's word; 10^15 values would not fit any machine."""
    header = {"descr": "<f4", "fortran_order": False, "shape": (10**15,)}
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, header)
    text = reason(with_array(file.getvalue() + b"\0" * 24))
    assert text.startswith("tensor 'weight' cannot be decoded (")


@given(data=st.binary(max_size=400))
def test_no_random_bytes_do_anything_but_be_refused(data):
    assert "tensor 'weight'" in reason(with_array(data))


@given(data=st.data())
def test_a_good_array_with_any_byte_changed_is_refused_or_the_right_kind(data):
    changed = bytearray(GOOD)
    position = data.draw(st.integers(0, len(GOOD) - 1))
    changed[position] ^= data.draw(st.integers(1, 255))
    state = EXPECTED
    with contextlib.suppress(BadReplyError):
        state, _ = read_reply(with_array(bytes(changed)), EXPECTED, CAP)
    assert state["weight"].shape == (2, 3)
    assert state["weight"].dtype == torch.float32
    assert torch.isfinite(state["weight"]).all()


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.mark.parametrize("wrapped", [True, False], ids=["in an object array", "bare"])
def test_a_pickled_object_is_refused_and_never_unpickled(wrapped, tmp_path):
    sprung = tmp_path / "sprung"
    trap = np.array([Trap(sprung)], dtype=object)
    data = npy(trap, allow_pickle=True) if wrapped else pickle.dumps(trap[0])
    assert reason(with_array(data)).startswith("tensor 'weight' cannot be decoded (")
    assert not sprung.exists()
    np.load(io.BytesIO(data), allow_pickle=True)  # the trap is a live one
    assert sprung.exists()


@pytest.mark.parametrize("name", ["train-loss", "train-accuracy", "setup-seconds", "train-seconds"])
def test_no_metric_is_negative(name):
    assert reason(reply(metrics=METRICS | {name: -1e300})) == f"{name}=-1e+300 is negative"


def test_an_accuracy_is_at_most_1():
    assert reason(reply(metrics=METRICS | {"train-accuracy": 1e308})).endswith("is more than 1")


@pytest.mark.parametrize("value", [3.4e38, 0.0, -1.0])
def test_normalisation_is_never_trained(value):
    expected = dict(EXPECTED) | {"normalise.std": torch.ones(1)}
    arrays = ArrayRecord(expected | {"normalise.std": torch.full((1,), value)})
    with pytest.raises(BadReplyError, match=r"'normalise\.std' was changed"):
        read_reply(reply(arrays), expected, CAP)
    assert read_reply(reply(ArrayRecord(expected)), expected, CAP)


def test_a_variance_is_never_negative():
    expected = dict(EXPECTED) | {"norm.running_var": torch.ones(2)}
    arrays = ArrayRecord(expected | {"norm.running_var": torch.tensor([1.0, -1.0])})
    with pytest.raises(BadReplyError, match="negative variances"):
        read_reply(reply(arrays), expected, CAP)


@pytest.mark.parametrize("count", [2**63 - 1, -(2**63), 2_000_000])
def test_a_counter_does_not_run_away(count):
    expected = dict(EXPECTED) | {"norm.num_batches_tracked": torch.tensor(100)}
    arrays = ArrayRecord(expected | {"norm.num_batches_tracked": torch.tensor(count)})
    with pytest.raises(BadReplyError, match=r"counts .* more or less than the model's"):
        read_reply(reply(arrays), expected, CAP)
    arrays = ArrayRecord(expected | {"norm.num_batches_tracked": torch.tensor(120)})
    state, _ = read_reply(reply(arrays), expected, CAP)
    assert int(state["norm.num_batches_tracked"]) == 120


# --- tensors that never were bytes


LARGE = {
    "large": torch.linspace(-1, 1, 70_000).reshape(7, 10_000),
    "small": torch.zeros(2, 3, dtype=torch.float64),
    "empty": torch.zeros(0, 4),
    "normalise.std": torch.ones(3),
    "norm.running_var": torch.ones(3),
    "norm.num_batches_tracked": torch.tensor(100),
    "flag": torch.tensor([True, False]),
}


def changed(name, value, place=-1):
    tensor = LARGE[name].clone()
    tensor.view(-1)[place] = value
    return {name: tensor}


NAN, INF = float("nan"), float("inf")
FAULTS = {
    "a NaN at the start": changed("large", NAN, 0),
    "a NaN in the middle": changed("large", NAN, 35_001),
    "a NaN at the end": changed("large", NAN),
    "an infinity": changed("large", INF, 12_345),
    "a negative infinity": changed("large", -INF, 54_321),
    "a small NaN": changed("small", NAN, 2),
    "a small infinity": changed("small", INF),
    "another normalisation": changed("normalise.std", 2.0),
    "a normalisation of NaN": changed("normalise.std", NAN),
    "a negative variance": changed("norm.running_var", -1e-30, 1),
    "a counter that runs": changed("norm.num_batches_tracked", 2_000_000, 0),
    "a counter at its end": changed("norm.num_batches_tracked", 2**63 - 1, 0),
    "another shape": {"large": LARGE["large"].t()},
    "another dtype": {"large": LARGE["large"].double()},
    "a tensor more": {"backdoor": torch.zeros(1)},
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_tensors_are_refused_in_the_words_that_bytes_are(fault):
    said = []
    for make in (ArrayRecord, tensor_record):
        with pytest.raises(BadReplyError) as error:
            read_reply(reply(make(LARGE | fault)), LARGE, CAP)
        said.append(str(error.value))
    assert said[0] == said[1]
    assert next(iter(fault)) in said[0]


def test_tensors_are_taken_as_they_are():
    good = LARGE | changed("large", torch.finfo(torch.float32).max) | changed("flag", True)
    good |= changed("norm.num_batches_tracked", 150, 0)
    for make in (ArrayRecord, tensor_record):
        state, _ = read_reply(reply(make(good)), LARGE, CAP)
        assert list(state) == list(LARGE)
        for name, tensor in good.items():
            assert torch.equal(state[name], tensor)
            if make is tensor_record:
                assert state[name].data_ptr() == tensor.data_ptr()


def test_bytes_are_read_without_a_copy(recwarn):
    arrays = ArrayRecord(LARGE | {"small": LARGE["large"].t()})
    for name, tensor in state_of(arrays).items():
        assert torch.equal(tensor, arrays.to_torch_state_dict()[name])
        data = np.frombuffer(arrays[name].data, np.uint8)
        if tensor.numel():
            assert tensor.data_ptr() + tensor.nbytes == data.ctypes.data + len(data)
    assert not recwarn.list


def test_numbers_that_lie_askew_in_their_bytes_are_read():
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (2,), }\n"
    data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    arrays = ArrayRecord()
    arrays["x"] = Array("float64", (2,), "numpy.ndarray", data + np.array([1.5, -2.0]).tobytes())
    assert state_of(arrays)["x"].tolist() == [1.5, -2.0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_a_device_finds_the_same_faults(fault):
    there = {name: tensor.cuda() for name, tensor in (LARGE | fault).items()}
    said = []
    for arrays in (ArrayRecord(LARGE | fault), tensor_record(there)):
        with pytest.raises(BadReplyError) as error:
            read_reply(reply(arrays), LARGE, CAP)
        said.append(str(error.value))
    assert said[0] == said[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_good_reply_is_waited_for_once(recwarn):
    model = GlobalModel({name: tensor.cuda() for name, tensor in LARGE.items()})
    message = reply(tensor_record({name: tensor.clone() for name, tensor in model.state.items()}))
    torch.cuda.set_sync_debug_mode("warn")
    try:
        state, _ = replies.read_reply(message, model, CAP)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in recwarn.list if "synchroniz" in str(w.message)]) <= 1
    assert all(tensor.is_cuda for tensor in state.values())
