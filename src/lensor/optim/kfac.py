"""KFAC as a torch optimizer."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lensor.choices import Approx, Bias, FactorFisher, Nonfinite, StepMethod, Structure, words
from lensor.curvature.batch_axes import Given
from lensor.curvature.block import Block, factor_of_identity
from lensor.curvature.capture import unwrapped
from lensor.curvature.collector import Collector
from lensor.curvature.distribution import shares
from lensor.curvature.factors import KroneckerFactors
from lensor.curvature.inverses import RANK, require_storage
from lensor.curvature.layers import Layer, layers_of, require_module
from lensor.curvature.registry import reduction_of, require_loss
from lensor.errors import require_choice, require_type
from lensor.optim.adaptation import Adaptation, Chosen
from lensor.optim.checkpoint import WHOLE, as_parameters, mark, packed, require_same_form, unpacked
from lensor.optim.inverse_free import InverseFree, blocks_of
from lensor.optim.inversion import Inversion
from lensor.optim.passes import Passes
from lensor.optim.sharding import Sharding, local
from lensor.optim.tracking import Tracker, generator_from
from lensor.optim.updates import ADAMW, Direction, adapt, descend, each, formed, inner_products


def _of(part: str, name: str, doc: str) -> Any:
    """A property that forwards to an attribute of one part of the optimizer."""

    def read(self: KFAC) -> Any:
        return getattr(getattr(self, part), name)

    def write(self: KFAC, value: Any) -> None:
        setattr(getattr(self, part), name, value)

    return property(read, write, doc=doc)


class KFAC(torch.optim.Optimizer):
    """Gradient descent with gradients multiplied by the damped inverse of Kronecker factors.

    The optimizer collects factors while the model runs in training mode; you need neither a closure nor changes to the
    training loop. A forward pass counts if a backward pass through it adds to the `grad` of the layers' weights. Calls
    of `torch.autograd.grad` do not count, nor does a forward pass whose gradients are differentiated (a gradient
    penalty). Parameters without factors (normalisation, embeddings) are updated with the plain gradient, and those of
    groups with `use_kfac=False` by AdamW. A model that is compiled as a whole runs uncompiled while factors are
    collected; with `fullgraph=True` the compiler raises an error.

    Args:
        model: the model, its DistributedDataParallel wrapper, or a model that was sharded with `fully_shard`.
        loss: the minimised loss: `CrossEntropyLoss`, `MSELoss` or `BCEWithLogitsLoss` with reduction "mean" or "sum".
            The optimizer does not see the targets. With class weights or ignored targets, which only "empirical" and
            "forward-only" allow, it scales B as if every target had weight one.
        lr: learning rate; 0.1 unless given. With `adapt_lr`, a factor of the steps; 1 unless given.
        momentum: momentum of the steps. With `adapt_lr`, 0 leaves out the previous step.
        damping: the multiple of the identity that is added to the curvature.
        weight_decay: a step shrinks the parameters by `lr · weight_decay`, independently of the curvature.
        kl_clip: upper bound on lr²·Σ step·gradient, the squared length of a step in the curvature's norm; longer steps
            are scaled down to it. None for no bound.
        approx: "expand" or "reduce".
        fisher: "empirical" reuses your backward pass; "mc" and "type-2" run additional backward passes during the
            forward pass; "forward-only" needs no backward pass: B is the identity.
        bias: "joint" or "separate"; unless given, "joint" if whole factors are computed.
        method: inversion method: "cholesky", "eigen", "woodbury" (for blocks with roots; "cholesky" for others), or
            "low-rank", which takes less time for layers with many inputs; see `KroneckerFactors.inverse`.
            "inverse-free" updates roots of the inverse with new factors by products of matrices, also in bfloat16, and
            keeps no factors.
        rank: the number of eigenvalues of A that "low-rank" keeps.
        structure: for "inverse-free", the entries of factors and roots that are computed and stored: "dense" (all),
            "block" (those of diagonal blocks) or "diagonal". A block contains whole channels.
        block_size: the largest number of rows of a block; 64 unless given.
        ema: weight of the old factors at an update; 0 uses the new factors only. For "inverse-free", this holds to
            first order; 0 takes one step of Newton's method for the new factors.
        factor_dtype: the dtype in which factors are stored between steps, such as torch.bfloat16 for half the memory;
            they are computed, averaged and inverted in that of the parameters, in at least single precision, which is
            also the default. An average in bfloat16 does not follow changes of less than 0.4 % per update.
        inverse_dtype: the dtype in which inverses are stored and multiplied by gradients; the same default. Neither
            applies to "inverse-free", which computes in the dtype of the parameters.
        factor_interval: number of steps between updates of the factors.
        inverse_interval: number of steps between inversions; 1 for "inverse-free", which has none.
        stagger: whether the layers are updated at different steps of each interval, so that steps take similar time;
            otherwise, all are updated at the same step. In the first step, all are.
        accumulation_steps: number of backward passes per step, each with the mean loss divided by this number (a sum is
            not divided).
        layers: names of the modules that get factors; all supported layers unless given. Blocks omit biases that are
            not trained.
        params: the trained parameters, as for any torch optimizer: parameters, pairs of names and parameters, or groups
            with separate options (lr, momentum, damping, weight_decay); all that require gradients unless given. A
            group with `use_kfac=False` is updated by AdamW, with its options lr, betas, eps and weight_decay.
        mc_samples: number of draws per example, for "mc".
        seed: seed of the draws.
        nonfinite: response to a gradient or factor with NaN or infinity: "raise" a FloatingPointError, or "skip" the
            step; both leave parameters and state unchanged.
        grad_scaler: the GradScaler in use: gradients at the layers' outputs are divided by its scale.
        group: torch.distributed ranks that train together; they sum the factors and share the inversions. For a sharded
            model, these are the ranks of its mesh; each block is then stored, inverted and multiplied on one rank only.
        batch_axis: axis of the examples in the layers' inputs, as for `lensor.curvature.kfac`; a trial pass determines
            it unless given. For a sharded model, a trial pass gathers the whole model on every rank.
        adapt_lr: whether each step minimises a quadratic model of the loss, with the exact Gauss–Newton matrix of the
            batch and the damping, over multiples of the direction and of the previous step. This needs `kl_clip=None`
            and a closure (see `step`). It takes a forward-mode pass of the model for each of the two, which costs about
            two forward passes.
        adapt_damping: whether the damping follows the ratio of the change of the loss to the change that the quadratic
            model predicts: it decreases if the ratio is above 3/4, and grows if it is below 1/4. If the loss
            would grow, the parameters with curvature stay as they are. This needs a closure. Without `adapt_lr`, use a
            learning rate near 1, because every model predicts the change of short steps.
        damping_interval: number of steps between measurements of the ratio. At first, and after a ratio below 1/4,
            every step measures it.
        damping_decay: the factor of a decreasing damping for each step of an interval; a growing one is divided by it.
        damping_range: the smallest and the largest damping that `adapt_damping` may set.

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
        TypeError, ValueError: for an invalid model, loss, choice or number.
    """

    steps: int = _of("tracker", "steps", "Number of steps so far.")
    loss: Any = _of("tracker", "loss", "The minimised loss.")
    approx: Approx = _of("tracker", "approx", "The treatment of positions.")
    fisher: FactorFisher = _of("tracker", "fisher", "The Fisher matrix.")
    mc_samples: int = _of("tracker", "mc_samples", "Number of draws per example.")
    factor_interval: int = _of("tracker", "factor_interval", "Steps between updates of factors.")
    accumulation_steps: int = _of("tracker", "accumulation_steps", "Backward passes per step.")
    grad_scaler: Any = _of("tracker", "grad_scaler", "The GradScaler in use.")
    batch_axis: Given = _of("tracker", "batch_axis", "The axis of the examples, if it was given.")
    layers: list[Layer] = _of("tracker", "layers", "The layers with factors.")
    method: StepMethod = _of("inversion", "method", "The inversion method.")
    ema: float = _of("inversion", "ema", "The weight of the old factors at an update.")
    rank: int = _of("inversion", "rank", "The number of eigenvalues that are kept.")

    def __init__(
        self,
        model: nn.Module,
        loss: Any,
        lr: float | None = None,
        momentum: float = 0.9,
        damping: float = 1e-2,
        weight_decay: float = 0.0,
        *,
        kl_clip: float | None = 1e-3,
        approx: Approx = "expand",
        fisher: FactorFisher = "empirical",
        bias: Bias | None = None,
        method: StepMethod = "cholesky",
        rank: int = RANK,
        structure: Structure = "dense",
        block_size: int | None = None,
        ema: float = 0.95,
        factor_dtype: torch.dtype | None = None,
        inverse_dtype: torch.dtype | None = None,
        factor_interval: int = 1,
        inverse_interval: int = 1,
        stagger: bool = False,
        accumulation_steps: int = 1,
        layers: Iterable[str] | None = None,
        params: Any = None,
        mc_samples: int = 1,
        seed: int = 0,
        nonfinite: Nonfinite = "raise",
        grad_scaler: Any = None,
        group: dist.ProcessGroup | None = None,
        batch_axis: Given = None,
        adapt_lr: bool = False,
        adapt_damping: bool = False,
        damping_interval: int = 5,
        damping_decay: float = 19 / 20,
        damping_range: tuple[float, float] = (1e-7, 1e4),
    ) -> None:
        require_loss(loss)
        chosen = {"approx": (approx, Approx), "fisher": (fisher, FactorFisher), "method": (method, StepMethod)}
        chosen |= {"bias": (bias or "joint", Bias), "nonfinite": (nonfinite, Nonfinite)}
        for name, (value, known) in chosen.items():
            require_choice(name, value, words(known))
        counts = {"factor_interval": factor_interval, "inverse_interval": inverse_interval}
        for name, count in (
            counts | {"accumulation_steps": accumulation_steps, "mc_samples": mc_samples, "rank": rank}
        ).items():
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"{name} is {count!r}, expected a whole number of at least 1")
        if kl_clip is not None and not 0 < kl_clip < math.inf:
            raise ValueError(f"kl_clip is {kl_clip}, expected a positive finite number, or None for no bound")
        if not 0 <= ema < 1:
            raise ValueError(f"ema is {ema}, expected a number in [0, 1)")
        if fisher in ("mc", "type-2") and _needs_targets(loss):
            raise ValueError(f"fisher is {fisher!r}, expected 'empirical' for a loss whose Hessian depends on targets")
        for name, dtype in (("factor_dtype", factor_dtype), ("inverse_dtype", inverse_dtype)):
            require_storage(name, dtype)
            if dtype is not None and method == "inverse-free":
                raise ValueError(
                    f"{name} is {dtype} with method='inverse-free', expected None: use a model in this dtype"
                )
        blocks = blocks_of(method, structure, block_size, bias, inverse_interval)
        require_module(model)
        if group is not None:
            require_type(group, "group", dist.ProcessGroup)
        self.model = unwrapped(model)
        self._asked = [layers] if isinstance(layers, str) else None if layers is None else list(layers)
        self.sharding = Sharding.of(self.model, group, self._asked)
        self.kl_clip, self.nonfinite, self.inverse_interval = kl_clip, nonfinite, inverse_interval
        self.factor_dtype = factor_dtype
        self.adaptation = None
        if adapt_lr or adapt_damping:
            self.adaptation = Adaptation(adapt_lr, adapt_damping, damping_interval, damping_decay, damping_range)
            self._require_adaptable(grad_scaler)
        self.factors: KroneckerFactors | None = None
        shared = group if self.sharding is None else None
        if method == "inverse-free":
            self.inversion = InverseFree(method, rank, shared, ema, size=None if blocks is None else blocks.size)
        else:
            self.inversion = Inversion(method, rank, shared, ema, dtype=inverse_dtype)
        self.tracker = Tracker(
            self.model,
            loss,
            approx,
            fisher,
            bias == "joint" or (bias is None and blocks is None),
            factor_interval,
            accumulation_steps,
            mc_samples,
            seed,
            grad_scaler,
            batch_axis,
            sharding=self.sharding,
            structure=blocks,
        )
        if stagger:
            if self.sharding is not None:
                raise ValueError("stagger is True, expected False for a sharded model")
            self.tracker.slots = {}
        self._form: Any = None
        self._warned = False
        trained = [p for _, p in self._named_parameters() if p.requires_grad]
        lr = (1.0 if adapt_lr else 0.1) if lr is None else lr
        options = {"lr": lr, "momentum": momentum, "damping": damping, "weight_decay": weight_decay}
        options |= {"use_kfac": True}  # schedulers would change betas instead of momentum if they were among these
        super().__init__(trained if params is None else params, options)
        self._watch_new()
        if not self.tracker.names and not self._plain:
            raise ValueError("params has no parameter of the model that requires a gradient, expected at least one")
        self._attach()

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The processes that train together."""
        return self.inversion.group if self.sharding is None else self.sharding.group

    @group.setter
    def group(self, group: dist.ProcessGroup | None) -> None:
        if self.sharding is not None:
            raise ValueError("group is set, expected the group of the sharded model")
        self.inversion.group = group

    # ---------------------------------------------------------------------------------------------- trained parameters
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; layers whose weights it contains get factors from now on.

        Raises:
            ValueError: for an invalid option, or a layer that cannot have factors.
        """
        if not param_group.get("use_kfac", True):
            if "lr" not in param_group:  # that of KFAC is often 100 times too large
                raise ValueError("a group with use_kfac=False has no lr, expected the learning rate of AdamW")
            param_group = ADAMW | param_group
        group = ADAMW | self.defaults | {key: value for key, value in param_group.items() if key != "params"}
        for name in ("lr", "momentum", "weight_decay", "eps"):
            if not 0 <= group[name] < math.inf:
                raise ValueError(f"{name} is {group[name]}, expected a finite number of at least 0")
        if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
            raise ValueError(f"betas is {group['betas']}, expected two numbers in [0, 1)")
        if not 0 < group["damping"] < math.inf:
            raise ValueError(f"damping is {group['damping']} in a group of parameters, expected a positive number")
        if self.adaptation is not None:
            self.adaptation.require_in_range(group["damping"])
        super().add_param_group(param_group)
        if self._form is not None:  # not a call from the constructor
            self._watch_new()

    def _require_adaptable(self, grad_scaler: Any) -> None:
        """Raise ValueError if options exclude adaptive steps."""
        assert self.adaptation is not None
        which = "adapt_lr" if self.adaptation.lr else "adapt_damping"
        if self.adaptation.lr and self.kl_clip is not None:
            raise ValueError(
                f"kl_clip is {self.kl_clip}, expected None with adapt_lr=True: the length of the step is the one that"
                " minimises the quadratic model"
            )
        if self.sharding is not None:
            raise ValueError(f"{which} is True, expected False for a sharded model")
        if grad_scaler is not None and grad_scaler.is_enabled():
            raise ValueError(
                f"{which} is True and grad_scaler is enabled, expected none: a GradScaler does not support closures,"
                " so use autocast with torch.bfloat16"
            )

    def _watch_new(self) -> None:
        """Find the layers whose weights this optimizer trains; their blocks omit a bias that it does not train."""
        form = tuple((id(p), p.requires_grad, one["use_kfac"]) for one in self.param_groups for p in one["params"])
        if form == self._form:
            return
        self._form = form
        held = {found for found, _, curved in form if curved}
        plain = {found for found, _, curved in form if not curved}
        named: dict[str, Tensor] = {
            name: p for name, p in self._named_parameters() if p.requires_grad and id(p) in held
        }
        self._plain = {name: p for name, p in self._named_parameters() if p.requires_grad and id(p) in plain}
        found = []
        for layer in layers_of(self.model, self._asked, among=named):
            if layer.weight in named:
                found.append(layer if layer.bias in named else replace(layer, bias=None))
            elif self._asked is not None:
                where = "in a group with use_kfac=False" if layer.weight in self._plain else "outside of params"
                raise ValueError(f"layer {layer.name!r} has a weight {where}, expected a trained one with curvature")
        self.tracker.watch(found, named)
        if self.factors is not None:  # parameters that are no longer trained have no factors
            self.factors = self.factors._with(self._still_trained(self.factors))
            self.inversion.keep(self._still_trained(self.inversion.blocks))
        if self.sharding is not None:
            self.sharding.keep(self.tracker.names)

    def _named_parameters(self) -> Iterable[tuple[str, Tensor]]:
        return self.model.named_parameters() if self.sharding is None else self.sharding.named_parameters()

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
        """Clear gradients and the factors collected with them, but keep passes that still await their backward pass."""
        self.tracker.discard()
        if self.sharding is not None:
            self.sharding.clear()
        super().zero_grad(set_to_none)

    # -------------------------------------------------------------------------------------------------------- stepping
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take one step.

        Args:
            closure: a function that clears the gradients, computes the loss, calls backward and returns the loss, if
                you have not computed the gradients yet. Adaptive steps need it, and call it up to three times: it
                must use the same batch every time, and must not use the gradients.

        Returns:
            The result of the closure, or None.

        Raises:
            FloatingPointError: if a gradient or factor is not finite and nonfinite="raise"; the message names the
                parameter.
            TypeError: if a gradient is sparse.
            ValueError: if an adaptive step has no closure, or if the model or the loss lack the derivatives that it
                needs.
            torch.linalg.LinAlgError: if a damped factor is not positive definite because the damping is too small.
        """
        found = passes = None
        moves = any(group["lr"] for group in self.param_groups)
        if self.adaptation is not None and moves:
            passes = self._passes(closure)
            found = passes.value
        elif closure is not None:
            with torch.enable_grad():
                found = closure()
        if self.sharding is not None:
            self.sharding.require_reduced()
        pending, names = self.tracker.take(), self.tracker.names
        if all(p.grad is None for p in names.values()):
            pending = None  # the pending factors belong to discarded gradients
            self.tracker.discard()
        new = None
        if pending is not None and pending.examples:
            self._require_outputs(pending)
            new = self._summed(pending)
        is_seen_later = self._is_seen_in_length
        trouble = self._nonfinite(new, gradients=not is_seen_later)
        if trouble:
            return self._skipped(trouble, found)
        before = self.factors, self.tracker.slots, dict(vars(self.inversion))  # which are replaced, not changed
        try:
            chosen, directions = self._planned(new, passes, is_seen_later, moves)
        except BaseException:  # the batch does not count, so that the step can be repeated
            self._put_back(*before)
            raise
        if chosen.trouble:
            self._put_back(*before)
            return self._skipped(chosen.trouble, found)
        for group in self.param_groups:
            if group["use_kfac"]:
                if not chosen.rejected:
                    descend(group, directions, chosen.scale, self.state, chosen.momentum)
            else:
                adapt(group, self.state)
        self._rescale_damping(chosen.damping)
        self.steps += moves or new is not None  # torch.distributed.checkpoint takes a step with lr = 0 to get a state
        if self.sharding is not None:
            self.sharding.end_step()
        mark(self)
        return found

    def _put_back(
        self, factors: KroneckerFactors | None, slots: dict[str, int] | None, inversion: dict[str, Any]
    ) -> None:
        """Undo what a step that is not taken has changed."""
        self.factors, self.tracker.slots = factors, slots
        vars(self.inversion).update(inversion)

    def _planned(
        self, new: KroneckerFactors | None, passes: Passes | None, is_seen_later: bool, moves: bool
    ) -> tuple[Chosen, dict[int, Direction]]:
        """The factors and directions of a step.

        Args:
            new: the Kronecker factors of the batch.
            passes: the passes of an adaptive step.
            is_seen_later: whether gradients that are not finite are seen in the length of the step.
            moves: whether a learning rate is not zero.
        """
        if new is not None:
            old, names = self.factors, self.tracker.names
            averaged = new if old is None or self.ema == 0 else _averaged(old, new, self.ema, names, self.factor_dtype)
            self.factors = averaged if self.factor_dtype is None else averaged.to(self.factor_dtype)
        without = any(self.tracker.names[one.weight].grad is not None for one in self.layers)
        if self.factors is None and not self._warned and without and moves:
            self._warned = True
            warnings.warn(
                "no factors were collected, so this step uses the plain gradient: run the model in training mode",
                stacklevel=4,
            )
        directions = self._directions()
        length = self._length(directions)
        trouble = "" if length is None else self._wrong(length, is_seen_later)
        if trouble:
            return Chosen(1.0, trouble=trouble), directions
        return self._chosen(passes, directions, self._scale(length)), directions

    def _wrong(self, length: Tensor, is_seen_later: bool) -> str:
        """What is wrong with the length of a step, or ""; on devices, it is read for inverses in low precision only."""
        if length.device.type != "cpu" and self.inversion.dtype is None:
            return ""
        number = float(length)
        if not math.isfinite(number):
            return self._nonfinite(None) if is_seen_later else ""
        if number < 0:
            return (
                f"the product of the step and the gradient is {number:.3g}, expected a positive number: no step was"
                " taken, because the inverse has too large rounding errors; use a larger damping, or a more precise"
                " inverse_dtype"
            )
        return ""

    def _passes(self, closure: Callable[[], Any] | None) -> Passes:
        """Run the closure of an adaptive step, and record its passes."""
        if closure is None:
            raise ValueError(
                "step was called without a closure, expected one with adapt_lr or adapt_damping: a function that clears"
                " the gradients, computes the loss, calls backward and returns the loss"
            )
        self._require_adaptable(self.grad_scaler)
        parameters = [p for group in self.param_groups for p in group["params"]]
        return Passes(self.model, closure, self.tracker.replacing, parameters)

    def _chosen(self, passes: Passes | None, directions: Mapping[int, Direction], scale: float | Tensor) -> Chosen:
        """The factors of this step."""
        if passes is None or self.adaptation is None:
            return Chosen(scale)
        curved = [group for group in self.param_groups if group["use_kfac"]]
        names = {id(p): name for name, p in self.tracker.names.items()}
        whole = {key: formed(direction) for key, direction in directions.items()}
        return self.adaptation.choose(passes, curved, names, whole, scale, self.state, self.steps, self.inversion.group)

    def _rescale_damping(self, factor: float) -> None:
        if self.adaptation is not None:
            self.adaptation.rescale([group for group in self.param_groups if group["use_kfac"]], factor)

    def _summed(self, pending: Collector) -> KroneckerFactors:
        """The factors of a step, over all ranks; of a sharded model, the blocks that this rank owns."""
        reduction = str(reduction_of(self.loss))
        if self.sharding is None:
            return pending.factors(reduction, self.group)
        blocks = {name: (name, *([pending._joined[name]] if name in pending._joined else [])) for name in pending.sums}
        self.sharding.blocks |= blocks | {name: (name,) for name in pending.biases}
        return pending.factors(reduction, to_owners=self.sharding.reduction)

    def _due(self) -> dict[str, Block]:
        """The blocks that are inverted in this step."""
        found = {}
        for name, block in ({} if self.factors is None else self.factors).items():
            known = self.inversion.blocks.get(name)
            is_new = known is None or (known.names, known.shape) != (block.names, block.shape)
            if is_new or not self.inversion.keeps_factors or self.tracker.is_due(name, self.inverse_interval):
                found[name] = block
        if self.inversion.keeps_factors:
            return found
        return as_parameters(found, self.tracker.names, least=self.inversion.least)

    def _directions(self) -> dict[int, Direction]:
        """The damped inverse times the gradients, by the parameters' ids; this first inverts blocks that are due."""
        if self.factors is None:
            return {}
        self._place(self.factors)
        due, names = self._due(), self.tracker.names
        if due or self.sharding is not None:
            is_due = self.tracker.is_due("", self.inverse_interval)
            with nullcontext() if self.sharding is None else self.sharding.inverting(is_due):
                self.inversion.invert(due, self._dampings(due))
        if not self.inversion.keeps_factors:
            self.factors = self.factors._with({})
        if self.sharding is None:
            solved = self.inversion.directions({name: p.grad for name, p in names.items()}, formed=False)
        else:
            solved = self.sharding.directions(self.inversion.directions, names)
        return {id(names[name]): direction for name, direction in solved.items()}

    def _place(self, factors: KroneckerFactors) -> None:
        """Distribute the layers over the steps of an interval by the time that their updates take."""
        slots, every = self.tracker.slots, {**self.inversion.blocks, **factors}
        if slots is None or slots.keys() == every.keys():
            return
        interval = max(self.tracker.factor_interval, self.inverse_interval)
        of_rank: dict[int, list[str]] = {}
        for name, rank in self.inversion.owners(every).items():
            of_rank.setdefault(rank, []).append(name)
        placed: dict[str, int] = {}
        for names in of_rank.values():  # each process has some work at every step
            blocks = [every[name] for name in names]
            costs = [self.inversion.cost(block) + _cost(block, factors.examples) for block in blocks]
            placed |= zip(names, shares(costs, interval), strict=True)
        for layer in self.layers:  # a bias with its own block is updated with its weight
            if layer.bias in placed and layer.weight in placed:
                placed[layer.bias] = placed[layer.weight]
        self.tracker.slots = placed

    def _require_outputs(self, pending: Collector) -> None:
        """Raise if a weight has a gradient but its layer's output received none: B is then unknown, not zero.

        Raises:
            ValueError: if there is such a weight; the message names it.
        """
        if self.fisher == "forward-only":
            return
        for name, sums in pending.sums.items():
            gradient = self.tracker.names[name].grad
            if sums.b is None and gradient is not None and self.tracker._any([local(gradient)]):
                raise ValueError(
                    f"{name!r} has a gradient, but none arrived at the output of its layer, expected backward passes"
                    " only through forward passes of the model in training mode"
                )

    @property
    def _is_seen_in_length(self) -> bool:
        """Whether a gradient that is not finite makes the length of the step not finite, which takes less time to see.

        On other devices than CPUs, reading the length means waiting for it, as for the norms of the gradients.
        """
        if self.kl_clip is None or self.group is not None or self._plain:
            return False
        return all(
            p.grad is None or (p.grad.device.type == "cpu" and p.grad.layout == torch.strided)
            for p in self.tracker.names.values()
        )

    def _skipped(self, trouble: str, found: Any) -> Any:
        """Leave out a step because something is not finite.

        Raises:
            FloatingPointError: if nonfinite="raise".
        """
        if self.nonfinite == "raise":
            raise FloatingPointError(trouble)
        return found

    def _nonfinite(self, new: KroneckerFactors | None, gradients: bool = True) -> str:
        """The error message for the first gradient or factor that is not finite, or ""; the same on every rank."""
        flags = []
        if gradients:
            trained = self.tracker.names | self._plain
            flags = [(name, local(p.grad)) for name, p in trained.items() if p.grad is not None]
        for name, gradient in flags:
            if gradient.layout != torch.strided:
                raise TypeError(f"the gradient of {name!r} is sparse, expected a dense one")
        if new is not None and self.sharding is None:
            flags += [
                (f"{name} (factor {which})", one)
                for name, block in new.items()
                for which, one in block.tensors().items()
                if factor_of_identity(one) is None
            ]
        if not flags:
            return ""
        # The 1-norm gives one number per tensor, which is finite if all entries are, unless it overflows.
        flags.sort(key=lambda flag: flag[1].dtype == torch.float16)
        names, tensors = [name for name, _ in flags], [one for _, one in flags]
        count = sum(one.dtype != torch.float16 for one in tensors)
        norms = [*each._foreach_norm(tensors[:count], 1)] if count else []
        if count < len(tensors):
            norms += each._foreach_norm(tensors[count:], 1, dtype=torch.float32)
        good = torch.stack(norms).isfinite()
        if new is not None and self.sharding is not None:
            names += [f"{name} (a factor)" for name in self.sharding.blocks]
            good = torch.cat([good, self.sharding.finite(new, good)])
        if self.group is not None:
            kept = good.to(torch.int32)
            dist.all_reduce(kept, dist.ReduceOp.MIN, group=self.group)
            good = kept.bool()
        if bool(good.all()):
            return ""
        name = next(name for name, fine in zip(names, good.tolist(), strict=True) if not fine)
        return f"the gradient or factor of {name} is not finite, expected finite entries: no step was taken"

    def _dampings(self, blocks: Mapping[str, Block]) -> dict[str, float]:
        """The damping of each block.

        Raises:
            ValueError: if the parameters of a block are in groups with different dampings.
        """
        known = {id(p): group["damping"] for group in self.param_groups for p in group["params"]}
        found: dict[str, float] = {}
        for name, block in blocks.items():
            own = {one: known[id(self.tracker.names[one])] for one in block.names}
            if len(set(own.values())) > 1:
                raise ValueError(
                    f"{' and '.join(own)} share a block and have the dampings {sorted(own.values())}, expected one:"
                    " use equal dampings, or bias='separate'"
                )
            found[name] = own[block.names[0]]
        return found

    def _length(self, directions: Mapping[int, Direction]) -> Tensor | None:
        """lr²·Σ step·gradient, the squared length of the step in the curvature's norm; None if no bound needs it."""
        if self.kl_clip is None:
            return None
        parts = []
        for group in self.param_groups:
            pairs = [(directions.get(id(p), p.grad), p.grad) for p in group["params"] if p.grad is not None]
            if pairs and group["use_kfac"]:
                parts.append(group["lr"] ** 2 * inner_products((one, local(gradient)) for one, gradient in pairs))
        if not parts:
            return None
        length = torch.stack(parts).sum() if len(parts) > 1 else parts[0]
        return length if self.sharding is None else self.sharding.total(length)

    def _scale(self, length: Tensor | None) -> float | Tensor:
        """The factor of the steps that keeps their length within the bound; a tensor unless it is on a CPU."""
        if self.kl_clip is None or length is None:
            return 1.0
        tiny = torch.finfo(length.dtype).tiny
        if length.device.type != "cpu":
            found = (self.kl_clip / length.clamp_min(tiny)).sqrt().clamp_max(1.0)
            return torch.where(length < 0, torch.zeros_like(found), found)  # rounding errors, which are not read here
        scale = math.sqrt(self.kl_clip / max(float(length), tiny))
        return 1.0 if scale > 1 else scale

    # ----------------------------------------------------------------------------------------------------------- state
    def state_dict(self) -> dict[str, Any]:
        """The state of the optimizer: momentum, groups, factors, inverted factors, and the random generator.

        Save it with `torch.save` or `torch.distributed.checkpoint`. All but momentum and groups is an entry of the
        first trained parameter's state, in bytes. For a sharded model, this is the part of the state that this rank
        has: save it with `torch.distributed.checkpoint`, and load it on the same number of ranks. With `group` and the
        method "low-rank", save the state of each rank, because each knows the start of its own inversions only.
        """
        inverted, generator = self.inversion.blocks, self.tracker.generator
        own = {
            "steps": self.steps,
            "factors": None if self.factors is None else self.factors.state_dict(),
            "inverted": KroneckerFactors(inverted).state_dict() if inverted else None,
            "damped": dict(self.inversion.damping),
            "starts": dict(self.inversion.starts),
            "updates": dict(self.inversion.updates),
            "structure": self.inversion.structure,
            "slots": None if self.tracker.slots is None else dict(self.tracker.slots),
            "generator": None if generator is None else generator.get_state(),
            "seed": self.tracker.seed,
            "ratio": None if self.adaptation is None else self.adaptation.ratio,
        }
        own |= {} if self.sharding is None else self.sharding.known
        return packed(self, super().state_dict(), own, self._part)

    @property
    def _part(self) -> str:
        return WHOLE if self.sharding is None else self.sharding.part

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state; the steps that follow are then the same, bit for bit on a CPU with estimated plans.

        Raises:
            KeyError: if the state is not from this class.
            ValueError: if the state belongs to a different model, or to different choices of approx and bias; for a
                sharded model, also if it was saved by a different number of ranks.
        """
        plain, own = unpacked(state_dict, self._part)
        tracker = self.tracker
        read = KroneckerFactors.from_state_dict
        factors = None if own["factors"] is None else read(own["factors"])
        inverted = {} if own["inverted"] is None else dict(read(own["inverted"]))
        known, structure = own.get("structure"), self.inversion.structure
        if known != structure:
            raise ValueError(f"the state has the structure of inverses {known!r}, expected {structure!r}")
        for blocks in (factors or {}, inverted):
            require_same_form(blocks, tracker.layers, tracker.names, tracker.joint)
        if factors is not None and factors.approx != self.approx:
            raise ValueError(f"the state has factors with approx={factors.approx!r}, expected {self.approx!r}")
        dtype = self.factor_dtype
        factors = None if factors is None else factors._with(as_parameters(factors, tracker.names, dtype))
        inverted = as_parameters(inverted, tracker.names, dtype, self.inversion.least)
        super().load_state_dict(plain)
        mark(self)
        ids = [one for group in plain["param_groups"] for one in group["params"]]
        parameters = [one for group in self.param_groups for one in group["params"]]
        for one, parameter in zip(ids, parameters, strict=True):  # undo torch's cast to the parameters' dtype
            known = plain["state"].get(one, {}).get("momentum_buffer")
            if known is not None:
                dtype = torch.promote_types(known.dtype, parameter.dtype)
                self.state[parameter]["momentum_buffer"] = known.to(parameter.device, dtype, copy=True)
        if tracker.slots is not None:
            tracker.slots = dict(own.get("slots") or {})
        self.factors, self.steps = factors, own["steps"]
        if self.adaptation is not None:
            self.adaptation.ratio = own.get("ratio")
        tracker.pending, tracker.seed, tracker.generator = None, own.get("seed", tracker.seed), None
        if own["generator"] is not None:
            tracker.generator = generator_from(next(iter(tracker.names.values())).device, own["generator"])
        starts = own.get("starts", {})
        starts = {name: one.to(inverted[name].B.device) for name, one in starts.items() if name in inverted}
        self.inversion.restore(inverted, own["damped"], starts, own.get("updates", {}))
        if self.sharding is not None:
            self.sharding.restore(own)

    # --------------------------------------------------------------------------------------------------------- copying
    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in _OF_TORCH}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make a copied or unpickled optimizer follow the model that was copied with it."""
        super().__setstate__(state)
        for name in ("adaptation", "factor_dtype"):  # earlier versions had neither
            self.__dict__.setdefault(name, None)
        for group in self.param_groups:  # states of earlier versions have no such option
            group.setdefault("use_kfac", True)
        if "tracker" not in state:  # torch calls this with its own part of a loaded state
            return
        names, self._form = self.tracker.names, None
        self._watch_new()
        if any(p.requires_grad and name not in self.tracker.names for name, p in names.items()):
            raise ValueError(
                "the copied optimizer does not train the copied model's parameters, expected model and optimizer to be"
                " copied together"
            )
        self._attach()


_OF_TORCH = ("step", "_opt_called", "_step_count", "_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
_OF_TORCH += ("_optimizer_load_state_dict_pre_hooks", "_optimizer_load_state_dict_post_hooks")
_OF_TORCH += ("_optimizer_state_dict_pre_hooks", "_optimizer_state_dict_post_hooks")
"""Attributes that schedulers and hooks add to an optimizer; copies of torch's own optimizers omit them."""


def _averaged(
    old: KroneckerFactors, new: KroneckerFactors, decay: float, order: Iterable[str], dtype: torch.dtype | None
) -> KroneckerFactors:
    """Average the blocks that both contain, keep those that only the old factors contain, and add new ones.

    The old factors are stored in `dtype` if it is given, and averaged one by one in the dtype of the new ones.
    """
    both = {name: block for name, block in old.items() if name in new and new[name].shapes == block.shapes}
    averaged: dict[str, Block] = {}
    for some in [both] if dtype is None else [{name: block} for name, block in both.items()]:
        kept = old._with(some)  # `old` itself stays as it is
        kept = kept if dtype is None else kept.to(new[next(iter(some))].B.dtype)
        kept.ema_(new._with({name: new[name] for name in some}), decay)
        averaged |= kept if dtype is None else kept.to(dtype)
    if len(both) == len(old) == len(new):
        return old._with(averaged)
    found = {**old, **new, **averaged}
    return new._with({name: found[name] for name in order if name in found})


def _cost(block: Block, examples: int) -> float:
    """The number of multiplications for the factors of some examples, without those of roots."""
    entries = block.B.numel() + (block.A.numel() if block.root is None else 0)
    return float(examples * max(block.positions, 1) * entries)


def _needs_targets(loss: Any) -> bool:
    """Whether the Hessian of the loss with respect to the outputs depends on the targets."""
    if isinstance(loss, nn.CrossEntropyLoss):
        return loss.weight is not None or loss.ignore_index >= 0
    return getattr(loss, "pos_weight", None) is not None
