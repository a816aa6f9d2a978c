"""First and mixed second derivatives of convolutions, derived by transforming `conv` (§3.1, §3.2 of the paper)."""

from __future__ import annotations

from lensor.network import AnyNetwork, Network
from lensor.ops.convolution import conv
from lensor.spec import ConvSpec


def conv_weight_vjp(spec: ConvSpec) -> Network:
    """The weight gradient, summed over the batch: X, cotangent V [n, c_out, *output_size] -> weight shape.

    `n (g c_in) i, i o k, n (g c_out) o -> (g c_out) c_in k` (Table 1 of the paper).

    Example:
        >>> import lensor
        >>> lensor.ops.conv_weight_vjp(lensor.ConvSpec(4, 8, (9,), 3)).subscripts
        'n (g c_in) i1, i1 o1 k1, n (g c_out) o1 -> (g c_out) c_in k1'

    Raises:
        TypeError: if `spec` is not a ConvSpec.
    """
    return conv(spec).vjp("W")


def conv_weight_vjp_per_example(spec: ConvSpec) -> Network:
    """The weight gradient for each example: X, V -> [n, *weight shape].

    `n (g c_in) i, i o k, n (g c_out) o -> n (g c_out) c_in k`.

    Example:
        >>> import lensor
        >>> lensor.ops.conv_weight_vjp_per_example(lensor.ConvSpec(4, 8, (9,), 3)).subscripts
        'n (g c_in) i1, i1 o1 k1, n (g c_out) o1 -> n (g c_out) c_in k1'

    Raises:
        TypeError: if `spec` is not a ConvSpec.
    """
    return conv_weight_vjp(spec).keep("n")


def conv_input_vjp(spec: ConvSpec) -> Network:
    """The input gradient (transposed convolution): W, cotangent V -> [n, c_in, *input_size].

    `(g c_out) c_in k, i o k, n (g c_out) o -> n (g c_in) i` (Table 1 of the paper).

    Example:
        >>> import lensor
        >>> lensor.ops.conv_input_vjp(lensor.ConvSpec(4, 8, (9,), 3)).subscripts
        'i1 o1 k1, (g c_out) c_in k1, n (g c_out) o1 -> n (g c_in) i1'

    Raises:
        TypeError: if `spec` is not a ConvSpec.
    """
    return conv(spec).vjp("X")


def conv_weight_jvp(spec: ConvSpec) -> Network:
    """The convolution's derivative along a tangent T of the weight: X, T -> [n, c_out, *output_size].

    Example:
        >>> import lensor
        >>> lensor.ops.conv_weight_jvp(lensor.ConvSpec(4, 8, (9,), 3)).operand_names
        ('X', 'T')

    Raises:
        TypeError: if `spec` is not a ConvSpec.
    """
    return conv(spec).jvp("W")


def conv_input_jvp(spec: ConvSpec) -> Network:
    """The convolution's derivative along a tangent T of the input: T, W -> [n, c_out, *output_size].

    Example:
        >>> import lensor
        >>> lensor.ops.conv_input_jvp(lensor.ConvSpec(4, 8, (9,), 3)).operand_names
        ('T', 'W')

    Raises:
        TypeError: if `spec` is not a ConvSpec.
    """
    return conv(spec).jvp("X")


def conv_weight_jacobian(spec: ConvSpec) -> Network:
    """The Jacobian with respect to the weight: [X]ᵀ ⊗ I, X -> [n, c_out, *output_size, *weight shape].

    `n (g c_in) i, i o k, g g_, c_out c_out_ -> n (g c_out) o (g_ c_out_) c_in k` (figure 3b of the paper).

    Example:
        >>> import lensor
        >>> print(lensor.ops.conv_weight_jacobian(lensor.ConvSpec(4, 8, (9,), 3)))
        X[n (g c_in) i1] Π1[i1 o1 k1] δ[g g_] δ[c_out c_out_] -> n (g c_out) o1 (g_ c_out_) c_in k1

    Raises:
        TypeError: if `spec` is not a ConvSpec.
    """
    return conv(spec).jacobian("W")


def conv_input_jacobian(spec: ConvSpec) -> Network:
    """The Jacobian with respect to the input: W -> [n, c_out, *output_size, n, c_in, *input_size].

    `(g c_out) c_in k, i o k, g g_, n n_ -> n (g c_out) o n_ (g_ c_in) i` (figure 3c of the paper). No operand
    determines the batch size, so pass `n=...` when you call the network.

    Example:
        >>> import lensor, numpy as np
        >>> net = lensor.ops.conv_input_jacobian(lensor.ConvSpec(1, 1, (3,), 2))
        >>> net(W=np.array([[[1.0, 2.0]]]), n=1)[0, 0, :, 0, 0, :]
        array([[1., 2., 0.],
               [0., 1., 2.]])

    Raises:
        TypeError: if `spec` is not a ConvSpec.
    """
    return conv(spec).jacobian("X")


def mixed_second_derivative(spec: ConvSpec) -> AnyNetwork:
    """The weight gradient's Jacobian with respect to the input: V -> [*weight shape, n, c_in, *input_size].

    `i o k, n (g c_out) o, c_in c_in_, g g_ -> (g c_out) c_in k n (g_ c_in_) i`.

    Example:
        >>> import lensor
        >>> print(lensor.ops.mixed_second_derivative(lensor.ConvSpec(4, 8, (9,), 3)))
        Π1[i1 o1 k1] V[n (g c_out) o1] δ[g g_] δ[c_in c_in_] -> (g c_out) c_in k1 n (g_ c_in_) i1

    Raises:
        TypeError: if `spec` is not a ConvSpec.
    """
    return conv_weight_vjp(spec).jacobian("X")
