"""Flower's arrays that hold a PyTorch tensor where it is, and become bytes only when they are sent.

``flwr.app.Array`` is NumPy's bytes from the start: a model costs a copy to make, another to read, and
one to the host before. In one process nobody needs the bytes.
"""

from collections.abc import Mapping
from typing import Any

import torch
from flwr.app import Array, ArrayRecord
from flwr.common.constant import SType
from numpy.typing import NDArray
from torch import Tensor

_DTYPES = {
    dtype: str(dtype).removeprefix("torch.")
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}


class TensorArray(Array):
    """An ``Array`` of a tensor, on any device; a view into a stack of many clients' tensors will do.

    To Flower it is an ordinary one: the same dtype, shape, bytes and object id, and it is an ordinary one
    at the other end of a connection. The tensor must not be changed afterwards.

    Attributes:
        tensor: the one it was made of, detached; nothing is copied.

    Raises:
        TypeError: for a dtype that NumPy lacks, such as bfloat16.
    """

    tensor: Tensor

    def __init__(self, tensor: Tensor) -> None:
        if tensor.dtype not in _DTYPES:
            raise TypeError(
                f"a tensor of {tensor.dtype} cannot be an array: NumPy has no such type; convert it to "
                "float32."
            )
        # Past Array's own attribute hook, which would take longer than all the rest.
        self.__dict__.update(
            tensor=tensor.detach(),
            dtype=_DTYPES[tensor.dtype],
            shape=tuple(tensor.shape),
            stype=SType.NUMPY,
        )

    @property
    def data(self) -> bytes:  # type: ignore[override]
        """The bytes of NumPy's .npy format, made when they are first asked for."""
        if "_bytes" not in self.__dict__:
            self.__dict__["_bytes"] = Array.from_numpy_ndarray(self.numpy()).data
        made: bytes = self.__dict__["_bytes"]
        return made

    def numpy(self) -> NDArray[Any]:
        """Return the values: the tensor's own memory on a CPU, one copy of it from elsewhere."""
        array: NDArray[Any] = self.tensor.cpu().numpy()
        return array

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy in another process is Flower's own: neither the device nor the stack goes along.
        return Array, (self.dtype, self.shape, self.stype, self.data)

    def deflate(self) -> bytes:
        # What is sent names its class, and the other end knows Flower's alone.
        return Array(self.dtype, self.shape, self.stype, self.data).deflate()


def tensor_record(state: Mapping[str, Tensor]) -> ArrayRecord:
    """Return a state dict as a record whose arrays hold its tensors, without copying any."""
    record = ArrayRecord()
    for name, tensor in state.items():
        record[name] = TensorArray(tensor)
    return record


def state_of(record: ArrayRecord) -> dict[str, Tensor]:
    """Return a record as a state dict: its tensors where they are, or else copies of its bytes."""
    tensors = {
        name: array.tensor for name, array in record.items() if isinstance(array, TensorArray)
    }
    return tensors if len(tensors) == len(record) else dict(record.to_torch_state_dict())
