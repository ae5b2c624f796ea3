"""Methods and dialects that other installed distributions register, by the entry points of a group.

The group's names are read when something is looked up that this distribution does not have; a plugin is imported when
it is looked up itself. Knows no method and no dialect.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from formats.errors import PluginError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

Kinds = tuple[type, ...]
_present: list[tuple[str, str, Any]] = []  # group, name, object: what `present` has put there


@dataclass(frozen=True)
class Plugin:
    """One entry point.

    Attributes:
        group: "surgery.methods" or "surgery.dialects".
        name: the entry point's, which must be the object's own.
        distribution: who registers it, with its version.
        entry: what is loaded.
    """

    group: str
    name: str
    distribution: str
    entry: EntryPoint

    def load(self, kinds: Kinds) -> Any:
        """The object. Imports its module.

        Raises:
            PluginError: it cannot be imported, is none of these `kinds`, or has another name.
        """
        try:
            found: Any = self.entry.load()
        except (Exception, SystemExit) as error:  # whatever a stranger's module raises is reported, with whose it is
            raise self.error("cannot be imported", found=f"{type(error).__name__}: {error}") from error
        if isinstance(found, type) or not isinstance(found, kinds):
            expected = " or ".join(f"{kind.__module__}.{kind.__name__}" for kind in kinds)
            what = f"the class {found.__name__}" if isinstance(found, type) else f"a {type(found).__name__}"
            raise self.error("is none", expected=f"an object whose class inherits from {expected}", found=what)
        name = getattr(found, "name", None)
        if name != self.name:
            raise self.error("has another name than its entry point", expected=self.name, found=str(name))
        return found

    def error(self, what: str, *, expected: str | None = None, found: str | None = None) -> PluginError:
        """The error that says whose plugin this is."""
        kind = self.group.rpartition(".")[2].removesuffix("s")
        return PluginError(
            f"the {kind} {self.name} of {self.distribution} {what}",
            where=f"{self.group}: {self.name} = {self.entry.value}",
            expected=expected,
            found=found,
            then=f"fix {self.distribution}, or uninstall it",
        )


def plugin_named(group: str, name: str, known: Collection[str], kinds: Kinds) -> Any:
    """The object that is registered under a name; None where nobody registers it.

    Args:
        group: of entry points.
        name: of the object.
        known: the names that this distribution has itself.
        kinds: the protocols, one of which the object must fulfil.

    Raises:
        PluginError: as `plugins` and `Plugin.load`.
    """
    for own, each, found in _present:
        if (own, each) == (group, name):
            return found
    return next((plugin.load(kinds) for plugin in plugins(group, known) if plugin.name == name), None)


def every_plugin(group: str, known: Collection[str], kinds: Kinds) -> tuple[tuple[Any, ...], tuple[PluginError, ...]]:
    """All objects of a group that can be loaded, and the errors of the others."""
    found = [each for own, _, each in _present if own == group]
    try:
        registered = plugins(group, known)
    except PluginError as error:
        return tuple(found), (error,)
    errors = []
    for plugin in registered:
        try:
            found.append(plugin.load(kinds))
        except PluginError as error:
            errors.append(error)
    return tuple(found), tuple(errors)


def plugins(group: str, known: Collection[str]) -> tuple[Plugin, ...]:
    """What is registered, in the order of names; imports nothing.

    Raises:
        PluginError: a name that this distribution has itself, or that two others register.
    """
    owners: dict[str, Plugin] = {}
    for plugin in _registered(group):
        if plugin.name in known:
            raise plugin.error("has the name of one of surgery's own", expected="another name", found=plugin.name)
        other = owners.setdefault(plugin.name, plugin)
        if other is not plugin:
            raise plugin.error("is registered twice", found=f"by {other.distribution} too")
    return tuple(owners[name] for name in sorted(owners))


@cache
def _registered(group: str) -> tuple[Plugin, ...]:
    from importlib.metadata import entry_points  # a tenth of a second, which --help need not wait

    found = []
    for entry in entry_points(group=group):
        distribution = f"{entry.dist.name} {entry.dist.version}" if entry.dist else "an unknown distribution"
        found.append(Plugin(group, entry.name, distribution, entry))
    return tuple(found)


@contextlib.contextmanager
def present(group: str, plugin: Any) -> Iterator[None]:
    """Has an object found under its name as if it were installed: for `surgery.testing`, in one process."""
    entry = (group, plugin.name, plugin)
    _present.append(entry)
    try:
        yield
    finally:
        _present.remove(entry)
