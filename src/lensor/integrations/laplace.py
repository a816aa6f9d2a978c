"""Backends for laplace-torch: the curvature of Laplace approximations, computed by Lensor."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lensor.choices import Approx, Fisher
from lensor.curvature import ggn_diagonal, kfac, per_example_gradients
from lensor.curvature.jacobian import jacobians_and_outputs
from lensor.curvature.layers import Layer, all_parameters

try:
    from laplace.curvature import CurvatureInterface, EFInterface, GGNInterface  # type: ignore[import-not-found]
    from laplace.utils import Kron  # type: ignore[import-not-found]
except ImportError as error:
    raise ImportError(
        f"lensor.integrations.laplace requires laplace-torch 0.3 (pip install laplace-torch): {error}"
    ) from error


class _OfMapping(nn.Module):
    """A model that takes a mapping as its only argument, called with the entries as named arguments."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.training = model, model.training

    def forward(self, **given: Any) -> Any:
        return self.model(given)


def _called(model: nn.Module, x: Any) -> tuple[nn.Module, Any]:
    """A model and its inputs, as the functions of `lensor.curvature` take them."""
    return (_OfMapping(model), dict(x)) if isinstance(x, Mapping) else (model, (x,))


_ADVICE = "use hessian_structure='diag' or 'full', or freeze them with requires_grad_(False)"


def _modules(model: nn.Module, names: Sequence[str]) -> list[str]:
    """The names of the modules with these parameters; ValueError if laplace-torch cannot store one of their blocks."""
    owners: dict[str, Layer] = {}
    for layer in all_parameters(model)[0]:
        owners |= {name: layer for name in (layer.weight, layer.bias) if name is not None}
    parameters = dict(model.named_parameters())
    missing = [name for name in names if name not in owners and parameters[name].ndim != 1]
    if missing:
        raise ValueError(
            f"the parameters {', '.join(missing)} have no Kronecker factors, expected those of linear layers and"
            f" convolutions, or parameters with one axis: {_ADVICE}"
        )
    for name in (name for name in names if name in owners):
        layer = owners[name]
        if layer.groups > 1 or (layer.is_transposed and not layer.is_linear):
            kind = "is a transposed convolution" if layer.is_transposed else f"has {layer.groups} groups"
            raise ValueError(
                f"layer {layer} with the parameter {name!r} {kind}, expected a linear layer or a convolution without"
                f" groups: laplace-torch stores one product B ⊗ A with c_out rows for each weight; {_ADVICE}"
            )
    return list(dict.fromkeys(name.rpartition(".")[0] for name in names))


class LensorInterface(CurvatureInterface):
    """What the backends share: gradients of single examples, Jacobians, diagonals and Kronecker factors.

    Use `LensorGGN` or `LensorEF`. The arguments are those of `laplace.curvature.CurvatureInterface`.
    """

    _fisher: Fisher = "type-2"
    _samples: int = 1

    def _names(self, model: nn.Module) -> list[str]:
        """The names of the parameters in a model, in the order of laplace-torch."""
        known = {id(parameter): name for name, parameter in model.named_parameters()}
        return [known[id(parameter)] for parameter in self.params]

    def _layers(self, model: nn.Module) -> list[str] | None:
        """The names of the modules with these parameters, for the last layer; None for all."""
        if not self.last_layer:
            return None
        wanted = {id(parameter) for parameter in self.params}
        return [
            name
            for name, module in model.named_modules()
            if any(id(parameter) in wanted for parameter in module.parameters(recurse=False))
        ]

    def jacobians(
        self, x: Tensor | MutableMapping[str, Tensor | Any], enable_backprop: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The Jacobians of the outputs with respect to the parameters, by one backward pass for each output.

        Args:
            x: the inputs [batch, *input_shape], or a mapping that the model takes as its only argument.
            enable_backprop: whether the results can be differentiated; then `torch.func` computes them, as in
                laplace-torch.

        Returns:
            The Jacobians [batch, outputs, parameters] and the outputs [batch, outputs].

        Example:
            >>> import torch
            >>> from lensor.integrations.laplace import LensorGGN
            >>> backend = LensorGGN(torch.nn.Linear(3, 2), "classification")
            >>> found, outputs = backend.jacobians(torch.randn(5, 3))
            >>> found.shape, outputs.shape
            (torch.Size([5, 2, 8]), torch.Size([5, 2]))

        Raises:
            TypeError: for a model or inputs of an unsupported type.
            ValueError: for a model that mixes examples, or outputs of another shape.
        """
        if enable_backprop:
            return super().jacobians(x, enable_backprop=True)
        model, inputs = _called(self.model, x)
        found, outputs = jacobians_and_outputs(model, inputs, self._layers(model))
        return self._subset(torch.cat([found[name].flatten(2) for name in self._names(model)], 2)), outputs

    def gradients(self, x: Tensor | MutableMapping[str, Tensor | Any], y: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of every example's loss.

        Args:
            x: the inputs, as for `jacobians`.
            y: the targets.

        Returns:
            The gradients [batch, parameters] and the summed loss.

        Raises:
            TypeError: for a model or inputs of an unsupported type.
            ValueError: for a model that mixes examples.
        """
        model, inputs = _called(self.model, x)
        found = per_example_gradients(model, self.lossfunc, (inputs, y), layers=self._layers(model))
        return self._subset(torch.cat([found[name].flatten(1) for name in self._names(model)], 1)), self._loss(x, y)

    def diag(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Tensor | MutableMapping[str, Tensor | Any],
        y: Tensor,
        *,
        N: int | None = None,
        mc_samples: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The loss and the diagonal [parameters] of the curvature, without Jacobians or gradients of single examples.

        Args:
            x: the inputs, as for `jacobians`.
            y: the targets.
            N: has no effect; laplace-torch passes the number of examples in the data.
            mc_samples: the number of samples if the backend is stochastic; `num_samples` unless given.

        Example:
            >>> import torch
            >>> from lensor.integrations.laplace import LensorGGN
            >>> backend = LensorGGN(torch.nn.Conv1d(2, 3, 5), "regression")
            >>> backend.diag(torch.randn(4, 2, 5), torch.randn(4, 3, 1))[1].shape
            torch.Size([33])

        Raises:
            TypeError: for a model or inputs of an unsupported type.
            ValueError: for a model that mixes examples.
        """
        model, inputs = _called(self.model, x)
        found = ggn_diagonal(
            model,
            self.lossfunc,  # pyright: ignore[reportArgumentType]
            (inputs, y),
            fisher=self._fisher,
            layers=self._layers(model),
            mc_samples=self._samples if mc_samples is None else mc_samples,
        )
        diagonal = self._subset(torch.cat([found[name].flatten() for name in self._names(model)]))
        return self.factor * self._loss(x, y), self.factor * diagonal

    def kron(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Tensor | MutableMapping[str, Tensor | Any],
        y: Tensor,
        N: int,
        *,
        kfac_approx: Approx = "expand",
        mc_samples: int | None = None,
    ) -> tuple[Tensor, Kron]:
        """The loss and the Kronecker factors [B, A] of every weight and [B] of every bias.

        The order and the scale are those of laplace-torch's own backends: B is a sum over the examples, and A is a mean
        times the batch's share in the data, so that the factors of all batches can be added.

        Args:
            x: the inputs, as for `jacobians`.
            y: the targets.
            N: the number of examples in the data.
            kfac_approx: "expand" or "reduce", as `approx` of `lensor.curvature.kfac`.
            mc_samples: the number of samples if the backend is stochastic; `num_samples` unless given.

        Example:
            >>> import torch
            >>> from lensor.integrations.laplace import LensorGGN
            >>> backend = LensorGGN(torch.nn.Linear(3, 2), "classification")
            >>> [[tuple(factor.shape) for factor in one] for one in backend.kron(torch.randn(4, 3), torch.ones(
            ...     4, dtype=torch.long), N=4)[1].kfacs]
            [[(2, 2), (3, 3)], [(2, 2)]]

        Raises:
            TypeError: for a model or inputs of an unsupported type.
            ValueError: for a subnetwork, for groups and transposed convolutions, whose blocks are not of the form that
                laplace-torch stores, and for trainable parameters with several axes other than those of linear layers
                and convolutions, or with more than 1,024 entries.
        """
        if self.subnetwork_indices is not None:
            raise ValueError("Kronecker factors of a subnetwork are not defined, expected 'diag' or 'full'")
        model, inputs = _called(self.model, x)
        names = self._names(model)
        factors = kfac(
            model,
            self.lossfunc,  # pyright: ignore[reportArgumentType]
            (inputs, y),
            approx=kfac_approx,
            fisher=self._fisher,
            convention="curvlinops",
            others="full",
            layers=_modules(model, names),
            mc_samples=self._samples if mc_samples is None else mc_samples,
        )
        share, found = len(y) / N, []
        for name in names:
            block = factors[name]
            if block.groups > 1 or (len(block.shape) > 1 and not block.factored):
                what = "has too many entries" if len(block.shape) == 1 else "is also used by other functions"
                raise ValueError(f"the parameter {name} {what} for a block that laplace-torch can store: {_ADVICE}")
            if len(block.shape) > 1:
                b, a = block.B[0], block.A[0] * share
                found.append([a, b] if block.transposed else [b, a])
            else:
                found.append([block.B[0] * block.A[0]])
        return self.factor * self._loss(x, y), self.factor * Kron(found)

    def _subset(self, rows: Tensor) -> Tensor:
        return rows if self.subnetwork_indices is None else rows[..., self.subnetwork_indices]

    def _loss(self, x: Any, y: Tensor) -> Tensor:
        with torch.no_grad():
            return self.lossfunc(self.model(x), y)


class LensorGGN(LensorInterface, GGNInterface):  # pyright: ignore[reportIncompatibleMethodOverride]
    """The generalised Gauss-Newton matrix for laplace-torch: `Laplace(..., backend=LensorGGN)`.

    It computes diagonals, Kronecker factors, Jacobians and full matrices for all weights, the last layer or a
    subnetwork (without Kronecker factors). Diagonals and full matrices cover all parameters of any model that does not
    mix examples, such as normalisation in evaluation mode and attention; Kronecker factors cover linear layers and
    convolutions without groups, and dense blocks cover other parameters with one axis. Frozen parameters are left out.
    Arguments for `diag` and `kron` are passed as `asdl_fisher_kwargs`.

    Args:
        model: the model.
        likelihood: "classification" or "regression".
        last_layer: whether to include only the last layer; this and the next argument are set by laplace-torch.
        subnetwork_indices: the indices of the parameters to include.
        dict_key_x: has no effect; mappings are passed to the model as they are.
        dict_key_y: has no effect.
        stochastic: whether to sample targets from the model's distribution instead of using the exact Hessian of the
            loss.
        num_samples: the number of these samples.

    Example:
        >>> import torch
        >>> from laplace import Laplace
        >>> from lensor.integrations.laplace import LensorGGN
        >>> model = torch.nn.Sequential(torch.nn.Conv1d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(24, 2))
        >>> data = torch.utils.data.TensorDataset(torch.randn(6, 1, 8), torch.arange(6) % 2)
        >>> la = Laplace(model, "classification", "all", "kron", backend=LensorGGN)
        >>> la.fit(torch.utils.data.DataLoader(data, batch_size=3))
        >>> la(torch.randn(5, 1, 8)).shape
        torch.Size([5, 2])
    """

    @property
    def _fisher(self) -> Fisher:  # pyright: ignore[reportIncompatibleVariableOverride]
        return "mc" if self.stochastic else "type-2"

    @property
    def _samples(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.num_samples


class LensorEF(LensorInterface, EFInterface):  # pyright: ignore[reportIncompatibleMethodOverride]
    """The empirical Fisher for laplace-torch: `Laplace(..., backend=LensorEF)`; see `LensorGGN`.

    Args:
        model: the model.
        likelihood: "classification" or "regression".
        last_layer: as for `LensorGGN`.
        subnetwork_indices: as for `LensorGGN`.
        dict_key_x: as for `LensorGGN`.
        dict_key_y: as for `LensorGGN`.

    Example:
        >>> import torch
        >>> from lensor.integrations.laplace import LensorEF
        >>> backend = LensorEF(torch.nn.Linear(3, 1), "regression")
        >>> backend.full(torch.randn(4, 3), torch.randn(4, 1))[1].shape
        torch.Size([4, 4])
    """

    _fisher = "empirical"
