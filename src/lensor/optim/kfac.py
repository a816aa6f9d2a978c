"""KFAC as an optimizer of torch."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lensor.choices import Approx, Bias, FactorFisher, Method, Nonfinite, words
from lensor.curvature.block import Block
from lensor.curvature.capture import unwrapped
from lensor.curvature.collector import Collector
from lensor.curvature.factors import KroneckerFactors
from lensor.curvature.layers import Layer, layers_of
from lensor.curvature.layout import Given
from lensor.curvature.losses import require_loss
from lensor.errors import require_choice
from lensor.optim.checkpoint import as_parameters, require_same_form
from lensor.optim.inversion import Inversion
from lensor.optim.tracking import Tracker, generator_from


def _of(part: str, name: str, doc: str) -> Any:
    """A property that is an attribute of a part of the optimizer."""

    def read(self: KFAC) -> Any:
        return getattr(getattr(self, part), name)

    def write(self: KFAC, value: Any) -> None:
        setattr(getattr(self, part), name, value)

    return property(read, write, doc=doc)


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

    steps: int = _of("tracker", "steps", "The steps that were made.")
    loss: nn.Module = _of("tracker", "loss", "The loss that is minimised.")
    approx: Approx = _of("tracker", "approx", "The treatment of positions.")
    fisher: FactorFisher = _of("tracker", "fisher", "The Fisher matrix.")
    mc_samples: int = _of("tracker", "mc_samples", "Draws for each example.")
    factor_interval: int = _of("tracker", "factor_interval", "Steps between updates of factors.")
    accumulation_steps: int = _of("tracker", "accumulation_steps", "Backward passes before a step.")
    grad_scaler: Any = _of("tracker", "grad_scaler", "The GradScaler in use.")
    batch_axis: Given = _of("tracker", "batch_axis", "The axis of the examples, if it was given.")
    layers: list[Layer] = _of("tracker", "layers", "The layers with factors.")
    method: Method = _of("inversion", "method", "How factors are inverted.")
    group: dist.ProcessGroup | None = _of("inversion", "group", "The processes that train together.")

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
        approx: Approx = "expand",
        fisher: FactorFisher = "empirical",
        bias: Bias = "joint",
        method: Method = "cholesky",
        ema: float = 0.95,
        factor_interval: int = 1,
        inverse_interval: int = 1,
        accumulation_steps: int = 1,
        layers: Iterable[str] | None = None,
        params: Any = None,
        mc_samples: int = 1,
        seed: int = 0,
        nonfinite: Nonfinite = "raise",
        grad_scaler: Any = None,
        group: dist.ProcessGroup | None = None,
        batch_axis: Given = None,
    ) -> None:
        require_loss(loss)
        chosen = {"approx": (approx, Approx), "fisher": (fisher, FactorFisher), "method": (method, Method)}
        chosen |= {"bias": (bias, Bias), "nonfinite": (nonfinite, Nonfinite)}
        for name, (value, known) in chosen.items():
            require_choice(name, value, words(known))
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
        self.kl_clip, self.ema, self.nonfinite, self.inverse_interval = kl_clip, ema, nonfinite, inverse_interval
        self.factors: KroneckerFactors | None = None
        self.inversion = Inversion(method, group)
        self.tracker = Tracker(
            self.model,
            loss,
            approx,
            fisher,
            bias == "joint",
            factor_interval,
            accumulation_steps,
            mc_samples,
            seed,
            grad_scaler,
            batch_axis,
        )
        self._asked = [layers] if isinstance(layers, str) else None if layers is None else list(layers)
        self._form: Any = None
        self._warned = False
        trained = [p for p in self.model.parameters() if p.requires_grad]
        options = {"lr": lr, "momentum": momentum, "damping": damping, "weight_decay": weight_decay}
        super().__init__(trained if params is None else params, options)
        self._watch_new()
        if not self.tracker.names:
            raise ValueError("params holds none of the model's parameters that require gradients")
        self._attach()

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
        if self.tracker.names:  # not from the constructor
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
        self.tracker.watch(found, named)
        if self.factors is not None:  # what is not trained any more has no factors
            self.factors = self.factors._with(self._still_trained(self.factors))
            self.inversion.keep(self._still_trained(self.inversion.blocks))

    def _still_trained(self, blocks: Mapping[str, Block]) -> dict[str, Block]:
        names = self.tracker.names
        return {name: block for name, block in blocks.items() if all(one in names for one in block.names)}

    def _attach(self) -> None:
        here = weakref.ref(self)

        def refresh() -> None:
            optimizer = here()
            if optimizer is not None:
                optimizer._watch_new()

        self.tracker.refresh = refresh
        self.tracker.attach()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients, and the factors that were collected with them; a pass yet to be propagated back stays."""
        self.tracker.take()
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
        pending, names = self.tracker.take(), self.tracker.names
        if all(p.grad is None for p in self.tracker.names.values()):
            pending = None  # what was collected belongs to gradients that were given up
        new = None
        if pending is not None and pending.examples and self.tracker.is_due:
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
            and any(self.tracker.names[one.weight].grad is not None for one in self.layers)
        ):
            self._warned = True
            warnings.warn(
                "no factors were collected, steps are the gradient's: train() and forward() of the model given",
                stacklevel=3,
            )
        directions: dict[int, Tensor] = {}
        if self.factors is not None:
            if (
                not self.inversion.solvers
                or self.steps % self.inverse_interval == 0
                or self.factors.shapes != KroneckerFactors(self.inversion.blocks).shapes
            ):
                self.inversion.invert(self.factors, {name: self._damping(one) for name, one in self.factors.items()})
            solved = self.inversion.directions({name: p.grad for name, p in names.items()})
            directions = {id(names[name]): direction for name, direction in solved.items()}
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
            gradient = self.tracker.names[name].grad
            if sums.b is None and gradient is not None and bool(gradient.any()):
                raise ValueError(
                    f"{name!r} has a gradient, but none was seen at the output of its layer, expected backward passes"
                    " through forward passes of the model in training mode only"
                )

    def _nonfinite(self, new: KroneckerFactors | None) -> str:
        """The first gradient or factor that is not finite; the same answer on every rank."""
        flags = [(name, p.grad) for name, p in self.tracker.names.items() if p.grad is not None]
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
                if any(one is self.tracker.names[name] for one in group["params"])
            )
        if len(set(found.values())) > 1:
            raise ValueError(
                f"{' and '.join(found)} share a block and have the dampings {sorted(found.values())}, expected one:"
                " give them one damping, or take bias='separate'"
            )
        return found[block.names[0]]

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
        inverted, generator = self.inversion.blocks, self.tracker.generator
        own = {
            "steps": self.steps,
            "factors": None if self.factors is None else self.factors.state_dict(),
            "inverted": KroneckerFactors(inverted).state_dict() if inverted else None,
            "damped": dict(self.inversion.damping),
            "generator": None if generator is None else generator.get_state(),
            "seed": self.tracker.seed,
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
        own, tracker = state_dict["kfac"], self.tracker
        read = KroneckerFactors.from_state_dict
        factors = None if own["factors"] is None else read(own["factors"])
        inverted = {} if own["inverted"] is None else dict(read(own["inverted"]))
        for blocks in (factors or {}, inverted):
            require_same_form(blocks, tracker.layers, tracker.names, tracker.joint)
        if factors is not None and factors.approx != self.approx:
            raise ValueError(f"the state has factors with approx={factors.approx!r}, expected {self.approx!r}")
        factors = None if factors is None else factors._with(as_parameters(factors, tracker.names))
        inverted = as_parameters(inverted, tracker.names)
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "kfac"})
        ids = [one for group in state_dict["param_groups"] for one in group["params"]]
        parameters = [one for group in self.param_groups for one in group["params"]]
        for one, parameter in zip(ids, parameters, strict=True):  # torch has cast them to the parameters' dtype
            known = state_dict["state"].get(one, {}).get("momentum_buffer")
            if known is not None:
                self.state[parameter]["momentum_buffer"] = known.to(parameter.device, copy=True)
        self.factors, self.steps = factors, own["steps"]
        tracker.pending, tracker.seed, tracker.generator = None, own.get("seed", tracker.seed), None
        if own["generator"] is not None:
            tracker.generator = generator_from(next(iter(tracker.names.values())).device, own["generator"])
        self.inversion.invert(inverted, own["damped"])

    # --------------------------------------------------------------------------------------------------------- copying
    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in _OF_TORCH}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy or an unpickled optimizer follows the model that was copied with it."""
        super().__setstate__(state)
        if "tracker" not in state:  # torch's own part of a state that is loaded
            return
        names, self._form = self.tracker.names, None
        self._watch_new()
        if self.tracker.names.keys() != names.keys():
            raise ValueError("the copied optimizer does not train the parameters of the copied model")
        self._attach()


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


def _needs_targets(loss: nn.Module) -> bool:
    """Whether the Hessian by the outputs depends on the targets."""
    if isinstance(loss, nn.CrossEntropyLoss):
        return loss.weight is not None or loss.ignore_index >= 0
    return getattr(loss, "pos_weight", None) is not None
