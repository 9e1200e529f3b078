"""What tyro shows of a command's docstring."""

import inspect
import re
from collections.abc import Callable


def unwrapped(command: Callable[..., None]) -> Callable[..., None]:
    """The command, each argument of its docstring on one line: in its help tyro keeps a function's breaks."""
    function = inspect.unwrap(command)
    function.__doc__ = re.sub(r"\n {8,}", " ", inspect.cleandoc(function.__doc__ or ""))
    return command
