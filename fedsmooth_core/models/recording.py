"""What a model does with an image, step by step: recorded from one small pass on the CPU.

Only this thread is watched, so other models may run at the same time (``torch.fx`` would trace them,
too). Not on the ``meta`` device, whose first operation imports PyTorch's compiler: seconds.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class Call(NamedTuple):
    """One step: a layer, or a function outside of all layers."""

    target: str | Callable[..., Any]
    """The layer's name in the model, or the function."""
    inputs: tuple[int, ...]
    """Places of the values that it takes: 0 is the batch of images, i + 1 what call i gave."""
    args: tuple[Any, ...]
    """All positional arguments; of values, only shape and dtype matter."""
    kwargs: dict[str, Any]
    output: Tensor
    """What it gives; only shape and dtype matter."""


class UnreadableModelError(Exception):
    """A model does not let itself be recorded."""


def _has_no_parts(module: nn.Module) -> bool:
    return not isinstance(module, nn.Sequential) and not list(module.children())


def record(model: nn.Module, shape: tuple[int, ...]) -> list[Call]:
    """Record a pass in eval mode over two black images. A module without parts is one step.

    Args:
        model: left as it is.
        shape: (C, H, W) of an image.

    Returns:
        The calls in order; the last one gives the model's result.

    Raises:
        UnreadableModelError: where the pass fails, uses a tensor that no call gave, or ends with one.
    """
    try:
        skeleton = copy.deepcopy(model).cpu().eval()
    except Exception as error:  # a module may keep what cannot be copied
        raise UnreadableModelError(f"it cannot be copied ({error})") from error
    dtype = next((weight.dtype for weight in skeleton.parameters()), torch.float32)
    images = torch.zeros(2, *shape, dtype=dtype)
    recorder = _Recorder(images)
    for name, module in skeleton.named_modules():
        if name and _has_no_parts(module):
            recorder.watch(name, module)
    try:
        with torch.no_grad(), recorder:
            result = skeleton(images)
    except UnreadableModelError:
        raise
    except Exception as error:  # whatever somebody's module does with black images
        raise UnreadableModelError(f"a pass over black images fails ({error})") from error
    if not recorder.calls or result is not recorder.calls[-1].output:
        raise UnreadableModelError("its result is not that of its last step")
    return recorder.calls


class _Recorder(TorchFunctionMode):
    """Notes layers and functions, and which values they pass on."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._places = {id(images): 0}
        self._alive = [images]  # so that no other tensor takes its identity
        self._inside_layer = False

    def watch(self, name: str, module: nn.Module) -> None:
        """Note the calls of one layer of the model."""
        forward = module.forward

        def noted(*args: Any, **kwargs: Any) -> Any:
            if self._inside_layer:
                return forward(*args, **kwargs)
            with self._layer():
                output = forward(*args, **kwargs)
            self._note(name, args, kwargs, output)
            return output

        module.forward = noted

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        # Sizes and the like are no steps.
        if not self._inside_layer and isinstance(output, Tensor):
            self._note(func, args, kwargs or {}, output)
        return output

    @contextmanager
    def _layer(self) -> Iterator[None]:
        self._inside_layer = True
        try:
            yield
        finally:
            self._inside_layer = False

    def _note(
        self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        given = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
        unknown = [each for each in given if id(each) not in self._places]
        if unknown or not isinstance(output, Tensor):
            raise UnreadableModelError(f"{target} takes or gives something else than a value")
        places = tuple(self._places[id(each)] for each in given)
        self.calls.append(Call(target, places, args, kwargs, output))
        # A function in place gives the tensor that it took: from here on that is the new value.
        self._places[id(output)] = len(self.calls)
        self._alive.append(output)
