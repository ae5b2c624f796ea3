"""What the checks of methods and dialects share: how a broken law is reported, and how a refusal is asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from formats.errors import ReportedError
from formats.plugins import present


def broken(what: str, where: object, *, expected: object = None, found: object = None) -> NoReturn:
    """Raises AssertionError: the law, where it is broken, and the two sides."""
    raise AssertionError(str(ReportedError(what, where=where, expected=expected, found=found)))


def refusal(action: Callable[[], object], what: str, where: object) -> ReportedError:
    """The error with which something is refused.

    Raises:
        AssertionError: nothing is refused, or by an error that no person is meant to read.
    """
    try:
        action()
    except ReportedError as error:
        return error
    except Exception as error:
        broken(
            f"{what} ends in a traceback", where, expected="a ReportedError", found=f"{type(error).__name__}: {error}"
        )
    broken(f"{what} is not refused", where, expected="a ReportedError")


@contextlib.contextmanager
def installed(group: str, plugin: Any, ours: dict[str, Any]) -> Iterator[None]:
    """Has a plugin found under its name, whether it is installed or not. One of `ours` is found anyway."""
    own = ours.get(plugin.name)
    if type(own) is type(plugin):
        yield
        return
    if own is not None:
        broken("the name is taken", plugin.name, expected="another name", found=f"surgery's {type(own).__name__}")
    with present(group, plugin):
        yield
