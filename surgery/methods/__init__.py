"""The methods, one file each. A new method is a file here and one line in `METHODS`."""

from __future__ import annotations

from formats.adapter import AdapterModule
from surgery.errors import NotMergeable
from surgery.methods.base import AdapterMethod
from surgery.methods.lora import Lora, LoraBias

METHODS: tuple[AdapterMethod, ...] = (Lora(), LoraBias())


def method_of(module: AdapterModule) -> AdapterMethod:
    """The method of an adapted module. Raises NotMergeable for one we do not know."""
    for method in METHODS:
        if method.name == module.method:
            return method
    raise NotMergeable(
        "no such method here", where=module.target, expected=", ".join(m.name for m in METHODS), found=module.method
    )
