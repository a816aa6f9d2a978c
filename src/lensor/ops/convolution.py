"""Convolution and its matrix forms: the networks from which all other networks are derived."""

from __future__ import annotations

from lensor.errors import require_type
from lensor.network import AnyNetwork, Network, Ones, Operand, sum_of
from lensor.ops._legs import Legs, single
from lensor.spec import ConvSpec


def conv(spec: ConvSpec) -> AnyNetwork:
    """Convolution, or transposed convolution: X [n, c_in, *I], W in torch's layout, b -> [n, c_out, *O].

    Table 1 of the paper: `n (g c_in) i, i o k, (g c_out) c_in k -> n (g c_out) o`, plus the bias at every position.

    Example:
        >>> import lensor
        >>> lensor.ops.conv(lensor.ConvSpec(4, 8, (9, 9), 3, stride=2, groups=2)).subscripts
        'n (g c_in) i1 i2, i1 o1 k1, i2 o2 k2, (g c_out) c_in k1 k2 -> n (g c_out) o1 o2'

    Raises:
        TypeError: if `spec` is not a ConvSpec.
    """
    legs = Legs(spec)
    main = legs.network([Operand("X", legs.input), *legs.patterns, Operand("W", legs.weight)], legs.output)
    if not spec.bias:
        return main
    ones = [Ones("n"), *(Ones(index) for index in legs.positions[1])]
    return sum_of([main, legs.network([Operand("b", (("g", legs.channels[1]),)), *ones], legs.output)])


def convolution_matrix(spec: ConvSpec) -> Network:
    """The input Jacobian for one example, without n: W -> (g c_out) o.. (g_in c_in) i.., diagonal in g and g_in."""
    legs = Legs(spec)
    nodes = [Operand("X", legs.input[1:]), *legs.patterns, Operand("W", legs.weight)]
    return legs.network(nodes, legs.output[1:]).jacobian("X").rename(g_="g_in")


def unfold(spec: ConvSpec) -> Network:
    """The patches of the input (im2col): X [n, c_in, *input_size] -> [n, c_in·ΠK, *output_size].

    Table 1 of the paper: `n c_in i, i o k -> n (c_in k) o`. For a transposed spec, this is the same network as
    `unfold_transpose`.

    Example:
        >>> import lensor
        >>> print(lensor.ops.unfold(lensor.ConvSpec(2, 1, 9, 3)))
        X[n c_in i1] Π1[i1 o1 k1] -> n (c_in k1) o1

    Raises:
        TypeError: if `spec` is not a ConvSpec.
    """
    legs = Legs(spec)
    channel = legs.channels[0]
    operand = Operand("X", (("n",), (channel,), *single(legs.positions[0])))
    output = (("n",), (channel, *legs.kernel), *single(legs.positions[1]))
    return Network.make([operand, *legs.patterns], output, {**legs.sizes, channel: spec.in_channels})


def fold(spec: ConvSpec) -> Network:
    """Sum overlapping patches (col2im): V [n, c_in·ΠK, *output_size] -> [n, c_in, *input_size].

    This is the adjoint of `unfold` in every padding mode, `n (c_in k) o, i o k -> n c_in i`.

    Example:
        >>> import lensor
        >>> print(lensor.ops.fold(lensor.ConvSpec(2, 1, 9, 3)))
        Π1[i1 o1 k1] V[n (c_in k1) o1] -> n c_in i1

    Raises:
        TypeError: if `spec` is not a ConvSpec.
    """
    return unfold(spec).vjp("X")


def unfolded_kernel(spec: ConvSpec) -> Network:
    """The Toeplitz matrix A(W) of equation 2 of the paper: W -> [c_out·ΠO, c_in·ΠI], block diagonal over groups.

    `i o k, c_out c_in k -> (c_out o) (c_in i)`.

    Example:
        >>> import lensor
        >>> print(lensor.ops.unfolded_kernel(lensor.ConvSpec(2, 3, 9, 3)).simplify())
        Π1[i1 o1 k1] W[c_out c_in k1] -> (c_out o1) (c_in i1)

    Raises:
        TypeError: if `spec` is not a ConvSpec.
    """
    matrix = convolution_matrix(spec)
    rows = [index for leg in matrix.output[: spec.ndim + 1] for index in leg]
    columns = [index for leg in matrix.output[spec.ndim + 1 :] for index in leg]
    return matrix.regroup(f"({' '.join(rows)}) ({' '.join(columns)})")


def conv_transpose(spec: ConvSpec) -> AnyNetwork:
    """Transposed convolution: `conv` for a transposed spec, else the transpose (input VJP) of the convolution.

    For a spec that is not transposed: X [n, c_out, *output_size], W -> [n, c_in, *input_size], with
    `(g c_out) c_in k, i o k, n (g c_out) o -> n (g c_in) i`.

    Example:
        >>> import lensor
        >>> spec = lensor.ConvSpec(4, 2, (5,), 3, stride=2, transposed=True)
        >>> print(lensor.ops.conv_transpose(spec))
        X[n (g c_out) o1] Π1[i1 o1 k1] W[(g c_out) c_in k1] -> n (g c_in) i1

    Raises:
        TypeError: if `spec` is not a ConvSpec.
    """
    require_type(spec, "spec", ConvSpec)
    if spec.transposed:
        return conv(spec)
    return _without_bias(spec).vjp("X", "Y").rename_operands(Y="X")


def unfold_transpose(spec: ConvSpec) -> Network:
    """The patches of a transposed convolution: X -> [n, channels·ΠK, *output positions].

    `n c_out o, i o k -> n (c_out k) i`. For a spec that is not transposed, use the transpose of its convolution.

    Example:
        >>> import lensor
        >>> spec = lensor.ConvSpec(4, 2, (5,), 3, stride=2, transposed=True)
        >>> print(lensor.ops.unfold_transpose(spec))
        X[n c_out o1] Π1[i1 o1 k1] -> n (c_out k1) i1

    Raises:
        TypeError: if `spec` is not a ConvSpec.
    """
    legs = Legs(spec)
    if spec.transposed:
        return unfold(spec)
    inputs, outputs = legs.positions
    operand = Operand("X", (("n",), ("c_out",), *single(outputs)))
    output = (("n",), ("c_out", *legs.kernel), *single(inputs))
    return Network.make([operand, *legs.patterns], output, {**legs.sizes, "c_out": spec.out_channels})


def _without_bias(spec: ConvSpec) -> Network:
    """The convolution's network without the bias term."""
    return conv(spec).terms[0]
