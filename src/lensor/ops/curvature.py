"""Curvature: Kronecker factors, GGN diagonals, blocks and Gram matrices, and Hessian backpropagation (paper, §3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from lensor.choices import Approx, words
from lensor.errors import require_choice, require_type
from lensor.network import AnyNetwork, Group, Network, Ones, Operand, Pattern, sum_of
from lensor.network.subscripts import format_legs
from lensor.ops._legs import Legs
from lensor.ops.convolution import convolution_matrix, unfold
from lensor.ops.derivatives import conv_weight_jacobian, conv_weight_vjp
from lensor.pattern import IndexPattern
from lensor.spec import ConvSpec


def _copies(indices: Sequence[str]) -> list[str]:
    return [f"{index}_" for index in indices]


def _patches(spec: ConvSpec) -> tuple[Network, list[str]]:
    """The patches for each group, `n g (c k) o`, and the indices of a patch."""
    legs = Legs(spec)
    channel, positions = legs.channels[0], legs.positions[1]
    patches: Network = unfold(spec).split(channel, {"g": spec.groups, channel: None})
    rows = [channel, *legs.kernel]
    return patches.regroup(f"n g ({' '.join(rows)}) {' '.join(positions)}"), rows


def _patches_with_one(spec: ConvSpec) -> tuple[AnyNetwork, list[str]]:
    """The patches, each with a constant 1 appended, `n g d o`, and the index of a patch."""
    patches, rows = _patches(spec)
    positions = Legs(spec).positions[1]
    size = prod(patches.sizes[index] or 0 for index in rows)
    # Entries of a patch are in rows 0 to d − 1 of the joint factor, and the constant 1 is in row d.
    embed = IndexPattern(size + 1, 1, padding=(0, -1), output_size=size)
    last = IndexPattern(size + 1, 1, padding=(-size, 0), output_size=1)
    output = (("n",), ("g",), ("d",), *((index,) for index in positions))
    sizes = {**patches.sizes, "d": size + 1}
    weight = patches.replace(
        nodes=(*patches.nodes, Pattern(embed, (("d",), tuple(rows), ()))), output=output, sizes=sizes
    )
    ones = [Ones(index) for index in ("n", "g", *positions)]
    constant = Network.make([Pattern(last, (("d",), (), ())), *ones], output, sizes)
    return sum_of([weight, constant]), ["d"]


def kfac_input_factor(spec: ConvSpec, approx: Approx = "expand", *, bias: bool = False) -> AnyNetwork:
    """The input-based Kronecker factor: X -> [groups, d, d], d = c_in/groups·ΠK (+ 1 with bias).

    expand (KFC, Ω = 1/N Σ [X][X]ᵀ): `n (g c_in) i, i o k, n (g c_in_) i_, i_ o k_ -> g (c_in k) (c_in_ k_)` ×1/N;
    reduce (patches are first averaged over positions): `o_` in the second copy, ×1/(N·O²). Figure 5 of the paper.

    Args:
        spec: the convolution; if it is transposed, the factor is formed from one patch of the input per output
            position.
        approx: `"expand"` or `"reduce"`.
        bias: whether to append a row and column for the bias, which gives a joint factor for weight and bias.

    Example:
        >>> import lensor
        >>> print(lensor.ops.kfac_input_factor(lensor.ConvSpec(4, 8, (9,), 3)))  # doctest: +NORMALIZE_WHITESPACE
        n^-1 X[n (g c_in) i1] Π1[i1 o1 k1] X[n (g c_in_) i1_] Π1[i1_ o1 k1_]
         -> g (c_in k1) (c_in_ k1_)

    Raises:
        TypeError: if `spec` is not a ConvSpec, or `bias` is not a bool.
        ValueError: if `approx` is unknown.
    """
    require_choice("approx", approx, words(Approx))
    require_type(bias, "bias", bool)
    patches, rows = _patches_with_one(spec) if bias else _patches(spec)
    positions = Legs(spec).positions[1]
    share = ["n", "g", *(positions if approx == "expand" else [])]
    gram = patches.merge(patches, share=share, output=f"g ({' '.join(rows)}) ({' '.join(_copies(rows))})")
    averaged = dict.fromkeys(positions, -2) if approx == "reduce" else {}
    return gram.scaled(1, {"n": -1, **averaged})


def kfac_input_root(spec: ConvSpec) -> Network:
    """The patches averaged over positions, R: X -> [groups, n, d], such that RᵀR is N times the reduce factor.

    Example:
        >>> import lensor
        >>> print(lensor.ops.kfac_input_root(lensor.ConvSpec(4, 8, (9,), 3)))
        1/7 X[n (g c_in) i1] Π1[i1 o1 k1] -> g n (c_in k1)

    Raises:
        TypeError: if `spec` is not a ConvSpec.
    """
    patches, rows = _patches(spec)
    positions = Legs(spec).positions[1]
    root = patches.replace(output=(("g",), ("n",), tuple(rows)))
    return root.scaled(1, dict.fromkeys(positions, -1))


def kfac_output_factor(spec: ConvSpec, approx: Approx = "expand") -> Network:
    """The output-based Kronecker factor: V [v, n, c_out, *output_size] -> [groups, c_out/groups, c_out/groups].

    expand: `v n (g c_out) o, v n (g c_out_) o -> g c_out c_out_` ×1/O; reduce: `o_` in the second copy, ×1.

    Example:
        >>> import lensor
        >>> print(lensor.ops.kfac_output_factor(lensor.ConvSpec(4, 8, (9,), 3), "reduce"))
        V[v n (g c_out) o1] V[v n (g c_out_) o1_] -> g c_out c_out_

    Raises:
        TypeError: if `spec` is not a ConvSpec.
        ValueError: if `approx` is unknown.
    """
    require_choice("approx", approx, words(Approx))
    legs = Legs(spec)
    positions, channel = legs.positions[1], legs.channels[1]
    operand = Operand("V", (("v",), *legs.output))
    vectors = Network.make([operand], operand.legs, {**legs.sizes, "v": None})
    share = ["v", "n", "g", *(positions if approx == "expand" else [])]
    gram = vectors.merge(vectors, share=share, output=f"g {channel} {channel}_")
    return gram.scaled(1, dict.fromkeys(positions, -1)) if approx == "expand" else gram


def _per_example_roots(spec: ConvSpec) -> Network:
    """Jᵀ S for each example and each column of S: `v n (g c_out) c_in k`."""
    return conv_weight_vjp(spec).keep("n").rename_operands(V="S").batch("v", ["S"])


def ggn_diagonal(spec: ConvSpec, per_example: bool = False) -> Network:
    """The diagonal of the weight's GGN: X, S [v, n, c_out, *O] -> weight shape, or [n, *weight shape].

    `n (g c_in) i, i o k, v n (g c_out) o, n (g c_in) i_, i_ o_ k, v n (g c_out) o_ -> (g c_out) c_in k`: the squared
    entries of Jᵀ S, summed over v and n.

    Args:
        spec: the convolution.
        per_example: whether to keep the index n of the examples instead of summing over it.

    Example:
        >>> import lensor
        >>> lensor.ops.ggn_diagonal(lensor.ConvSpec(4, 8, (9,), 3)).operands[:3]
        ('X', IndexPattern(9, 3), 'S')

    Raises:
        TypeError: if `spec` is not a ConvSpec.
    """
    roots = _per_example_roots(spec)
    weight = roots.output[2:]
    legs = weight if not per_example else (("n",), *weight)
    share = ["v", "n", *(index for leg in weight for index in leg)]
    return roots.merge(roots, share=share, output=format_legs(legs))


def ggn_gram(spec: ConvSpec) -> Network:
    """The Gram matrix of the weight's GGN, the layer's empirical NTK: X, S -> [(v n), (w m)].

    The nodes are those of `ggn_diagonal`, with indices w and m in the second copy. The weight's indices are summed.

    Example:
        >>> import lensor
        >>> lensor.ops.ggn_gram(lensor.ConvSpec(4, 8, (9,), 3)).output
        (('v', 'n'), ('w', 'm'))

    Raises:
        TypeError: if `spec` is not a ConvSpec.
    """
    roots = _per_example_roots(spec)
    share = [index for leg in roots.output[2:] for index in leg]
    return roots.merge(roots.rename(v="w", n="m"), share=share, output="(v n) (w m)")


def ggn_mini_blocks(spec: ConvSpec, block: str = "filter") -> Network:
    """Diagonal blocks of the weight's GGN: X, S -> blocks.

    Args:
        spec: the convolution.
        block: `"filter"` for one block per first channel of the weight, `(g c_out) (c_in k) (c_in_ k_)`; `"kernel"` for
            one block per pair of channels, `(g c_out) c_in k k_`; `"position"` for one block per group and kernel
            position, `g k (c_out c_in) (c_out_ c_in_)`.

    Example:
        >>> import lensor
        >>> lensor.ops.ggn_mini_blocks(lensor.ConvSpec(4, 8, (9,), 3), "kernel").output
        (('g', 'c_out'), ('c_in',), ('k1',), ('k1_',))

    Raises:
        TypeError: if `spec` is not a ConvSpec.
        ValueError: if `block` is unknown.
    """
    roots = _per_example_roots(spec)
    kernel = Legs(spec).kernel
    within = {"filter": ["c_in", *kernel], "kernel": kernel, "position": ["c_out", "c_in"]}
    require_choice("block", block, tuple(within))
    rows, k, copies = within[block], " ".join(kernel), " ".join(_copies(within[block]))
    outputs = {
        "filter": f"(g c_out) ({' '.join(rows)}) ({copies})",
        "kernel": f"(g c_out) c_in {k} {copies}",
        "position": f"g {k} ({' '.join(rows)}) ({copies})",
    }
    every = ["v", "n", "g", "c_out", "c_in", *kernel]
    return roots.merge(roots, share=[index for index in every if index not in rows], output=outputs[block])


def hessian_backprop(spec: ConvSpec) -> AnyNetwork:
    """Hessian backpropagation through a convolution (KFRA): W, H [c_out, *O, c_out, *O] -> [c_in, *I, c_in, *I].

    A(W)ᵀ H A(W): `(g c_out) c_in k, i o k, (g c_out) o (g_ c_out_) o_, (g_ c_out_) c_in_ k_, i_ o_ k_ ->
    (g c_in) i (g_ c_in_) i_`, for one example.

    Example:
        >>> import lensor
        >>> lensor.ops.hessian_backprop(lensor.ConvSpec(2, 2, (5,), 3)).operand_names
        ('W', 'H')

    Raises:
        TypeError: if `spec` is not a ConvSpec.
    """
    matrix = convolution_matrix(spec)
    rows, columns = matrix.output[: spec.ndim + 1], matrix.output[spec.ndim + 1 :]
    copies = {index: f"{index}_" for index in matrix.sizes}
    second = matrix.rename(copies)
    both = (*rows, *second.output[: spec.ndim + 1])
    hessian = Network.make([Operand("H", both)], both, {**matrix.sizes, **second.sizes})
    one_side = matrix.merge(hessian, share=_flat(rows), output=format_legs((*columns, *both[spec.ndim + 1 :])))
    shared = [copies[index] for index in _flat(rows)]
    return one_side.merge(second, share=shared, output=format_legs((*columns, *second.output[spec.ndim + 1 :])))


def _flat(legs: Sequence[Group]) -> list[str]:
    return [index for leg in legs for index in leg]


def _squared_jacobian_against(
    jacobian: Network, rows: Sequence[Group], result: Sequence[Group], spec: ConvSpec
) -> Network:
    """Σ_rows J² V: square a Jacobian elementwise and contract its rows with an operand V that has the output's legs."""
    squared = jacobian.merge(jacobian, share=jacobian.output_indices, output=format_legs(jacobian.output))
    legs = Legs(spec).output
    vector = Network.make([Operand("V", legs)], legs, {**Legs(spec).sizes})
    return squared.merge(vector, share=_flat(rows), output=format_legs(result))


def hessian_diagonal_input(spec: ConvSpec) -> Network:
    """The Hessian diagonal backpropagated to the input (BL89, HesScale): W, V [n, c_out, *O] -> [n, c_in, *I].

    This is the input VJP with squared Jacobian entries. With zero padding, A(W)² = A(W²). In other padding modes, two
    kernel positions may read the same input position, so the network contains both patterns, which share i and o.

    Example:
        >>> import lensor
        >>> print(lensor.ops.hessian_diagonal_input(lensor.ConvSpec(2, 2, (5,), 3)).simplify())
        Π1[i1 o1 k1] W[c_out c_in k1] W[c_out c_in k1] V[n c_out o1] -> n c_in i1

    Raises:
        TypeError: if `spec` is not a ConvSpec.
    """
    matrix = convolution_matrix(spec)
    rows, columns = matrix.output[: spec.ndim + 1], matrix.output[spec.ndim + 1 :]
    return _squared_jacobian_against(matrix, rows, (("n",), *columns), spec)


def hessian_diagonal_weight(spec: ConvSpec) -> Network:
    """The Hessian diagonal of the weight (BL89, HesScale): X, V [n, c_out, *O] -> weight shape; [X]² = [X²].

    Example:
        >>> import lensor
        >>> print(lensor.ops.hessian_diagonal_weight(lensor.ConvSpec(2, 2, (5,), 3)).simplify())
        X[n c_in i1] Π1[i1 o1 k1] X[n c_in i1] V[n c_out_ o1] -> c_out_ c_in k1

    Raises:
        TypeError: if `spec` is not a ConvSpec.
    """
    jacobian = conv_weight_jacobian(spec)
    rows, columns = jacobian.output[: spec.ndim + 2], jacobian.output[spec.ndim + 2 :]
    return _squared_jacobian_against(jacobian, rows, columns, spec)
