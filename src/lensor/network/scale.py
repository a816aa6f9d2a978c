"""The exact scale factor of a network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from lensor.network.nodes import Group


@dataclass(frozen=True, slots=True)
class Scale:
    """A rational number times integer powers of index sizes, e.g. 1/(N·O²) for an unknown batch size N.

    A power refers to the size that its index has in this network. Transforms that shorten an index first replace its
    power by a number.

    Example:
        >>> import lensor
        >>> scale = lensor.contraction("n i -> i", "X").scaled("1/2", {"n": -1}).scale
        >>> scale
        Scale(factor=Fraction(1, 2), powers=(('n', -1),))
        >>> scale * lensor.Scale(powers=(("n", 1),))
        Scale(factor=Fraction(1, 2), powers=())
    """

    factor: Fraction = Fraction(1)
    powers: tuple[tuple[str, int], ...] = ()

    def __mul__(self, other: Scale) -> Scale:
        powers = Counter(dict(self.powers))
        for index, power in other.powers:
            powers[index] += power
        return Scale(self.factor * other.factor, tuple(sorted((i, p) for i, p in powers.items() if p)))

    def relabel(self, mapping: Mapping[str, Group]) -> Scale:
        """Replace each index by a group of indices with the same product of sizes.

        Example:
            >>> import lensor
            >>> lensor.Scale(powers=(("n", -1),)).relabel({"n": ("g", "m")}).powers
            (('g', -1), ('m', -1))
        """
        if not self.powers:
            return self
        scale = Scale(self.factor)
        for index, power in self.powers:
            for new in mapping.get(index, (index,)):
                scale = scale * Scale(powers=((new, power),))
        return scale

    def bind(self, sizes: Mapping[str, int | None]) -> Scale:
        """Evaluate the powers of indices whose sizes are known.

        Example:
            >>> import lensor
            >>> lensor.Scale(powers=(("n", -1), ("v", 1))).bind({"n": 4, "v": None})
            Scale(factor=Fraction(1, 4), powers=(('v', 1),))

        Raises:
            ValueError: for a negative power of an index of size 0.
        """
        if not self.powers:
            return self
        factor, powers = self.factor, []
        for index, power in self.powers:
            size = sizes.get(index)
            if size is None:
                powers.append((index, power))
            elif size == 0 and power < 0:
                raise ValueError(f"index {index!r} has size 0, expected at least 1: the average over it is not defined")
            else:
                factor *= Fraction(size) ** power
        return Scale(factor, tuple(powers))


UNIT = Scale()
"""The factor 1."""
