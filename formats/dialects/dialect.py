"""What a dialect is to the rest: it recognises files, reads them, and says what is special about them.

Inherit from `Dialect` and everything but `name`, `recognises` and `read` has a default. Outside this package nobody
asks which dialect an adapter is in, only what its dialect says here.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from formats.adapter import Adapter, Told
from formats.checkpoint import Checkpoint
from formats.errors import AdapterFormatError
from formats.open_files import OpenFiles
from formats.spec import TensorSpec

if TYPE_CHECKING:
    from formats.dialects.prompts import Whole

NAME_BASE = "name the base: --base"


@runtime_checkable
class Dialect(Protocol):
    """A way of naming an adapter's tensors and config.

    Attributes:
        name: what users call it, in lower case.
        asks: the fields of `Told` that its files do not say and the caller must or may: "alpha", "enable_lora",
            "fan_in_fan_out"; "component" where one file may adapt several parts of a pipeline.
        lays_out_by_weight: whether its products lie as the base's weights do, whatever the layer, so that a layer that
            stores (in, out) is told from the base.
        in_peft_names: whether keys and config are those that peft saves, layers named as the loaded model calls them.
            What such a config says is kept by resize, combine and convert --to lora.
        weights_files: what the file of weights is called in an adapter's folder, the first that is there.
    """

    name: str
    asks: tuple[str, ...] = ()
    lays_out_by_weight: bool = False
    in_peft_names: bool = False
    weights_files: tuple[str, ...] = ()

    @property
    def in_parts(self) -> bool:
        """Whether one file may adapt several parts of a pipeline."""
        return "component" in self.asks

    @abstractmethod
    def recognises(self, checkpoint: Checkpoint, config: Mapping[str, Any] | None) -> bool:
        """Whether these names and this config (None if there is none) are of this dialect."""

    @abstractmethod
    def read(
        self,
        checkpoint: Checkpoint,
        config: Mapping[str, Any] | None,
        base: Mapping[str, TensorSpec],
        names: Mapping[str, str],
        told: Told,
    ) -> Adapter:
        """The adapter, resolved against the base's tensors, some of which the model may call by other `names`.

        What is `told` stands in for a config where the dialect has none.

        Raises:
            AdapterFormatError: keys and config contradict each other, or need what we cannot do.
            UnmatchedKeys: keys that match nothing in the base.
        """

    def implied_base(
        self, checkpoint: Checkpoint, config: Mapping[str, Any] | None, told: Told
    ) -> dict[str, TensorSpec]:
        """The base's tensors that the adapter's own names and shapes imply, for work that needs no base.

        Raises:
            AdapterFormatError: they do not tell.
        """
        raise AdapterFormatError(
            f"{self.name}'s files do not give the names and shapes of the weights that they adapt",
            where=checkpoint.ref.path,
            then=NAME_BASE,
        )

    def has_head(self, adapter: Path) -> bool:
        """Whether a trained head lies beside the adapter's file, so that `head` has something to say."""
        return False

    def head(
        self, adapter: Path, base: Mapping[str, TensorSpec], model: Mapping[str, Any], files: OpenFiles
    ) -> Whole | None:
        """The head beside the adapter's file by the base's names, or why it is left; None where there is none.

        Args:
            adapter: its folder, or its file of weights.
            base: the base's tensors.
            model: the base's config.json; empty without one.
            files: that are open already.

        Raises:
            AdapterFormatError, CorruptFile: half of a head, or a broken one.
        """
        return None

    def described(self, config: Mapping[str, Any] | None) -> Mapping[str, Any]:
        """What `surgery inspect` says of the adapter's settings."""
        return {}
