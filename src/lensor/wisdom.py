"""Measured times of plans, stored in this process and, on request, in a file.

`planning(effort="measure")` times the candidates for a network once. The times are stored here, so a plan that was
dropped from the cache need not be measured again. If you save them to a file, other processes can reuse them. A file
may contain times for several machines, devices and thread counts: each entry states where it was measured and applies
only there.

Example:
    >>> import lensor, tempfile, pathlib
    >>> path = pathlib.Path(tempfile.mkdtemp(), "wisdom.json")
    >>> with lensor.planning(effort="measure"):
    ...     plan = lensor.ops.unfold(lensor.ConvSpec(2, 4, (5,), 3)).plan(X=(3, 2, 5))
    >>> saved = lensor.wisdom.save(path)
    >>> lensor.wisdom.forget()
    >>> lensor.wisdom.load(path) == saved
    True
"""

from lensor.planner.wisdom import Measured, WisdomError, WisdomWarning, entries, forget, load, save

__all__ = ["Measured", "WisdomError", "WisdomWarning", "entries", "forget", "load", "save"]
