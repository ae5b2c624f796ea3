"""The laws that every method and every dialect keeps, for whoever writes one: docs/extending.md.

    from surgery.testing import check_dialect, check_method

Both run on small random data, need neither pytest nor an installed plugin, and raise AssertionError with what, where,
expected and found.
"""

from surgery.testing.dialects import check_dialect
from surgery.testing.methods import check_method

__all__ = ["check_dialect", "check_method"]
