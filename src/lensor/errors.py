"""Errors that Lensor raises beyond the built-in TypeError and ValueError."""


class LensorError(Exception):
    """Base of the errors that are Lensor's own; each also subclasses a built-in error."""


class SubscriptsError(LensorError, ValueError):
    """Subscripts or a network's text that do not parse; the message has a caret under the place.

    Args:
        reason: what is wrong there.
        text: the whole text.
        position: offset of the offending place in `text`.
    """

    def __init__(self, reason: str, text: str, position: int) -> None:
        self.reason, self.text, self.position = reason, text, position
        # The caret stands under the line that the place is in, behind the tabs that this line has.
        end = text.find("\n", position)
        shown = (text if end < 0 else text[:end]).split("\n")
        before = text[:position].rpartition("\n")[2]
        shown.append("".join("\t" if mark == "\t" else " " for mark in before) + "^")
        super().__init__("\n".join([reason, *(f"  {line}" for line in shown)]))

    def __reduce__(self) -> tuple:
        return SubscriptsError, (self.reason, self.text, self.position)


class NetworkError(LensorError, ValueError):
    """A network, or the arguments of a transform, that break the grammar of `Network.check`."""
