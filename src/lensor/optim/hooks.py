"""Hooks through which a tracker follows a model: on its forward pass, its outputs, and the gradients of its weights.

The hooks do not keep the tracker alive. Copies and pickles of a followed model are not followed.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.utils.hooks import RemovableHandle

Instead: TypeAlias = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""A function of a forward method, its positional arguments and its named arguments."""


class Follower(Protocol):
    """An object that follows a model."""

    def collects(self) -> bool:
        """Whether to collect factors from a forward pass that starts now."""
        ...

    def forward(self, forward: Callable[..., Any], arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Run a forward pass and collect factors from it."""
        ...

    def instead(self) -> Instead | None:
        """What to call instead of the model's forward method, with this method as its first argument."""
        ...

    def leave(self) -> None:
        """Discard a forward pass whose outputs were never received."""
        ...

    def after(self, out: Any) -> None:
        """Receive the outputs of the model, after all of your hooks."""
        ...


F = TypeVar("F", bound=Follower)


def attach(follower: Follower, model: nn.Module) -> RemovableHandle:
    """Hook into a model until the owner of the hooks is deleted; return the handle of the hook for the outputs."""
    here = weakref.ref(follower)
    handle = model.register_forward_hook(_After(here), with_kwargs=True)
    watched = _Watched(here, model)
    model.__dict__["forward"] = watched
    weakref.finalize(follower, _detach, weakref.ref(model), watched, handle)
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # previously compiled code does not call the hooks
    return handle


def move_to_end(model: nn.Module, handle: RemovableHandle) -> None:
    """Move a forward hook after all others, so that it receives the outputs as your hooks change them."""
    hooks = model._forward_hooks
    if handle.id in hooks:
        hooks[handle.id] = hooks.pop(handle.id)


def _detach(model: weakref.ref[nn.Module], watched: _Watched, handle: RemovableHandle) -> None:
    """Remove the hook and restore the model's forward method, unless the method has been replaced since."""
    handle.remove()
    found = model()
    if found is not None and vars(found).get("forward") is watched:
        if watched.before is None:
            del found.__dict__["forward"]
        else:
            found.__dict__["forward"] = watched.before


class OnGradient:
    """A hook on a weight, called before or after a gradient is added to the weight's `grad`."""

    def __init__(self, follower: weakref.ref[F], weight: str, call: Callable[[F, str], None]) -> None:
        self.follower, self.weight, self.call = follower, weight, call

    def __call__(self, value: Tensor) -> None:
        """Handle the gradient, or the parameter, that torch passes."""
        follower = self.follower()
        if follower is not None:
            self.call(follower, self.weight)


class _Watched:
    """Replaces a model's forward method; copies and pickles contain the original method."""

    watches = True

    def __init__(self, follower: weakref.ref[Any], model: nn.Module) -> None:
        self.follower, self.model = follower, weakref.ref(model)
        self.before = vars(model).get("forward")

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if not torch.compiler.is_dynamo_compiling():
            return self.run(arguments, named)
        model = self.model()
        if model is not None and (not model.training or torch.compiler.is_exporting()):  # do not collect factors
            return (self.before or partial(type(model).forward, model))(*arguments, **named)
        return _run_outside(self, arguments, named)

    @property
    def __code__(self) -> Any:
        """The code of the method, for tools that read its signature."""
        method = self.before if self.before is not None else getattr(type(self.model()), "forward", None)
        return getattr(method, "__code__", None)

    def run(self, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Run the forward pass, through the follower if it collects factors."""
        model, follower = self.model(), self.follower()
        assert model is not None
        forward = self.before if self.before is not None else partial(type(model).forward, model)
        if follower is None:
            return forward(*arguments, **named)
        followed = partial(_followed, follower, forward)
        instead = follower.instead()
        return followed(*arguments, **named) if instead is None else instead(followed, arguments, named)

    def __reduce__(self) -> Any:
        if self.before is not None:
            return _same, (self.before,)
        return getattr, (self.model(), "forward")


def _followed(follower: Follower, forward: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Run a forward pass, and collect factors from it if the follower asks for them."""
    if not follower.collects():
        follower.leave()
        return forward(*arguments, **named)
    return follower.forward(forward, arguments, named)


def _same(value: Any) -> Any:
    return value


@_disable_dynamo
def _run_outside(watched: _Watched, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """Run a followed forward pass uncompiled."""
    return watched.run(arguments, named)


class _After:
    """A hook for the outputs of a model; copies and pickles of the model get a hook that does nothing."""

    def __init__(self, follower: weakref.ref[Any] | None) -> None:
        self.follower = follower

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], out: Any) -> None:
        if not torch.compiler.is_dynamo_compiling():
            self.give(out)
        elif module.training and not torch.compiler.is_exporting():
            _give_outside(self, out)

    def give(self, out: Any) -> None:
        """Pass the outputs to the follower."""
        follower = self.follower() if self.follower is not None else None
        if follower is not None:
            follower.after(out)

    def __reduce__(self) -> Any:
        return _After, (None,)


@_disable_dynamo
def _give_outside(hook: _After, out: Any) -> None:
    hook.give(out)
