"""Turns a budget in bytes into a rank for every weight, from the spectra of the changes.

Measures first, because no rank is known before all spectra are; extract then runs with these ranks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace

from formats.dialects.peft_writing import factor_keys, full_key
from formats.open_files import OpenFiles
from formats.spec import TensorSpec
from surgery.operations.extract.measure import plan_measure
from surgery.operations.extract.pairing import Pairing
from surgery.operations.extract.plan import Extraction
from surgery.operations.extract.results import gathered
from surgery.pipeline import engine
from surgery.pipeline.engine import Resources
from surgery.ranks.spectra import Spectrum
from surgery.ranks.spend import header_bytes, spend


def ranks_within(pairing: Pairing, how: Extraction, files: OpenFiles, resources: Resources) -> dict[str, int]:
    """The ranks of all changed weights that hold the most energy within the budget.

    Raises:
        SurgeryError: the budget is smaller than the full tensors and the least rank of every weight.
    """
    ranks, tuned = how.ranks, pairing.tuned.specs
    matrices = {matrix.spec.name: matrix for matrix in pairing.matrices}
    dtypes = {name: ranks.stored or matrix.spec.dtype for name, matrix in matrices.items()}
    full: list[TensorSpec] = []

    def measure(names: Collection[str] | None, known: int) -> Iterable[Spectrum]:
        asked = pairing
        if names is not None:
            asked = replace(pairing, matrices=tuple(matrices[name].alone() for name in names), wholes=())
        plan = plan_measure(asked, known, dtype=ranks.stored, seed=ranks.seed, exact=how.exact)
        found = gathered(engine.run(plan, None, files, resources))
        full.extend(tuned[name] for name in found.full)
        return found.spectra

    def fixed(changed: Collection[str]) -> int:
        """Bytes of the full tensors, the magnitudes, and a header that is long enough for any ranks."""
        specs = [TensorSpec(full_key(spec.name, wrappers=1), spec.dtype, spec.shape) for spec in full]
        for name in changed:
            largest = (matrices[name].spec.size,) * 2  # as a shape, it has more digits than any factor's
            keys = factor_keys(name, matrices[name].kind)
            specs += [TensorSpec(key, dtypes[name], largest) for key in keys]
        magnitudes = 4 * sum(matrices[name].sides[0] for name in changed) if how.method == "dora" else 0
        return sum(spec.nbytes for spec in full) + magnitudes + header_bytes(specs, {})

    return spend(
        ranks,
        tuned,
        measure,
        per_rank=sum(matrix.bytes_per_rank(dtypes[name]) for name, matrix in matrices.items()),
        fixed=fixed,
        paying={name: matrix.break_even for name, matrix in matrices.items()},
    )
