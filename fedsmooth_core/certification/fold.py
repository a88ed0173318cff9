"""Batch normalisation folded into the convolution before it: the same function in fewer operations."""

import copy
import operator
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

_TRACING = threading.Lock()


class _Tracer(fx.Tracer):
    """Traces in its own thread alone. ``torch.fx`` takes over every module's calls in the process while it
    traces, but a service computes with other models meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)


def folded(model: nn.Module) -> nn.Module:
    """Return a copy that computes what the model computes in eval mode, without avoidable layers.

    Where a ``BatchNorm2d`` with running statistics takes nothing but the output of a ``Conv2d`` that
    goes nowhere else, the two are one convolution (Jacob et al., CVPR 2018, section 3.2): weight
    W * g / sqrt(v + eps) and bias (b - mean) * g / sqrt(v + eps) + beta, channel by channel, computed in
    float64. In such a model a ReLU also overwrites its input where nothing else reads that. Scores
    differ by rounding alone. Normalisation of the images stays: at zero padding it cannot be folded.

    Args:
        model: in any mode; it is left as it is.

    Returns:
        The copy, in eval mode: for good, since the graph is that of eval mode. A model without
        batch normalisation, or one that ``torch.fx`` cannot trace, is merely copied.
    """
    model = copy.deepcopy(model).eval()
    if not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        return model
    if not _is_plain(model):
        return model
    try:
        with _TRACING:
            traced = fx.GraphModule(model, _Tracer().trace(model))
    # Tracing runs the model's own code, which may object to a stand-in for images in any way.
    except Exception:
        return model
    modules = dict(traced.named_modules())
    pairs = [
        (node.args[0], node)
        for node in traced.graph.nodes
        if _is_foldable_norm(node, modules) and _is_foldable_convolution(node.args[0], modules)
    ]
    if not pairs:
        return model
    for number, (convolution, norm) in enumerate(pairs):
        name = f"_folded_{number}"
        traced.add_submodule(name, _one(modules[convolution.target], modules[norm.target]))
        convolution.target = name
        norm.replace_all_uses_with(convolution)
        traced.graph.erase_node(norm)
    _overwrite(traced)
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced


def _is_plain(module: nn.Module) -> bool:
    """Whether a module has no hooks: one may change what it takes, what it gives, or its weights."""
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    return not any(hooks) and not hasattr(module, "parametrizations")


def _takes_one_value(node: fx.Node) -> bool:
    return len(node.args) == 1 and not node.kwargs


def _is_foldable_norm(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    norm = modules.get(str(node.target)) if node.op == "call_module" else None
    if norm is None or not _takes_one_value(node) or norm.training or not _is_plain(norm):
        return False
    # In eval mode a layer without running statistics still normalises by those of the batch.
    return type(norm) is nn.BatchNorm2d and norm.running_mean is not None


def _is_foldable_convolution(node: object, modules: dict[str, nn.Module]) -> bool:
    if not isinstance(node, fx.Node) or node.op != "call_module" or len(node.users) != 1:
        return False
    convolution = modules[str(node.target)]
    return type(convolution) is nn.Conv2d and _is_plain(convolution)


@torch.no_grad()
def _one(convolution: nn.Module, norm: nn.Module) -> nn.Conv2d:
    assert isinstance(convolution, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    bias = -norm.running_mean.double() * scale
    if convolution.bias is not None:
        bias = bias + convolution.bias.double() * scale
    if norm.bias is not None:
        bias = bias + norm.bias.double()
    both = copy.deepcopy(convolution)
    both.weight.copy_(convolution.weight.double() * scale.view(-1, 1, 1, 1))
    both.bias = nn.Parameter(bias.to(convolution.weight.dtype), requires_grad=False)
    return both.eval()


def _overwrite(traced: fx.GraphModule) -> None:
    """Let each ReLU that alone reads a convolution's output or a sum write over it."""
    modules = dict(traced.named_modules())
    for node in traced.graph.nodes:
        is_function = node.op == "call_function" and node.target is F.relu
        is_module = node.op == "call_module" and type(modules[node.target]) is nn.ReLU
        if (is_function or is_module) and node.args and _is_scratch(node.args[0], modules):
            node.op, node.target = "call_function", torch.relu_
            node.args, node.kwargs = node.args[:1], {}


def _is_scratch(node: object, modules: dict[str, nn.Module]) -> bool:
    if not isinstance(node, fx.Node) or len(node.users) != 1:
        return False
    if node.op == "call_module":
        return type(modules[str(node.target)]) is nn.Conv2d
    return node.op == "call_function" and node.target in (operator.add, torch.add)
