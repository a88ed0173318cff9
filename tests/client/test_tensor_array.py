"""TensorArray beside Flower's own Array: the same in every way but what it costs."""

import pickle

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from hypothesis import given, settings
from hypothesis import strategies as st

from client.tensor_array import TensorArray, tensor_record
from server.simulation import InProcessGrid

DTYPES = ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")


def some_state(number):
    stream = torch.Generator().manual_seed(number)
    return {
        "weight": torch.randn(3, 4, generator=stream),
        "scale": torch.randn((), generator=stream, dtype=torch.float64),
        "empty": torch.zeros(0, 2),
    }


@settings(deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 5), max_size=4).map(tuple),
    form=st.sampled_from(["whole", "slice of a stack", "transposed", "parameter"]),
    seed=st.integers(0, 2**32),
)
def test_it_is_what_flowers_array_is(dtype, shape, form, seed):
    stream = torch.Generator().manual_seed(seed)
    stack = (100 * torch.randn((3, *shape), generator=stream)).to(getattr(torch, dtype))
    tensor = stack[1] if form == "slice of a stack" else stack[1].clone()
    if form == "transposed":
        tensor = tensor.movedim(0, -1) if shape else tensor
    elif form == "parameter" and tensor.is_floating_point():
        tensor = torch.nn.Parameter(tensor)
    ours, theirs = TensorArray(tensor), Array(tensor)
    assert isinstance(ours, Array)
    assert (ours.dtype, ours.shape, ours.stype) == (theirs.dtype, theirs.shape, theirs.stype)
    np.testing.assert_array_equal(ours.numpy(), theirs.numpy())
    assert ours.numpy().dtype == theirs.numpy().dtype
    assert ours.data == theirs.data
    assert ours.object_id == theirs.object_id
    assert ours.children.keys() == theirs.children.keys()


def test_nothing_is_copied_before_the_bytes_are_asked_for():
    stack = torch.arange(24.0).reshape(4, 2, 3)
    array = TensorArray(stack[2])
    assert array.tensor.data_ptr() == stack[2].data_ptr()
    assert array.numpy().ctypes.data == stack[2].data_ptr()
    assert not any(isinstance(value, bytes) for value in vars(array).values())
    assert array.data is array.data


def test_a_dtype_that_numpy_lacks_is_refused():
    with pytest.raises(
        TypeError, match=r"torch\.bfloat16 cannot be an array: NumPy has no such type"
    ):
        TensorArray(torch.zeros(2, dtype=torch.bfloat16))


def test_a_record_of_them_is_an_ordinary_record():
    state = some_state(1)
    ours, theirs = tensor_record(state), ArrayRecord(state)
    assert list(ours) == list(theirs)
    assert ours.object_id == theirs.object_id
    assert ours.count_bytes() == theirs.count_bytes()
    for name, tensor in ours.to_torch_state_dict().items():
        assert torch.equal(tensor, state[name])
    assert ArrayRecord(dict(ours)).object_id == theirs.object_id


def test_it_arrives_as_flowers_own_array_over_both_ways_of_sending():
    state = some_state(2)
    content = RecordDict({"arrays": tensor_record(state)})
    pieces = {key: piece.deflate() for key, piece in get_all_nested_objects(content).items()}
    in_one = recorddict_from_proto(recorddict_to_proto(content))
    in_pieces = inflate_object_from_contents(content.object_id, pieces)
    for arrived in (in_one, in_pieces):
        arrays = arrived["arrays"]
        assert {type(array) for array in arrays.values()} == {Array}
        assert arrays == ArrayRecord(state)


def test_flowers_fedavg_makes_the_same_of_both():
    InProcessGrid(1)
    aggregates = []
    for make in (tensor_record, ArrayRecord):
        replies = []
        for number in range(5):
            metrics = MetricRecord({"num-examples": 10 + number, "train-loss": 0.5 * number})
            content = RecordDict({"arrays": make(some_state(number)), "metrics": metrics})
            replies.append(Message(content, 1, "train"))
        aggregates.append(FedAvg().aggregate_train(1, replies))
    (ours, our_metrics), (theirs, their_metrics) = aggregates
    assert ours == theirs
    assert our_metrics == their_metrics


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_tensor_stays_on_its_device():
    state = {name: tensor.cuda() for name, tensor in some_state(3).items()}
    torch.cuda.set_sync_debug_mode("error")
    try:
        record = tensor_record(state)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(array.tensor.is_cuda for array in record.values())
    assert record.object_id == ArrayRecord(some_state(3)).object_id


def test_a_copy_in_another_process_is_an_ordinary_array_of_its_own_values():
    stack = torch.arange(4000.0).view(40, 100)
    array = TensorArray(stack[3])
    packed = pickle.dumps(array)
    assert len(packed) < 1000
    copy = pickle.loads(packed)
    assert type(copy) is Array
    assert np.array_equal(copy.numpy(), stack[3].numpy())
