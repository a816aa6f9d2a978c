"""Names, scales and sizes of a diagram as TeX."""

from __future__ import annotations

import re
import unicodedata

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_DIGITS = {raised: plain for plain, raised in _SUPERSCRIPTS.items()}

_COMMANDS = (
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi pi varpi rho varrho"
    " sigma varsigma tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega"
    " times rightarrow cdot ldots ell"
)
_LETTERS = "αβγδϵεζηθϑικλμνξπϖρϱσςτυϕφχψωΓΔΘΛΞΠΣΥΦΨΩ×→·…ℓ"
_MATHS = {letter: "\\" + command for letter, command in zip(_LETTERS, _COMMANDS.split(), strict=True)}
_GREEK = {command: _LETTERS[at] for at, command in enumerate(_COMMANDS.split()) if _LETTERS[at].isalpha()}
"""Greek letters by their names in TeX."""

# TeX has no commands for Greek capitals that look like Latin ones.
_MATHS |= {greek: rf"\mathrm{{{latin}}}" for greek, latin in zip("ΑΒΕΖΗΙΚΜΝΟΡΤΧ", "ABEZHIKMNOPTX", strict=True)}
_MATHS |= {mark: "\\" + mark for mark in "_&%#${}"}
_MATHS |= {"ο": "o", "−": "-", "\\": r"\backslash", "^": r"\hat{}", "~": r"\sim", "\u00b5": r"\mu"}
"""Characters for which TeX's math mode needs a command."""

_ACCENTS = {
    "\u0300": r"\grave",
    "\u0301": r"\acute",
    "\u0302": r"\hat",
    "\u0303": r"\tilde",
    "\u0304": r"\bar",
    "\u0306": r"\breve",
    "\u0307": r"\dot",
    "\u0308": r"\ddot",
    "\u030a": r"\mathring",
    "\u030c": r"\check",
}


def raised(power: int) -> str:
    """A number in superscript characters.

    Example:
        >>> from lensor.draw.tex import raised
        >>> raised(-12)
        '⁻¹²'
    """
    return str(power).translate(_SUPERSCRIPTS)


def tex(text: str, renaming: str) -> str:
    r"""Convert text for TeX, with each word in math mode.

    Text after an underscore, and digits at the end of a name, become subscripts; underscores at the end become primes.

    Args:
        text: names, a scale, or sizes.
        renaming: the method that renames such names, for the error message.

    Example:
        >>> from lensor.draw.tex import tex
        >>> print(tex("-1/2 c_out⁻¹ ×", "rename"))
        $-\frac{1}{2}$ $c_{\mathrm{out}}^{-1}$ $\times $
        >>> print(tex("Π2 k1_ weight", "rename"))
        $\Pi _{2}$ $k_{1}'$ $\mathrm{weight}$

    Raises:
        ValueError: for a character that TeX does not support.
    """
    return " ".join(f"${_word(word, renaming)}$" for word in text.split())


def _word(word: str, renaming: str) -> str:
    base = word.rstrip("".join(map(chr, _DIGITS)))
    power = word[len(base) :].translate(_DIGITS)
    power = f"^{{{power}}}" if power else ""
    if ratio := re.fullmatch(r"([-−]?)(\d+)/(\d+)", base):
        return rf"{'-' * bool(ratio[1])}\frac{{{ratio[2]}}}{{{ratio[3]}}}{power}"
    try:
        if re.fullmatch(r"[^\W\d_]+(-[^\W\d_]+)+", base):  # the name of a step, where - is not a minus sign
            return r"\mbox{-}".join(map(_upright, base.split("-")))
        return (_name(base) if base.isidentifier() else _letters(base)) + power
    except KeyError as error:
        letter = error.args[0]
        name = unicodedata.name(letter, "a character without a name")
        raise ValueError(
            f"character {letter!r} ({name}) in {base!r} is unknown to TeX, expected Latin or Greek letters: rename it,"
            f" as in net.{renaming}({base}='x'), or save the diagram as .svg or .png"
        ) from None


def parts_of(word: str) -> tuple[str, list[str], int]:
    """The letters of a name, its subscripts, and its number of primes; the name of a Greek letter is that letter.

    Example:
        >>> from lensor.draw.tex import parts_of
        >>> parts_of("c_in_"), parts_of("k1"), parts_of("9"), parts_of("alpha")
        (('c', ['in'], 1), ('k', ['1'], 0), ('9', [], 0), ('α', [], 0))
    """
    stem = word.rstrip("_")
    parts = stem.split("_")
    if not word.isidentifier() or not all(parts):
        return word, [], 0
    head = parts[0].rstrip("0123456789")
    below = [*([parts[0][len(head) :]] if head != parts[0] else []), *parts[1:]]
    return _GREEK.get(head, head), below, len(word) - len(stem)


def width_of(text: str, letter: float = 6.2) -> float:
    """The width in points of names that are set as mathematics."""
    width = letter * 0.6 * text.count(" ") + 2.0
    for word in text.split():
        head, below, primes = parts_of(word)
        width += letter * (len(head) + 0.72 * len(",".join(below)) + 0.5 * primes)
    return width


def _name(name: str) -> str:
    head, below, primes = parts_of(name)
    subscript = f"_{{{','.join(map(_upright, below))}}}" if below else ""
    return _upright(head) + subscript + "'" * primes


def _upright(text: str) -> str:
    """Set several letters as a word, and a single letter as a variable."""
    letters = _letters(text)
    return letters if len(text) == 1 or text.isdigit() else rf"\mathrm{{{letters}}}"


def _letters(text: str) -> str:
    """The characters in math mode; KeyError for a character that TeX does not support."""
    found: list[str] = []
    for letter in unicodedata.normalize("NFD", text):
        if letter in _ACCENTS and found:
            found[-1] = f"{_ACCENTS[letter]}{{{found[-1]}}}"
        elif letter in _MATHS:
            found.append(_MATHS[letter] + " " * _MATHS[letter][-1].isalpha())
        elif letter.isascii():
            found.append(letter)
        else:
            raise KeyError(letter)
    return "".join(found)
