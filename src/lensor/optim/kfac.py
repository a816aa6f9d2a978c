"""KFAC as an optimizer of torch."""

from __future__ import annotations

import math
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.utils.hooks import RemovableHandle

from lensor.curvature.capture import Capture, Use, computing, unwrapped
from lensor.curvature.data import Arguments, one_tensor, size_of
from lensor.curvature.distribution import shares
from lensor.curvature.factors import Block, Inverse, KroneckerFactors
from lensor.curvature.kfac import APPROXIMATIONS, Collector, output_axis
from lensor.curvature.layers import layers_of
from lensor.curvature.layout import Given
from lensor.curvature.losses import FISHERS, LossRoot, require_loss
from lensor.curvature.watching import Targets, depth, eagerly
from lensor.errors import require_choice

METHODS = ("cholesky", "eigen", "woodbury")
NONFINITE = ("raise", "skip")


class KFAC(torch.optim.Optimizer):
    """Gradient descent with gradients multiplied by the damped inverse of Kronecker factors.

    Factors are collected while the model runs in training mode: no closure, no change to the training loop. A forward
    pass counts if a backward pass through it adds to the `grad` of the layers' weights; what `torch.autograd.grad` does
    meanwhile does not count, nor does a forward pass whose gradients are differentiated (a gradient penalty).
    Parameters without factors (normalisation, embeddings) are updated by the gradient itself. A model that is compiled
    as a whole runs as it was written while factors are collected; with `fullgraph=True` that is an error of the
    compiler's.

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
        batch_axis: where the examples lie in the layers' inputs, as for `lensor.curvature.kfac`; found by a trial pass
            unless given.

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
        batch_axis: Given = None,
    ) -> None:
        require_loss(loss)
        chosen = {"approx": (approx, APPROXIMATIONS), "fisher": (fisher, FISHERS), "method": (method, METHODS)}
        chosen |= {"bias": (bias, ("joint", "separate")), "nonfinite": (nonfinite, NONFINITE)}
        for name, (value, known) in chosen.items():
            require_choice(name, value, known)
        counts = {"factor_interval": factor_interval, "inverse_interval": inverse_interval}
        for name, count in (counts | {"accumulation_steps": accumulation_steps, "mc_samples": mc_samples}).items():
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, found {count!r}")
        if kl_clip is not None and not 0 < kl_clip < math.inf:
            raise ValueError(f"kl_clip must be positive and finite, or None for no bound, found {kl_clip}")
        if not 0 <= ema < 1:
            raise ValueError(f"ema must be in [0, 1), found {ema}")
        if fisher in ("mc", "type-2") and _needs_targets(loss):
            raise ValueError(f"fisher={fisher!r} does not see targets, which this loss needs: take 'empirical'")
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, found {type(model).__name__}")
        self.model = unwrapped(model)
        self.loss, self.approx, self.fisher, self.method = loss, approx, fisher, method
        self.kl_clip, self.ema, self.mc_samples, self.nonfinite = kl_clip, ema, mc_samples, nonfinite
        self.factor_interval, self.inverse_interval = factor_interval, inverse_interval
        self.accumulation_steps, self.grad_scaler, self.group = accumulation_steps, grad_scaler, group
        named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        options = {"lr": lr, "momentum": momentum, "damping": damping, "weight_decay": weight_decay}
        super().__init__(list(named.values()) if params is None else params, options)
        self.batch_axis = batch_axis
        self._joint = bias == "joint"
        self._asked = [layers] if isinstance(layers, str) else None if layers is None else list(layers)
        self._names: dict[str, Tensor] = {}
        self._form: Any = None
        self._watch_new()
        if not self._names:
            raise ValueError("params holds none of the model's parameters that require gradients")
        self.steps = 0
        self.factors: KroneckerFactors | None = None
        self._pending: Collector | None = None
        self._inverted: dict[str, Block] = {}
        self._damped: dict[str, float] = {}
        self._inverse: dict[str, Inverse] = {}
        self._generator: torch.Generator | None = None
        self._seed = seed
        self._warned = False
        self._hook()

    # ------------------------------------------------------------------------------------------------ what is trained
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; layers of the model that train from now on have factors from now on.

        Raises:
            ValueError: for options that make no sense, or a layer that can have no factors.
        """
        group = self.defaults | {key: value for key, value in param_group.items() if key != "params"}
        for name in ("lr", "momentum", "weight_decay"):
            if not 0 <= group[name] < math.inf:
                raise ValueError(f"{name} must be finite and not negative, found {group[name]}")
        if not 0 < group["damping"] < math.inf:
            raise ValueError(f"damping must be positive, found {group['damping']} in a group of parameters")
        super().add_param_group(param_group)
        if hasattr(self, "_names"):
            self._watch_new()

    def _watch_new(self) -> None:
        """Find the layers whose weights this optimizer trains; a bias that it does not train is not in its block."""
        form = tuple((id(p), p.requires_grad) for one in self.param_groups for p in one["params"])
        if form == self._form:
            return
        self._form = form
        held = {found for found, _ in form}
        named: dict[str, Tensor] = {
            name: p for name, p in self.model.named_parameters() if p.requires_grad and id(p) in held
        }
        found = []
        for layer in layers_of(self.model, self._asked):
            if layer.weight in named:
                found.append(layer if layer.bias in named else replace(layer, bias=None))
            elif self._asked is not None:
                raise ValueError(f"layer {layer.name!r} has a weight that this optimizer does not train")
        self._names, self.layers = named, found
        if getattr(self, "factors", None) is not None:  # what is not trained any more has no factors
            self.factors = self._still_trained(self.factors)
            self._inverted = dict(self._still_trained(self._inverted))
            self._inverse = {name: one for name, one in self._inverse.items() if name in self._inverted}
        for handle in getattr(self, "_accumulated", ()):
            handle.remove()
        here: weakref.ref[KFAC] = weakref.ref(self)
        self._left: dict[str, tuple[int, int]] = {}
        self._accumulated = []
        for layer in found:
            weight = named[layer.weight]
            before, after = (_OnGradient(here, layer.weight, tell) for tell in (KFAC._arrive, KFAC._accumulate))
            self._accumulated += [weight.register_hook(before), weight.register_post_accumulate_grad_hook(after)]

    def _still_trained(self, blocks: Any) -> Any:
        kept = {name: block for name, block in blocks.items() if all(one in self._names for one in block.names)}
        return blocks._with(kept) if isinstance(blocks, KroneckerFactors) else kept

    # ------------------------------------------------------------------------------------------------------ collecting
    def _hook(self) -> None:
        """Watch the model's forward pass, and its outputs after all of its hooks."""
        self._thread = threading.local()
        self._backward: dict[int, _Backward] = {}
        here: weakref.ref[KFAC] = weakref.ref(self)
        handle = self.model.register_forward_hook(_After(here), with_kwargs=True)
        watched = _Watched(here, self.model)
        self.model.__dict__["forward"] = watched
        self._handle = handle
        weakref.finalize(self, _unhook, weakref.ref(self.model), watched, handle)
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()  # code compiled before does not know that the model is watched

    def _collects(self) -> bool:
        """Whether a forward pass of the model is one to collect from."""
        return (
            self.model.training
            and torch.is_grad_enabled()
            and self.steps % self.factor_interval == 0
            and not depth()
            and not getattr(self._thread, "inside", False)
            and torch._C._current_graph_task_id() == -1  # a checkpoint runs the model again in the backward pass
        )

    def _forward(self, forward: Callable[..., Any], arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """The model's forward pass, while its layers are watched."""
        if any(layer.module.weight is not self._names[layer.weight] for layer in self.layers):
            return forward(*arguments, **named)  # with other weights, as of torch.func.functional_call
        self._watch_new()
        inputs = Arguments(arguments, named)
        batch, targets = size_of(inputs), Targets(self.layers)
        remember = self.approx == "expand"  # which treats rows alike, whichever example they belong to
        layout = Capture.layout_of(self.model, inputs, targets, batch, self.batch_axis, remember)
        one = _Pass(Collector(self.layers, self.approx, self._joint, self.fisher, keep_graph=True))
        on_output = partial(_wait, weakref.ref(self), one) if self.fisher == "empirical" else None
        capture = Capture(
            targets,
            one.collected.add_input,
            batch,
            layout,
            self.batch_axis,
            on_output,
            ordered=self.approx == "reduce",
            independent=False,
        )
        self._thread.running, self._thread.inside = None, True
        try:
            with eagerly(), capture:
                out = forward(*arguments, **named)
        finally:
            self._thread.inside = False
        self._thread.running = one, capture, layout
        hooks = self.model._forward_hooks
        if self._handle.id in hooks:  # last, so that it sees what hooks of the user's have made of the outputs
            hooks[self._handle.id] = hooks.pop(self._handle.id)
        return out

    def _leave(self) -> None:
        """Forget a pass whose outputs were never seen: of `model.forward`, called directly."""
        if not depth() and not getattr(self._thread, "inside", False):
            self._thread.running = None

    def _after(self, out: Any) -> None:
        """The outputs of the model, after all hooks."""
        running, self._thread.running = getattr(self._thread, "running", None), None
        if running is None:
            return
        one, capture, layout = running
        capture.check(out)
        outputs = one_tensor(out)
        with computing(outputs):
            axis = output_axis(layout, out, outputs, capture.batch)
            root = LossRoot(self.loss, outputs, None, capture.batch, axis)
        one.normaliser = root.normaliser
        one.collected.count(capture.batch, root.normaliser)
        if self.fisher == "empirical":
            capture.require_gradients(capture.uses)
        elif self.fisher != "forward-only":
            if self._generator is None:
                self._generator = torch.Generator(outputs.device).manual_seed(self._seed)
            columns = root.of(self.fisher, self.mc_samples, self._generator)
            one.collected.add_columns(capture, outputs, columns, root)
        if outputs.requires_grad:
            outputs.register_hook(partial(_reach, weakref.ref(self), one))

    def _use(self, one: _Pass) -> None:
        """Gradients through a pass are those of the step: what it collected counts."""
        if one.used_in is None:
            if self._pending is None:
                self._pending = one.collected
            else:
                self._pending.merge(one.collected)
            one.used_in = self._pending

    def _take(self) -> Collector | None:
        """What was collected since the last step, which is forgotten."""
        self._left.clear()
        pending, self._pending = self._pending, None
        return pending

    def _arrive(self, weight: str) -> None:
        """A gradient is about to be added to that of a weight, unless `torch.autograd.grad` is to return it.

        Where the one before was given up since it was added to (deleted, or filled with zeros), what was collected with
        it is given up, too.
        """
        left, gradient = self._left.get(weight), self._names[weight].grad
        if left is None or self._pending is None:
            return
        if gradient is None or (left != (id(gradient), gradient._version) and not bool(gradient.any())):
            self._take()

    def _accumulate(self, weight: str) -> None:
        """A backward pass has added to the gradient of a weight: the passes that it went through count."""
        gradient = self._names[weight].grad
        if gradient is not None:
            self._left[weight] = id(gradient), gradient._version
        found = self._backward.get(torch._C._current_graph_task_id())
        if found is None:
            return
        for one in found.reached:
            self._use(one)
        found.reached.clear()
        for one, use, gradient in found.waiting.pop(weight, ()):
            self._use(one)
            self._add_output(one, use, gradient)

    def _running(self) -> _Backward:
        """What the running backward pass has shown so far; it is forgotten when that ends."""
        task = torch._C._current_graph_task_id()
        found = self._backward.get(task)
        if found is None:
            found = self._backward[task] = _Backward()
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(lambda: self._backward.pop(task, None))
        return found

    def _add_output(self, one: _Pass, use: Use, gradient: Tensor) -> None:
        """The gradient at a layer's output in the user's own backward pass: an example's own times √normaliser."""
        if one.used_in is not self._pending or self._pending is None:
            return  # the step that it was for has been made or given up
        scale = self.grad_scaler.get_scale() if self.grad_scaler is not None else 1.0
        mean = self.loss.reduction == "mean"
        factor = one.normaliser * ((self.accumulation_steps if mean else 1) / scale) ** 2
        with computing(gradient):
            self._pending.add_output(use, gradient, factor * (one.normaliser if mean else 1.0))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients, and the factors that were collected with them; a pass yet to be propagated back stays."""
        self._take()
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
        pending = self._take()
        if all(p.grad is None for p in self._names.values()):
            pending = None  # what was collected belongs to gradients that were given up
        new = None
        if pending is not None and pending.examples and self.steps % self.factor_interval == 0:
            self._require_outputs(pending)
            new = pending.factors(str(self.loss.reduction), self.group)
        trouble = self._nonfinite(new)
        if trouble:
            if self.nonfinite == "raise":
                raise FloatingPointError(trouble)
            return found
        if new is not None:
            old = self.factors
            self.factors = new if old is None or self.ema == 0 else _averaged(old, new, self.ema)
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
        if self.factors is not None and (
            not self._inverse
            or self.steps % self.inverse_interval == 0
            or self.factors.shapes != KroneckerFactors(self._inverted).shapes
        ):
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

    def _require_outputs(self, pending: Collector) -> None:
        """Raise where a weight has a gradient and none was seen at its layer's output: its factor is not zero.

        Raises:
            ValueError: with the weight's name.
        """
        if self.fisher == "forward-only":
            return
        for name, sums in pending.sums.items():
            gradient = self._names[name].grad
            if sums.b is None and gradient is not None and bool(gradient.any()):
                raise ValueError(
                    f"{name!r} has a gradient, but none was seen at the output of its layer, expected backward passes"
                    " through forward passes of the model in training mode only"
                )

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
        found = {}
        for name in block.names:
            found[name] = next(
                group["damping"]
                for group in self.param_groups
                if any(one is self._names[name] for one in group["params"])
            )
        if len(set(found.values())) > 1:
            raise ValueError(
                f"{' and '.join(found)} share a block and have the dampings {sorted(found.values())}, expected one:"
                " give them one damping, or take bias='separate'"
            )
        return found[block.names[0]]

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
            "seed": self._seed,
        }
        return {**super().state_dict(), "kfac": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state: the same steps follow, bit for bit on a CPU with estimated plans.

        Raises:
            KeyError: if it is the state of another optimizer.
            ValueError: if it is the state for another model, or other choices of approx and bias.
        """
        if "kfac" not in state_dict:
            raise KeyError("the state is not one of lensor.optim.KFAC")
        own = state_dict["kfac"]
        read = KroneckerFactors.from_state_dict
        factors = None if own["factors"] is None else read(own["factors"])
        inverted = {} if own["inverted"] is None else dict(read(own["inverted"]))
        for blocks in (factors or {}, inverted):
            self._require_own(blocks)
        factors = None if factors is None else factors._with(self._as_parameters(factors))
        inverted = self._as_parameters(inverted)
        if factors is not None and factors.approx != self.approx:
            raise ValueError(f"the state has factors with approx={factors.approx!r}, expected {self.approx!r}")
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "kfac"})
        ids = [one for group in state_dict["param_groups"] for one in group["params"]]
        parameters = [one for group in self.param_groups for one in group["params"]]
        for one, parameter in zip(ids, parameters, strict=True):  # torch has cast them to the parameters' dtype
            known = state_dict["state"].get(one, {}).get("momentum_buffer")
            if known is not None:
                self.state[parameter]["momentum_buffer"] = known.to(parameter.device, copy=True)
        self.steps, self._pending, self._inverse = own["steps"], None, {}
        self.factors, self._inverted = factors, inverted
        self._damped = dict(own["damped"])
        if self._inverted:
            self._solve_mine()
        self._seed, self._generator = own.get("seed", self._seed), None
        if own["generator"] is not None:
            device = next(iter(self._names.values())).device
            self._generator = torch.Generator(device)
            self._generator.set_state(own["generator"])

    def _as_parameters(self, blocks: Mapping[str, Block]) -> dict[str, Block]:
        """Blocks on the parameters' devices, in their precision, which is at least single."""
        found = {}
        for name, block in blocks.items():
            like = self._names[name]
            dtype = torch.promote_types(like.dtype, torch.float32)
            changed = {w: t.to(like.device, dtype) for w, t in block.tensors().items()}
            found[name] = replace(block, formed=changed.get("A"), root=changed.get("root"), B=changed["B"])
        return found

    def _require_own(self, factors: Mapping[str, Block]) -> None:
        """Raise ValueError unless factors are of this model's parameters, in blocks as this optimizer has them."""
        own = {layer.weight: layer for layer in self.layers}
        for name, block in factors.items():
            for parameter, shape in block.shapes.items():
                known = self._names.get(parameter)
                if known is None or tuple(known.shape) != shape:
                    found = "no such parameter" if known is None else f"shape {tuple(known.shape)}"
                    raise ValueError(
                        f"the state has a factor for {parameter!r} of shape {shape}, this optimizer trains {found}: it"
                        " is the state for another model"
                    )
            layer = own.get(name)
            if layer is not None and layer.bias is not None and (len(block.names) == 2) != self._joint:
                expected = "joint" if self._joint else "separate"
                raise ValueError(f"the state has another form of the block of {name!r}, expected bias={expected!r}")

    # --------------------------------------------------------------------------------------------------------- copying
    def __getstate__(self) -> dict[str, Any]:
        state = {key: value for key, value in self.__dict__.items() if key not in (*_UNCOPIED, *_OF_TORCH)}
        generator = state.pop("_generator")
        state["_generator_state"] = None if generator is None else (generator.device, generator.get_state())
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy or an unpickled optimizer watches the model that was copied with it."""
        if "_generator_state" not in state:  # torch's own part of a state that is loaded
            super().__setstate__(state)
            return
        kept = state.pop("_generator_state")
        super().__setstate__(state)
        self._generator = None
        if kept is not None:
            self._generator = torch.Generator(kept[0])
            self._generator.set_state(kept[1])
        self._pending, self._inverse = None, {}
        names, self._names, self._form = self._names, {}, None
        self._watch_new()
        if self._names.keys() != names.keys():
            raise ValueError("the copied optimizer does not train the parameters of the copied model")
        self._hook()
        if self._inverted:
            self._solve_mine()


_UNCOPIED = ("_thread", "_backward", "_handle", "_accumulated", "_left", "_pending", "_inverse")
"""Attributes that a copy makes for itself."""

_OF_TORCH = ("step", "_opt_called", "_step_count", "_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
_OF_TORCH += ("_optimizer_load_state_dict_pre_hooks", "_optimizer_load_state_dict_post_hooks")
_OF_TORCH += ("_optimizer_state_dict_pre_hooks", "_optimizer_state_dict_post_hooks")
"""What schedulers and hooks leave in an optimizer; copies of torch's own optimizers have none of it."""


def _averaged(old: KroneckerFactors, new: KroneckerFactors, decay: float) -> KroneckerFactors:
    """The average for the blocks that both have; the new ones alone for others, those of layers that begin to train."""
    both = {name: block for name, block in old.items() if name in new and new[name].shapes == block.shapes}
    if len(both) == len(old) == len(new):
        return old.ema_(new, decay)
    kept, more = old._with(both), new._with({name: new[name] for name in both})
    if both:
        kept.ema_(more, decay)
    return new._with({name: kept[name] if name in both else block for name, block in new.items()})


@dataclass(eq=False)
class _Pass:
    """One forward pass: what it collected, what its mean loss is divided by, and for which step it counts."""

    collected: Collector
    normaliser: float = 1.0
    used_in: Collector | None = None
    differentiated: bool = False
    """Whether a backward pass through it is differentiated itself (a gradient penalty): it never counts."""


@dataclass(eq=False)
class _Backward:
    """A backward pass that runs: the forward passes it went through, and gradients at outputs by the weight's name."""

    reached: list[_Pass] = field(default_factory=list)
    waiting: dict[str, list[tuple[_Pass, Use, Tensor]]] = field(default_factory=dict)


def _wait(optimizer: weakref.ref[KFAC], one: _Pass, use: Use, gradient: Tensor) -> None:
    """The gradient at a layer's output; it counts if the same backward pass adds to the gradient of the weight."""
    found = optimizer()
    one.differentiated |= torch.is_grad_enabled()
    if found is not None and not one.differentiated:
        found._running().waiting.setdefault(use.weight, []).append((one, use, gradient))


def _reach(optimizer: weakref.ref[KFAC], one: _Pass, gradient: Tensor) -> None:
    """A backward pass goes through the outputs of a forward pass."""
    found = optimizer()
    one.differentiated |= torch.is_grad_enabled()
    if found is not None and not one.differentiated:
        found._running().reached.append(one)


class _OnGradient:
    """A hook of a weight, before or after a gradient is added to its own, for an optimizer that may be gone."""

    def __init__(self, optimizer: weakref.ref[KFAC], weight: str, tell: Callable[[KFAC, str], None]) -> None:
        self.optimizer, self.weight, self.tell = optimizer, weight, tell

    def __call__(self, value: Tensor) -> None:
        optimizer = self.optimizer()
        if optimizer is not None:
            self.tell(optimizer, self.weight)


class _Watched:
    """Stands for a model's forward method, whose optimizer may be gone; copies and pickles have the method itself."""

    watches = True

    def __init__(self, optimizer: weakref.ref[KFAC], model: nn.Module) -> None:
        self.optimizer, self.model = optimizer, weakref.ref(model)
        self.before = vars(model).get("forward")

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if not torch.compiler.is_dynamo_compiling():
            return self.run(arguments, named)
        model = self.model()
        if model is not None and (not model.training or torch.compiler.is_exporting()):  # no break is needed
            return (self.before or partial(type(model).forward, model))(*arguments, **named)
        return _run_outside(self, arguments, named)

    @property
    def __code__(self) -> Any:
        """That of the method, for what reads its signature."""
        method = self.before if self.before is not None else getattr(type(self.model()), "forward", None)
        return getattr(method, "__code__", None)

    def run(self, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """The forward pass, watched if the optimizer collects."""
        model, optimizer = self.model(), self.optimizer()
        assert model is not None
        forward = self.before if self.before is not None else partial(type(model).forward, model)
        if optimizer is None:
            return forward(*arguments, **named)
        if not optimizer._collects():
            optimizer._leave()
            return forward(*arguments, **named)
        return optimizer._forward(forward, arguments, named)

    def __reduce__(self) -> Any:
        if self.before is not None:
            return _same, (self.before,)
        return getattr, (self.model(), "forward")


def _same(value: Any) -> Any:
    return value


@_disable_dynamo
def _run_outside(watched: _Watched, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """Not compiled: a watched forward pass runs as it was written."""
    return watched.run(arguments, named)


class _After:
    """A hook for the outputs of a model; copies and pickles of the model get one that does nothing."""

    def __init__(self, optimizer: weakref.ref[KFAC] | None) -> None:
        self.optimizer = optimizer

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], out: Any) -> None:
        if not torch.compiler.is_dynamo_compiling():
            self.tell(out)
        elif module.training and not torch.compiler.is_exporting():
            _tell_outside(self, out)

    def tell(self, out: Any) -> None:
        """Give the outputs to the optimizer."""
        optimizer = self.optimizer() if self.optimizer is not None else None
        if optimizer is not None:
            optimizer._after(out)

    def __reduce__(self) -> Any:
        return _After, (None,)


@_disable_dynamo
def _tell_outside(hook: _After, out: Any) -> None:
    hook.tell(out)


def _unhook(model: weakref.ref[nn.Module], watched: _Watched, handle: RemovableHandle) -> None:
    """Leave a model as it was before it was watched, unless something else has been put around since."""
    handle.remove()
    found = model()
    if found is not None and vars(found).get("forward") is watched:
        if watched.before is None:
            del found.__dict__["forward"]
        else:
            found.__dict__["forward"] = watched.before


def _needs_targets(loss: nn.Module) -> bool:
    """Whether the Hessian by the outputs depends on the targets."""
    if isinstance(loss, nn.CrossEntropyLoss):
        return loss.weight is not None or loss.ignore_index >= 0
    return getattr(loss, "pos_weight", None) is not None
