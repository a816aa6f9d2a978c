"""The passes of a closure: its calls of the model are recorded, and repeated with derivatives or other parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map, tree_unflatten

from lensor.curvature.graph import Reached
from lensor.curvature.watching import Preserving, RandomState, apart, aside, eagerly
from lensor.optim.hooks import Instead
from lensor.optim.updates import inner_products


@dataclass(eq=False)
class Call:
    """A call of the model's forward method.

    Args:
        forward: the method.
        arguments: its positional arguments.
        named: its named arguments.
        model: the model.
    """

    forward: Callable[..., Any]
    arguments: tuple[Any, ...]
    named: dict[str, Any]
    model: nn.Module
    after: RandomState | None = None
    """The random state after the call."""

    def __post_init__(self) -> None:
        self.before = RandomState(self.model)
        self.is_differentiated = torch.is_grad_enabled()
        kinds = {"cpu", *(p.device.type for p in self.model.parameters())}
        self._casts = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
            for kind in sorted(kinds)
            if torch.amp.is_autocast_available(kind)
        ]
        self._leaves = tree_leaves((self.arguments, self.named))
        self._versions = [one._version for one in self._leaves if isinstance(one, Tensor) and not one.is_inference()]

    @property
    def is_cast(self) -> bool:
        """Whether autocast is on."""
        return any(enabled for _, _, enabled in self._casts)

    @contextmanager
    def casting(self) -> Iterator[None]:
        """Restore the state of autocast."""
        with ExitStack() as stack:
            for kind, dtype, enabled in self._casts:
                stack.enter_context(torch.autocast(kind, dtype, enabled, cache_enabled=False))
            yield

    def require_same(self, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Raise unless a repeated call has the same arguments.

        Raises:
            ValueError: if they differ.
        """
        versions = [one._version for one in self._leaves if isinstance(one, Tensor) and not one.is_inference()]
        leaves = tree_leaves((arguments, named))
        same = len(leaves) == len(self._leaves) and versions == self._versions
        if not same or not all(map(_is_same, leaves, self._leaves)):
            raise ValueError(
                "the closure called the model with other inputs when it was called again, or the model changed its"
                " inputs in place, expected the same batch in every call: read the batch before the step"
            )


@dataclass(eq=False)
class Outputs:
    """What a call returns, with the derivatives along some directions.

    Args:
        leaves: the tensors and other objects in the returned value.
        tree: the containers that hold them.
        tangents: the derivatives along each direction, by the position of the leaf.
    """

    leaves: list[Any]
    tree: TreeSpec
    tangents: list[dict[int, Tensor]]
    starts: dict[int, Tensor] = field(default_factory=dict)
    """The starts of the graphs of leaves that depend on the parameters, by position."""

    def restarted(self) -> Any:
        """The returned value, with new graphs."""
        leaves = list(self.leaves)
        for at in sorted(set().union(*self.tangents)):
            self.starts[at] = self.leaves[at].detach().requires_grad_()
            self.starts[at].register_hook(_refuse)
            leaves[at] = self.starts[at].clone()  # the closure may write into a clone
        return tree_unflatten(leaves, self.tree)


@dataclass(frozen=True, eq=False)
class Derivatives:
    """The derivatives of the loss with respect to the outputs, which are all output tensors of all calls.

    Args:
        tangents: the derivatives of the outputs along each direction of the parameters.
        gradients: the gradients of the loss.
        products: the products of the loss Hessian with the tangents of each direction.
        returned: the gradients of the loss that the closure returned; None if it returned no tensor with a graph.
    """

    tangents: list[list[Tensor]]
    gradients: list[Tensor]
    products: list[list[Tensor]]
    returned: list[Tensor] | None


class Passes:
    """The passes of one call of a closure, which this runs.

    The closure runs uncompiled, and attention with torch's own matrix products, as in the repetitions.

    Args:
        model: the model.
        closure: a function that computes the loss and its gradients.
        replacing: a context that calls a function instead of the model's forward method.
        parameters: the parameters whose gradients the repetitions must leave as they are.
    """

    def __init__(
        self,
        model: nn.Module,
        closure: Callable[[], Any],
        replacing: Callable[[Instead], AbstractContextManager[None]],
        parameters: Iterable[Tensor],
    ) -> None:
        self.model, self.closure, self.replacing = model, closure, replacing
        self.parameters = list({id(one): one for one in (*model.parameters(), *parameters)}.values())
        self.calls: list[Call] = []
        self._start = RandomState(model)
        self.value = self._run(self._record)
        if not any(call.is_differentiated for call in self.calls):
            raise ValueError(
                "the closure did not run the model with gradients, expected a function that computes the loss of the"
                " model, calls backward and returns the loss"
            )

    @property
    def is_exact(self) -> bool:
        """Whether the passes compute in at least single precision."""
        floats = [p for p in self.model.parameters() if p.is_floating_point()]
        return not any(call.is_cast for call in self.calls) and all(
            one.dtype in (torch.float32, torch.float64) for one in floats
        )

    def loss(self, value: Any = None) -> float:
        """The loss that the closure returned.

        Args:
            value: what it returned in a repetition; in its first call unless given.

        Raises:
            TypeError: if it returned something else.
        """
        value = self.value if value is None else value
        if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
            return float(value.detach())
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        raise TypeError(f"the closure returned an object of type {type(value).__name__}, expected the loss as a number")

    @property
    def precision(self) -> float:
        """The relative precision of the loss."""
        is_float = isinstance(self.value, Tensor) and self.value.is_floating_point()
        return torch.finfo(self.value.dtype if is_float else torch.float32).eps

    # ------------------------------------------------------------------------------------------------------ repetitions
    def derivatives(self, directions: Sequence[Mapping[str, Tensor]]) -> Derivatives:
        """The first and second derivatives of the loss with respect to the outputs.

        The closure runs again with given outputs in place of the model's.

        Args:
            directions: directions of the parameters: tensors of their shapes, by name.

        Raises:
            ValueError: if the model has no derivatives in forward mode, or the loss has no second derivative.
        """
        outputs = [self._outputs(call, directions) if call.is_differentiated else None for call in self.calls]

        def given(call: Call, at: int) -> Any:
            found = outputs[at]
            if found is not None:
                return found.restarted()
            with torch.no_grad():
                return call.forward(*call.arguments, **call.named)

        with self._again(), torch.enable_grad(), _Losses() as losses:
            value = self._repeat(given)
            if not losses.found:
                raise ValueError("the closure did not call loss.backward(), expected the gradients of the loss")
            known = [one for one in outputs if one is not None]
            starts = [start for one in known for start in one.starts.values()]
            if not starts:
                raise ValueError(
                    "the model returned no tensor that depends on the parameters, expected a tensor, or tensors in"
                    " tuples, lists or mappings"
                )
            self._require_inside(losses.found, starts)
            tangents = [
                [
                    one.tangents[at].get(place, torch.zeros_like(start))
                    for one in known
                    for place, start in one.starts.items()
                ]
                for at in range(len(directions))
            ]
            try:
                gradients = _gradients(sum(losses.found[1:], losses.found[0]), starts)
                if not any(one.requires_grad for one in gradients):
                    raise RuntimeError("its gradient does not depend on the outputs, or cannot be differentiated")
                slopes = [inner_products(zip(gradients, some, strict=True)) for some in tangents]
                products = [_gradients(one, starts) for one in slopes]
            except (NotImplementedError, RuntimeError) as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                raise ValueError(
                    "the loss has no second derivative with respect to the outputs, which adapt_lr and adapt_damping"
                    f" need: {error}"
                ) from error
            returned = None
            if isinstance(value, Tensor) and value.requires_grad and value.numel() == 1:
                returned = [one.detach() for one in _gradients(value.reshape(()), starts)]
        products = [[one.detach() for one in some] for some in products]
        return Derivatives(tangents, [one.detach() for one in gradients], products, returned)

    def _require_inside(self, losses: Iterable[Tensor], starts: Iterable[Tensor]) -> None:
        """Raise ValueError if losses depend on parameters outside of the model, whose gradients would be lost."""
        known = {id(one) for one in (*self.parameters, *starts)}
        for leaf in Reached(losses).leaves:
            if id(leaf) not in known:
                raise ValueError(
                    f"the loss depends on a tensor of shape {tuple(leaf.shape)} that requires gradients and is not a"
                    " parameter of the model, expected none with adapt_lr or adapt_damping: put all layers into one"
                    " model"
                )

    def _outputs(self, call: Call, directions: Sequence[Mapping[str, Tensor]]) -> Outputs:
        """The outputs of a call, with their derivatives by passes in forward mode."""
        call.require_same(call.arguments, call.named)
        found: list[tuple[list[Any], TreeSpec, dict[int, Tensor]]] = []
        for direction in directions:
            with self._again(), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
                duals = {
                    f"model.{name}": forward_ad.make_dual(p.detach(), direction[name].to(p.dtype))
                    for name, p in self.model.named_parameters()
                    if name in direction
                }
                call.before.restore()
                try:
                    with call.casting():
                        out = functional_call(_Forward(self.model, call.forward), duals, call.arguments, call.named)
                except (NotImplementedError, RuntimeError) as error:
                    if isinstance(error, torch.OutOfMemoryError):
                        raise
                    raise ValueError(
                        f"the model has no derivative in forward mode, which adapt_lr and adapt_damping need: {error}"
                    ) from error
                leaves, tree = tree_flatten(out)
                tangents: dict[int, Tensor] = {}
                for at, leaf in enumerate(leaves):
                    if isinstance(leaf, Tensor):
                        leaves[at], tangent = forward_ad.unpack_dual(leaf)
                        tangents |= {} if tangent is None else {at: tangent}
            found.append((leaves, tree, tangents))
        leaves, tree, _ = found[0]
        return Outputs(leaves, tree, [tangents for _, _, tangents in found])

    def loss_after(self, step: Iterable[tuple[Tensor, Tensor]]) -> float:
        """The loss that the closure returns after a step, which is undone.

        Args:
            step: the parameters, and what is added to each.
        """

        def without_graph(call: Call, at: int) -> Any:
            with torch.no_grad():
                out = call.forward(*call.arguments, **call.named)
            return tree_map(_as_leaf, out) if call.is_differentiated else out

        pairs = list(step)
        with torch.no_grad():
            kept = [(p, p.detach().clone()) for p, _ in pairs]
            try:
                for p, added in pairs:
                    p.add_(added.to(p.dtype))
                with self._again():
                    return self.loss(self._repeat(without_graph))
            finally:
                for p, before in kept:
                    p.copy_(before)

    # ---------------------------------------------------------------------------------------------------------- running
    def _run(self, instead: Instead) -> Any:
        """Call the closure, with a function in place of the model's forward method."""
        inside = False

        def outermost(forward: Callable[..., Any], arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
            nonlocal inside
            if inside or torch._C._current_graph_task_id() != -1:  # a checkpoint runs the model again
                return forward(*arguments, **named)
            inside = True
            try:
                return instead(forward, arguments, named)
            finally:
                inside = False

        with torch.enable_grad(), eagerly(), sdpa_kernel(SDPBackend.MATH), self.replacing(outermost):
            return self.closure()

    def _record(self, forward: Callable[..., Any], arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        call = Call(forward, arguments, named, self.model)
        self.calls.append(call)
        out = forward(*arguments, **named)
        call.after = RandomState(self.model)
        return out

    def _repeat(self, result: Callable[[Call, int], Any]) -> Any:
        """Call the closure again, with other results of the model's calls."""
        seen = 0

        def repeated(forward: Callable[..., Any], arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
            nonlocal seen
            if seen == len(self.calls):
                raise ValueError(self._uneven(f"at least {seen + 1}"))
            call = self.calls[seen]
            call.require_same(arguments, named)
            call.before.restore()
            out = result(call, seen)
            seen += 1
            if call.after is not None:
                call.after.restore()
            return out

        self._start.restore()
        value = self._run(repeated)
        if seen < len(self.calls):
            raise ValueError(self._uneven(str(seen)))
        return value

    def _uneven(self, found: str) -> str:
        return (
            f"the closure called the model {found} times when it was called again, expected {len(self.calls)}, as"
            " before: a closure must do the same in every call"
        )

    @contextmanager
    def _again(self) -> Iterator[None]:
        """Undo the effects of a repetition on the model, its gradients and the random generators."""
        kept = [(p, p.grad) for p in self.parameters]
        for p, _ in kept:
            p.grad = None
        try:
            with eagerly(), aside(), apart(self.model), Preserving():
                yield
        except Exception as error:
            error.add_note(
                "raised while lensor.optim.KFAC called the closure or the model again: the closure gets the outputs of"
                " the same batch, and parameters receive no gradient"
            )
            raise
        finally:
            for p, gradient in kept:
                p.grad = gradient


class _Forward(nn.Module):
    """Calls a model's forward method without the model's hooks."""

    def __init__(self, model: nn.Module, method: Callable[..., Any]) -> None:
        super().__init__()
        self.model, self.method = model, method

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """Call the method."""
        return self.method(*arguments, **named)


class _Losses(TorchFunctionMode):
    """Collects the losses whose `backward` is called, instead of running their backward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, arguments: Sequence[Any] = (), named: Any = None
    ) -> Any:
        """Handle one call."""
        named = named or {}
        if function is not Tensor.backward:
            return function(*arguments, **named)
        loss, *rest = arguments
        gradient = rest[0] if rest else named.get("gradient")
        self.found.append(loss.reshape(()) if gradient is None else (loss * gradient).sum())
        return None


def _refuse(gradient: Tensor) -> None:
    """Raise for a backward pass that was not collected."""
    if not torch.is_grad_enabled():
        raise ValueError(
            "the closure ran a backward pass by other means than loss.backward(), expected this method of the loss"
        )


def _gradients(value: Tensor, starts: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of a number, which can be differentiated again; zeros where it is constant."""
    if not value.requires_grad:
        return [torch.zeros_like(one) for one in starts]
    return list(torch.autograd.grad(value, starts, create_graph=True, allow_unused=True, materialize_grads=True))


def _as_leaf(value: Any) -> Any:
    """A tensor without the graph that computed it, from which gradients need not be propagated further."""
    if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
        return value.detach().requires_grad_().clone()
    return value


def _is_same(a: Any, b: Any) -> bool:
    """Whether two arguments have the same value; objects other than tensors are not compared."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return isinstance(a, Tensor) == isinstance(b, Tensor)
    return a is b or (a.dtype == b.dtype and a.device == b.device and torch.equal(a, b))
