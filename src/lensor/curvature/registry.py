"""Losses with a known Hessian: torch's own, and those that are registered.

Everything that needs the Hessian of a loss takes a `LossRoot`. `root_of` makes it: for one of torch's own losses, from
its formulas; for a registered loss, from the functions that were registered with it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lensor.choices import FactorFisher
from lensor.curvature.batch_axes import BatchAxis
from lensor.curvature.losses import LossRoot
from lensor.curvature.losses import require_loss as require_torchs
from lensor.errors import require_choice

Root = Callable[..., Tensor | Iterable[Tensor]]
Sampler = Callable[..., Tensor]
Normaliser = Callable[..., float | Tensor]


@dataclass(frozen=True)
class RegisteredLoss:
    """What is known about a loss; see `register_loss` for the fields."""

    root: Root | None
    sampler: Sampler | None
    normaliser: Normaliser | None
    reduction: str | None


_registered: dict[Any, RegisteredLoss] = {}
"""The registered losses: a class of losses, or a loss itself."""


def register_loss(
    loss: Any,
    *,
    root: Root | None = None,
    sampler: Sampler | None = None,
    normaliser: Normaliser | None = None,
    reduction: str | None = None,
) -> None:
    """Register the Hessian of a loss of your own, for `kfac`, `ekfac`, `ggn_diagonal` and `ggn_mini_blocks`.

    The loss is a sum over the entries of the first axis of the outputs, divided by a normaliser if its reduction is
    "mean". It receives one output tensor and the targets. The functions describe the sum, before the division. With a
    class of losses, they receive the loss as their first argument, so that they can be its methods. They receive None
    as the targets where these are unknown, as in `lensor.optim.KFAC`. To check a root, use `check_loss`.

    Args:
        loss: a class of losses (without its subclasses), or a single loss: a function or module.
        root: a function of (outputs, targets): a tensor [v, *outputs.shape] or an iterable of tensors s_v of the shape
            of the outputs. For each entry n of the first axis, Σ_v s_v[n] s_v[n]ᵀ is the Hessian of its loss with
            respect to its outputs. Needed for fisher="type-2".
        sampler: a function of (outputs, targets, generator): a random tensor s of the shape of the outputs, such that
            the expectation of s[n] s[n]ᵀ is this Hessian: the gradient of the loss for targets sampled from the
            model's own distribution. Needed for fisher="mc".
        normaliser: a function of (outputs, targets): the divisor of the mean; the size of the first axis unless given.
        reduction: "mean" or "sum"; the attribute `reduction` of the loss unless given.

    Example:
        >>> import torch
        >>> from lensor.curvature import ggn_diagonal, register_loss
        >>> def poisson(outputs, targets):
        ...     return (outputs.exp() - targets * outputs).sum()
        >>> def root(outputs, targets):
        ...     for place in range(outputs.shape[1]):
        ...         column = torch.zeros_like(outputs)
        ...         column[:, place] = (outputs[:, place] / 2).exp()
        ...         yield column
        >>> register_loss(poisson, root=root, reduction="sum")
        >>> model = torch.nn.Linear(3, 2)
        >>> ggn_diagonal(model, poisson, (torch.randn(4, 3), torch.ones(4, 2)))["weight"].shape
        torch.Size([2, 3])

    Raises:
        TypeError: if the loss is not callable or not hashable, or if a function is not callable.
        ValueError: for an unknown reduction, or if it is unknown for a single loss.
    """
    if not callable(loss):
        raise TypeError(f"loss has type {type(loss).__name__}, expected a class of losses, a function or a module")
    for name, one in (("root", root), ("sampler", sampler), ("normaliser", normaliser)):
        if one is not None and not callable(one):
            raise TypeError(f"{name} has type {type(one).__name__}, expected a function")
    if reduction is not None or not isinstance(loss, type):
        given = getattr(loss, "reduction", None) if reduction is None else reduction
        require_choice("reduction", str(given), ("mean", "sum"))
    try:
        _registered[loss] = RegisteredLoss(root, sampler, normaliser, reduction)
    except TypeError as error:
        raise TypeError(f"loss has type {type(loss).__name__}, which cannot be registered: {error}") from error


def registered(loss: Any) -> RegisteredLoss | None:
    """What was registered for a loss or its class, with functions of the outputs; None if nothing was registered."""
    try:
        found = _registered.get(loss)
    except TypeError:  # not hashable
        found = None
    if found is not None or type(loss) not in _registered or "forward" in vars(loss):
        return found
    found = _registered[type(loss)]
    bound = {
        name: partial(one, loss)
        for name in ("root", "sampler", "normaliser")
        if (one := getattr(found, name)) is not None
    }
    return replace(found, **bound)


def require_loss(loss: Any, fisher: FactorFisher | None = None) -> None:
    """Raise for a loss whose Hessian is unknown.

    Args:
        loss: the loss.
        fisher: which root of the Hessian is needed; the check is left out unless given.

    Raises:
        TypeError: for an unsupported loss.
        ValueError: for an unsupported reduction, or a registered loss without the function that is needed.
    """
    known = registered(loss)
    if known is None:
        require_torchs(loss)
        return
    reduction = reduction_of(loss)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"loss has reduction={reduction!r}, expected 'mean' or 'sum'")
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if isinstance(loss, nn.Module) and any(getattr(loss, name) for name in hooks):
        raise TypeError(
            f"loss is a {type(loss).__name__} with hooks, expected one without: hooks may change the Hessian"
        )
    needed = {"type-2": ("root", known.root), "mc": ("sampler", known.sampler)}.get(fisher or "")
    if needed is not None and needed[1] is None:
        raise ValueError(
            f"the loss {_name(loss)} was registered without {needed[0]}=, expected one for fisher={fisher!r}"
        )


def reduction_of(loss: Any) -> Any:
    """The reduction of a loss; None if it is unknown."""
    known = registered(loss)
    return known.reduction if known is not None and known.reduction else getattr(loss, "reduction", None)


def root_of(loss: Any, outputs: Tensor, targets: Any, examples: int, axis: BatchAxis | None = None) -> LossRoot:
    """The square root of the Hessian of a loss; see `LossRoot` for the arguments."""
    known = registered(loss)
    if known is None:
        return LossRoot(loss, outputs, targets, examples, axis)
    return RegisteredRoot(known, loss, outputs, targets, examples, axis)


class RegisteredRoot(LossRoot):
    """A square root of the Hessian of a registered loss; the other arguments are those of `LossRoot`."""

    def __init__(
        self,
        known: RegisteredLoss,
        loss: Any,
        outputs: Tensor,
        targets: Any,
        examples: int,
        axis: BatchAxis | None = None,
    ) -> None:
        self.known, self.loss, self.targets, self.total = known, loss, targets, None
        self._divide(outputs, examples, axis)
        self.normaliser = self._normaliser() if reduction_of(loss) == "mean" else 1.0

    def _normaliser(self) -> float:
        if self.known.normaliser is None:
            return float(len(self.f))
        found = float(self.known.normaliser(self.f, self.targets))
        if not 0 <= found < float("inf"):
            raise ValueError(f"the normaliser of {_name(self.loss)} is {found}, expected a finite number of at least 0")
        return found

    def columns(self) -> Iterator[Tensor]:
        """The columns of the registered root."""
        assert self.known.root is not None
        for column in self.known.root(self.f, self.targets):
            yield from self._by_rows(self._scaled(column, "root", self._scale))

    def samples(self, count: int, generator: torch.Generator | None) -> Iterator[Tensor]:
        """Columns of the registered sampler: a root in expectation."""
        assert self.known.sampler is not None
        for _ in range(count):
            column = self.known.sampler(self.f, self.targets, generator)
            yield self._scaled(column, "sampler", self._scale * count**-0.5)

    def gradient(self) -> Iterator[Tensor]:
        """The gradients of the examples' losses, in one column."""
        if not self.normaliser:
            yield torch.zeros_like(self.outputs)
            return
        loss = copy.deepcopy(self.loss).to(self.f.dtype) if isinstance(self.loss, nn.Module) else self.loss
        with torch.enable_grad():
            f = self.f.detach().requires_grad_()
            (found,) = torch.autograd.grad(loss(f, self.targets), f)
        yield (found * self.normaliser**0.5).to(self.outputs.dtype)

    def _scaled(self, column: Any, name: str, scale: Any) -> Tensor:
        """A column times a scale, after checks."""
        if not isinstance(column, Tensor) or column.shape != self.f.shape:
            found = f"shape {tuple(column.shape)}" if isinstance(column, Tensor) else f"type {type(column).__name__}"
            more = "[v, *shape] or columns of shape" if name == "root" else "shape"
            raise ValueError(
                f"the {name} of {_name(self.loss)} has a column of {found}, expected {more} {tuple(self.f.shape)}, that"
                " of the outputs"
            )
        return (column.detach() * scale).to(self.outputs.dtype)


def check_loss(
    loss: Any, outputs: Tensor, targets: Any, *, samples: int = 0, rtol: float = 1e-4, atol: float = 1e-6
) -> None:
    """Check the registered root of a loss against its Hessian by autograd.

    Args:
        loss: the loss.
        outputs: outputs of a model, for a few examples, preferably in double precision.
        targets: the targets.
        samples: the number of draws with which to check the sampler: their mean must be within five standard errors.
            The sampler is not checked unless given.
        rtol: the relative tolerance.
        atol: the absolute tolerance.

    Example:
        >>> import torch
        >>> from lensor.curvature import check_loss
        >>> check_loss(torch.nn.CrossEntropyLoss(), torch.randn(4, 3), torch.tensor([0, 2, 1, 0]))

    Raises:
        TypeError: for an unsupported loss.
        ValueError: if the loss mixes entries of the first axis, or the root or the sampler disagree with the Hessian.
    """
    require_loss(loss, "type-2")
    outputs = outputs.detach()
    batch, entries = len(outputs), outputs.shape[1:].numel()
    every = torch.autograd.functional.hessian(lambda f: loss(f, targets), outputs)
    curved = every.reshape(batch, entries, batch, entries)  # pyright: ignore[reportAttributeAccessIssue]
    hessian = curved[range(batch), :, range(batch)]
    apart = curved.clone()
    apart[range(batch), :, range(batch)] = 0
    tolerance = atol + rtol * float(hessian.abs().max()) if hessian.numel() else atol
    if hessian.numel() and float(apart.abs().max()) > tolerance:
        raise ValueError(f"the loss {_name(loss)} mixes entries of the first axis, expected a sum or mean over them")
    root = root_of(loss, outputs, targets, batch)
    found = torch.zeros_like(hessian)
    for column in root.columns():
        rows = column.reshape(batch, entries)
        found += rows[:, :, None] * rows[:, None]
    _require_close("root", loss, (found - hessian).abs(), torch.full_like(hessian, tolerance))
    if not samples:
        return
    require_loss(loss, "mc")
    products = []
    for column in root.samples(samples, None):
        rows = column.reshape(batch, entries) * samples**0.5
        products.append(rows[:, :, None] * rows[:, None])
    drawn = torch.stack(products)
    error = drawn.std(0) / samples**0.5
    _require_close("sampler", loss, (drawn.mean(0) - hessian).abs(), 5 * error + tolerance)


def _require_close(name: str, loss: Any, difference: Tensor, allowed: Tensor) -> None:
    if bool((difference > allowed).any()) or bool(difference.isnan().any()):
        example = int((difference - allowed).flatten(1).max(1).values.argmax())
        raise ValueError(
            f"the {name} of {_name(loss)} differs from the Hessian by {float(difference[example].max()):.3g} in entry"
            f" {example} of the first axis, expected at most {float(allowed[example].max()):.3g}"
        )


def _name(loss: Any) -> str:
    return getattr(loss, "__name__", type(loss).__name__)
