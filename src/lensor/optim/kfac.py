"""KFAC as an optimizer of torch."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lensor.curvature.capture import Capture, Layer, layers_of, size_of
from lensor.curvature.distribution import shares
from lensor.curvature.factors import Block, Inverse, KroneckerFactors
from lensor.curvature.kfac import APPROXIMATIONS, Collector
from lensor.curvature.losses import FISHERS, LossRoot, require_loss
from lensor.errors import require_choice

METHODS = ("cholesky", "eigen", "woodbury")
NONFINITE = ("raise", "skip")


class KFAC(torch.optim.Optimizer):
    """Gradient descent with gradients multiplied by the damped inverse of Kronecker factors.

    Factors are collected while the model runs in training mode: no closure, no change to the training loop. A forward
    pass counts if its gradients are those of the step. Parameters without factors (normalisation, embeddings) are
    updated by the gradient itself.

    Args:
        model: the model, or a DistributedDataParallel one.
        loss: the loss that is minimised: `CrossEntropyLoss`, `MSELoss` or `BCEWithLogitsLoss`, mean or sum. Its targets
            are not seen here: with class weights or ignored targets, which only "empirical" and "forward-only" allow, B
            is scaled as if every target counted one.
        lr: learning rate.
        momentum: of the steps.
        damping: is added to the curvature.
        weight_decay: parameters shrink by `lr · weight_decay` in a step, whatever the curvature.
        kl_clip: the longest step in the curvature's norm, as a bound on lr²·Σ step·gradient; longer ones are shortened
            to it. None for no bound.
        approx: "expand" or "reduce".
        fisher: "empirical" uses the backward pass that there is; "mc" and "type-2" make passes of their own during the
            forward pass; "forward-only" needs none: B is the identity.
        bias: "joint" or "separate".
        method: how factors are inverted: "cholesky", "eigen", or "woodbury" (where roots are kept; else "cholesky").
        ema: how much of the old factors is kept at an update; 0 takes the new ones alone.
        factor_interval: steps between updates of factors.
        inverse_interval: steps between inversions.
        accumulation_steps: backward passes before a step, each with the mean loss divided by this number (a sum stays
            as it is).
        layers: names of modules with factors; all known unless given. A bias that is not trained is left out of its
            block.
        params: parameter groups with options of their own (lr, momentum, damping, weight_decay); one unless given.
        mc_samples: draws for each example, for "mc".
        seed: of the draws.
        nonfinite: what to do where a gradient or factor holds NaN or infinity: "raise" a FloatingPointError, or "skip"
            the step; in both cases parameters and state stay as they are.
        grad_scaler: the GradScaler in use: gradients at the layers' outputs are divided by its scale.
        group: ranks of torch.distributed that train together: factors are summed over them, inversions shared out.

    Example:
        >>> import torch
        >>> from lensor.optim import KFAC
        >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
        <torch._C.Generator ...>
        >>> model, loss = torch.nn.Linear(5, 3), torch.nn.CrossEntropyLoss()
        >>> optimizer = KFAC(model, loss, lr=0.5, damping=0.01, kl_clip=None)
        >>> x = torch.randn(64, 5)
        >>> y = x[:, :3].argmax(1)
        >>> for _ in range(10):
        ...     optimizer.zero_grad()
        ...     value = loss(model(x), y)
        ...     value.backward()
        ...     optimizer.step()
        >>> value.item() < 0.2
        True

    Raises:
        TypeError, ValueError: for a model, loss, choice or number that makes no sense.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        lr: float = 0.1,
        momentum: float = 0.9,
        damping: float = 1e-2,
        weight_decay: float = 0.0,
        *,
        kl_clip: float | None = 1e-3,
        approx: str = "expand",
        fisher: str = "empirical",
        bias: str = "joint",
        method: str = "cholesky",
        ema: float = 0.95,
        factor_interval: int = 1,
        inverse_interval: int = 1,
        accumulation_steps: int = 1,
        layers: Iterable[str] | None = None,
        params: Any = None,
        mc_samples: int = 1,
        seed: int = 0,
        nonfinite: str = "raise",
        grad_scaler: Any = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        require_loss(loss)
        chosen = {"approx": (approx, APPROXIMATIONS), "fisher": (fisher, FISHERS), "method": (method, METHODS)}
        chosen |= {"bias": (bias, ("joint", "separate")), "nonfinite": (nonfinite, NONFINITE)}
        for name, (value, known) in chosen.items():
            require_choice(name, value, known)
        counts = {"factor_interval": factor_interval, "inverse_interval": inverse_interval}
        for name, count in (counts | {"accumulation_steps": accumulation_steps, "mc_samples": mc_samples}).items():
            if count < 1:
                raise ValueError(f"{name} must be at least 1, found {count}")
        for name, value in {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}.items():
            if not value >= 0:
                raise ValueError(f"{name} must not be negative, found {value}")
        if not damping > 0:
            raise ValueError(f"damping must be positive, found {damping}")
        if not 0 <= ema < 1:
            raise ValueError(f"ema must be in [0, 1), found {ema}")
        if fisher in ("mc", "type-2") and _needs_targets(loss):
            raise ValueError(f"fisher={fisher!r} does not see targets, which this loss needs: take 'empirical'")
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, found {type(model).__name__}")
        self.model = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        self.loss, self.approx, self.fisher, self.method = loss, approx, fisher, method
        self.kl_clip, self.ema, self.mc_samples, self.nonfinite = kl_clip, ema, mc_samples, nonfinite
        self.factor_interval, self.inverse_interval = factor_interval, inverse_interval
        self.accumulation_steps, self.grad_scaler, self.group = accumulation_steps, grad_scaler, group
        named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        options = {"lr": lr, "momentum": momentum, "damping": damping, "weight_decay": weight_decay}
        super().__init__(list(named.values()) if params is None else params, options)
        held = {id(p) for one in self.param_groups for p in one["params"]}
        self._names = {name: p for name, p in named.items() if id(p) in held}
        if not self._names:
            raise ValueError("params holds none of the model's parameters that require gradients")
        for one in self.param_groups:
            if not one["damping"] > 0:
                raise ValueError(f"damping must be positive, found {one['damping']} in a group of parameters")
        self.layers = self._trained(layers)
        self._joint = bias == "joint"
        self.steps = 0
        self.factors: KroneckerFactors | None = None
        self._pending: Collector | None = None
        self._inverted: dict[str, Block] = {}
        self._damped: dict[str, float] = {}
        self._inverse: dict[str, Inverse] = {}
        self._generator: torch.Generator | None = None
        self._seed = seed
        self._running: tuple[_Pass, Capture] | None = None
        self._warned = False
        handles = self._hook()
        weakref.finalize(self, _remove, handles)

    def _trained(self, layers: Iterable[str] | None) -> list[Layer]:
        """The layers whose weights this optimizer trains; a bias that it does not train is none of the block's."""
        asked = [layers] if isinstance(layers, str) else None if layers is None else list(layers)
        found = []
        for layer in layers_of(self.model, asked):
            if layer.weight in self._names:
                found.append(layer if layer.bias in self._names else replace(layer, bias=None))
            elif asked is not None:
                raise ValueError(f"layer {layer.name!r} has a weight that this optimizer does not train")
        return found

    # ------------------------------------------------------------------------------------------------------ collecting
    def _hook(self) -> list[RemovableHandle]:
        """Hooks on model and layers for its whole life, in an order that lets the model be a layer itself."""
        here: weakref.ref[KFAC] = weakref.ref(self)
        handles = [self.model.register_forward_pre_hook(_Hook(here, "_before"), with_kwargs=True)]
        for layer in self.layers:
            before, after = _Hook(here, "_before_layer", layer), _Hook(here, "_after_layer", layer)
            handles.append(layer.module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(layer.module.register_forward_hook(after))
        handles.append(self.model.register_forward_hook(_Hook(here, "_after"), always_call=True))
        return handles

    def _before(self, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._running = None
        if not (self.model.training and torch.is_grad_enabled() and self.steps % self.factor_interval == 0):
            return
        if all(p.grad is None for p in self._names.values()):
            self._pending = None  # what was collected belongs to gradients that were given up
        one = _Pass(Collector(self.layers, self.approx, self._joint, self.fisher, keep_graph=True))
        on_output = partial(self._add_output, one) if self.fisher == "empirical" else None
        batch = size_of(arguments if arguments else named)
        self._running = one, Capture(self.layers, one.collected.add_input, batch, on_output)

    def _before_layer(self, layer: Layer, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        if self._running is not None:
            self._running[1].before(layer, arguments, named)

    def _after_layer(self, layer: Layer, arguments: tuple[Any, ...], out: Tensor) -> Tensor:
        return out if self._running is None else self._running[1].after(layer, out)

    def _after(self, arguments: tuple[Any, ...], out: Any) -> None:
        running, self._running = self._running, None
        if running is None or out is None:  # None where the forward pass has raised
            return
        one, capture = running
        capture.check()
        outputs = out if isinstance(out, Tensor) else getattr(out, "logits", None)
        if outputs is None:
            raise TypeError(f"the model returns a {type(out).__name__}, expected a tensor, or something with logits")
        root = LossRoot(self.loss, outputs, None, capture.batch)
        one.normaliser = root.normaliser
        one.collected.count(capture.batch, root.normaliser)
        if self.fisher == "empirical":
            capture.require_gradients(self.layers)
        elif self.fisher != "forward-only":
            if self._generator is None:
                self._generator = torch.Generator(outputs.device).manual_seed(self._seed)
            columns = root.of(self.fisher, self.mc_samples, self._generator)
            one.collected.add_columns(capture, outputs, columns, root)
        if outputs.requires_grad:
            outputs.register_hook(partial(self._use, one))

    def _use(self, one: _Pass, gradient: Tensor) -> None:
        """Somebody propagates back through a pass: what it collected counts for the next step."""
        if one.used_in is None:
            if self._pending is None:
                self._pending = one.collected
            else:
                self._pending.merge(one.collected)
            one.used_in = self._pending

    def _add_output(self, one: _Pass, layer: Layer, gradient: Tensor) -> None:
        """The gradient at a layer's output in the user's own backward pass: an example's own times √normaliser."""
        self._use(one, gradient)
        if one.used_in is not self._pending or self._pending is None:
            return  # the step that it was for has been made or given up
        scale = self.grad_scaler.get_scale() if self.grad_scaler is not None else 1.0
        mean = self.loss.reduction == "mean"
        factor = one.normaliser * ((self.accumulation_steps if mean else 1) / scale) ** 2
        self._pending.add_output(layer, gradient, factor * (one.normaliser if mean else 1.0))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients, and the factors that were collected with them; a pass yet to be propagated back stays."""
        self._pending = None
        super().zero_grad(set_to_none)

    # -------------------------------------------------------------------------------------------------------- stepping
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step.

        Args:
            closure: computes the loss and its gradients, if they are not there yet.

        Returns:
            What the closure returned, or None.

        Raises:
            FloatingPointError: if a gradient or factor is not finite and nonfinite="raise"; it names the parameter.
            torch.linalg.LinAlgError: if a damped factor is not positive definite: the damping is too small.
        """
        found = None
        if closure is not None:
            with torch.enable_grad():
                found = closure()
        pending, self._pending = self._pending, None
        new = None
        if pending is not None and pending.examples and self.steps % self.factor_interval == 0:
            new = pending.factors(str(self.loss.reduction), self.group)
        trouble = self._nonfinite(new)
        if trouble:
            if self.nonfinite == "raise":
                raise FloatingPointError(trouble)
            return found
        if new is not None:
            old = self.factors
            self.factors = new if old is None or self.ema == 0 else old.ema_(new, self.ema)
        if (
            self.factors is None
            and not self._warned
            and any(self._names[one.weight].grad is not None for one in self.layers)
        ):
            self._warned = True
            warnings.warn(
                "no factors were collected, steps are the gradient's: train() and forward() of the model given",
                stacklevel=3,
            )
        if self.factors is not None and (not self._inverse or self.steps % self.inverse_interval == 0):
            self._invert()
        directions = self._directions()
        clip = self._clip(directions)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                direction = directions.get(id(parameter))
                if direction is None:
                    direction = parameter.grad
                if clip is not None:
                    direction = direction * clip
                if group["momentum"]:
                    state = self.state[parameter]
                    known = state.get("momentum_buffer")
                    if known is None:
                        state["momentum_buffer"] = direction.clone()
                    else:
                        known.mul_(group["momentum"]).add_(direction)
                    direction = state["momentum_buffer"]
                if group["weight_decay"]:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(direction.to(parameter.dtype), alpha=-group["lr"])
        self.steps += 1
        return found

    def _nonfinite(self, new: KroneckerFactors | None) -> str:
        """The first gradient or factor that is not finite; the same answer on every rank."""
        flags = [(name, p.grad) for name, p in self._names.items() if p.grad is not None]
        if new is not None:
            flags += [(f"{name} (factor {w})", t) for name, block in new.items() for w, t in block.tensors().items()]
        if not flags:
            return ""
        # A sum of absolute values is finite if all are; one number of the device for all of them.
        good = torch.stack([torch.linalg.vector_norm(tensor, 1).isfinite() for _, tensor in flags])
        if self.group is not None:
            kept = good.to(torch.int32)
            dist.all_reduce(kept, dist.ReduceOp.MIN, group=self.group)
            good = kept.bool()
        if bool(good.all()):
            return ""
        name = next(name for (name, _), fine in zip(flags, good.tolist(), strict=True) if not fine)
        return f"the gradient or factor of {name} is not finite: no step was made"

    def _damping(self, block: Block) -> float:
        parameter = self._names[block.names[0]]
        for group in self.param_groups:
            if any(one is parameter for one in group["params"]):
                return group["damping"]
        raise AssertionError("unreachable")

    def _mine(self) -> dict[str, int]:
        """The rank that inverts each block: shared out by cost."""
        assert self.factors is not None
        blocks = self.factors
        ranks = 1 if self.group is None else dist.get_world_size(self.group)
        costs = [float(one.groups * (one.d**3 + one.B.shape[1] ** 3)) for one in blocks.values()]
        return dict(zip(blocks, shares(costs, ranks), strict=True))

    def _invert(self) -> None:
        assert self.factors is not None
        self._inverted = dict(self.factors)
        self._damped = {name: self._damping(block) for name, block in self._inverted.items()}
        self._solve_mine()

    def _solve_mine(self) -> None:
        """The inverses of this rank's share of the blocks."""
        me = 0 if self.group is None else dist.get_rank(self.group)
        mine = [name for name, rank in self._mine().items() if rank == me]
        self._inverse = {name: self._inverse_of(name) for name in mine}

    def _inverse_of(self, name: str) -> Inverse:
        block = self._inverted[name]
        method = "cholesky" if self.method == "woodbury" and block.root is None else self.method
        return Inverse({name: block}, self._damped[name], method)

    def _directions(self) -> dict[int, Tensor]:
        """Gradients times the inverse, for parameters with factors."""
        if self.factors is None:
            return {}
        found: dict[int, Tensor] = {}
        owners = self._mine()
        for name, block in self._inverted.items():
            parameters = [self._names[one] for one in block.names]
            if any(p.grad is None for p in parameters):
                continue
            gradients = {one: p.grad for one, p in zip(block.names, parameters, strict=True)}
            wide = {one: g.to(block.B.dtype) for one, g in gradients.items() if g is not None}
            if name in self._inverse:
                solved = self._inverse[name] @ wide
            else:
                solved = {one: torch.empty_like(g) for one, g in wide.items()}
            if self.group is not None:
                source = dist.get_global_rank(self.group, owners[name])
                for one in block.names:
                    solved[one] = solved[one].contiguous()
                    dist.broadcast(solved[one], source, group=self.group)
            for one, parameter in zip(block.names, parameters, strict=True):
                found[id(parameter)] = solved[one]
        return found

    def _clip(self, directions: Mapping[int, Tensor]) -> Tensor | None:
        """What the steps are multiplied by, so that lr²·Σ step·gradient stays below the bound."""
        if self.kl_clip is None:
            return None
        parts = [
            group["lr"] ** 2 * (directions.get(id(p), p.grad) * p.grad).sum()
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        if not parts:
            return None
        length = torch.stack(parts).sum().clamp_min(torch.finfo(parts[0].dtype).tiny)
        return (self.kl_clip / length).sqrt().clamp_max(1.0)

    # ----------------------------------------------------------------------------------------------------------- state
    def state_dict(self) -> dict[str, Any]:
        """The state of the optimizer: momentum, groups, factors, those that were inverted, and the generator."""
        inverted = KroneckerFactors(self._inverted).state_dict() if self._inverted else None
        own = {
            "steps": self.steps,
            "factors": None if self.factors is None else self.factors.state_dict(),
            "inverted": inverted,
            "damped": dict(self._damped),
            "generator": None if self._generator is None else self._generator.get_state(),
        }
        return {**super().state_dict(), "kfac": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state: the same steps follow, bit for bit on a CPU with estimated plans.

        Raises:
            KeyError: if it is the state of another optimizer.
        """
        if "kfac" not in state_dict:
            raise KeyError("this is no state of lensor.optim.KFAC")
        own = state_dict["kfac"]
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "kfac"})
        ids = [one for group in state_dict["param_groups"] for one in group["params"]]
        parameters = [one for group in self.param_groups for one in group["params"]]
        for one, parameter in zip(ids, parameters, strict=True):  # torch has cast them to the parameters' dtype
            known = state_dict["state"].get(one, {}).get("momentum_buffer")
            if known is not None:
                self.state[parameter]["momentum_buffer"] = known.to(parameter.device, copy=True)
        self.steps, self._pending, self._inverse = own["steps"], None, {}
        read = KroneckerFactors.from_state_dict
        self.factors = None if own["factors"] is None else read(own["factors"])
        self._inverted = {} if own["inverted"] is None else dict(read(own["inverted"]))
        self._damped = dict(own["damped"])
        if self._inverted:
            self._solve_mine()
        if own["generator"] is not None:
            device = next(iter(self._names.values())).device
            self._generator = torch.Generator(device)
            self._generator.set_state(own["generator"])


@dataclass
class _Pass:
    """One forward pass: what it collected, what its mean loss is divided by, and for which step it counts."""

    collected: Collector
    normaliser: float = 1.0
    used_in: Collector | None = None


class _Hook:
    """A hook for an optimizer that may be gone. Copies and pickles of a model get one that does nothing."""

    def __init__(self, optimizer: weakref.ref[KFAC], method: str, *given: Any) -> None:
        self.optimizer, self.method, self.given = optimizer, method, given

    def __call__(self, module: nn.Module, *arguments: Any) -> Any:
        optimizer = self.optimizer()
        return None if optimizer is None else getattr(optimizer, self.method)(*self.given, *arguments)

    def __reduce__(self) -> Any:
        return _idle, ()


def _idle() -> Callable[..., None]:
    return _nothing


def _nothing(*arguments: Any) -> None:
    pass


def _remove(handles: Iterable[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


def _needs_targets(loss: nn.Module) -> bool:
    """Whether the Hessian by the outputs depends on the targets."""
    if isinstance(loss, nn.CrossEntropyLoss):
        return loss.weight is not None or loss.ignore_index >= 0
    return getattr(loss, "pos_weight", None) is not None
