"""A model that is opened once: its file, its config.json, and what both say about its weights.

The object is passed on, so that no code below opens a path again. Knows no adapter and no operation.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from formats.checkpoint import Checkpoint
from formats.destination import Destination, destination_like
from formats.model_config import CONFIG, config_file, parsed_config
from formats.open_files import OpenFiles
from formats.quantized import quantization_config
from formats.spec import TensorSpec
from surgery.model.meta_model import known_names, may_rename, meta_model


@dataclass(frozen=True)
class BaseModel:
    """A model: a file of weights, or a folder with weights and a config.json.

    Attributes:
        path: the path as the caller gave it.
        checkpoint: its tensors.
        files: the open files through which it was opened.
    """

    path: Path
    checkpoint: Checkpoint
    files: OpenFiles

    @classmethod
    def open(cls, path: str | Path, files: OpenFiles) -> BaseModel:
        """Opens a model's headers; config.json is read on first use. Raises as `open_checkpoint`."""
        return cls(Path(path), files.checkpoint(path), files)

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Every tensor of its file, by name."""
        return self.checkpoint.specs

    @property
    def folder(self) -> Path:
        """The folder of its config.json, if it has one."""
        return self.path if self.path.is_dir() else self.path.parent

    @cached_property
    def config_file(self) -> Path | None:
        """The path of its config.json; None without one."""
        return config_file(self.path)

    @cached_property
    def config_content(self) -> bytes | None:
        """Its config.json as stored; None without one."""
        return None if self.config_file is None else self.files.content(self.config_file)

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """Its config.json; empty without one. Raises CorruptFile if it is not a JSON object."""
        if self.config_file is None or self.config_content is None:
            return {}
        return parsed_config(self.config_content, self.config_file)

    @property
    def quantization(self) -> Mapping[str, Any]:
        """The quantisation settings of its config; empty if there are none."""
        return quantization_config(self.config)

    @cached_property
    def module(self) -> Any:
        """The model as transformers builds it on the meta device; None if transformers cannot build it."""
        return meta_model(self.config) if self.config else None

    @cached_property
    def names(self) -> dict[str, str]:
        """File name → new name, for each tensor that transformers renames on loading."""
        known = known_names(self.module, self.specs)[0] if self.module is not None else {}
        return {name: new for name, new in known.items() if new != name}

    @property
    def renames(self) -> bool:
        """Whether transformers may rename tensors of this model on loading; cheap to call."""
        return may_rename(self.config)

    def tied_head(self, specs: Mapping[str, TensorSpec] | None = None) -> dict[str, str]:
        """The head tensor that the file lacks → the embedding tensor that it is tied to, by the file's names.

        Empty if no head is tied, or if transformers does not know the model.

        Args:
            specs: the tensors of the planned output; by default those of this file.
        """
        specs = self.specs if specs is None else specs
        tied = getattr(self.module, "all_tied_weights_keys", None)
        if not isinstance(tied, Mapping):
            return {}
        output = self.module.get_output_embeddings()
        heads = {f"{name}.weight" for name, module in self.module.named_modules() if module is output}
        stored = {known: name for name, known in known_names(self.module, specs)[0].items()}
        return {
            head: stored[source]
            for head, source in tied.items()
            if head in heads and head not in specs and source in stored
        }

    def destination(
        self,
        out: str | Path,
        specs: Iterable[TensorSpec],
        *,
        inputs: Iterable[str | Path],
        force: bool,
        max_shard: int | None = None,
    ) -> Destination:
        """A destination with this model's layout, as `destination_like`; a folder gets config.json as an attachment."""
        found = destination_like(
            self.path, out, specs, inputs=inputs, force=force, files=self.files, max_shard=max_shard
        )
        others = tuple(path for path in found.companions if path.name != CONFIG)
        if others == found.companions or self.config_content is None:
            return found
        return replace(found, companions=others, attachments={CONFIG: self.config_content})


def with_config(destination: Destination, config: Mapping[str, Any]) -> Destination:
    """The destination with config.json replaced."""
    content = json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n"
    return replace(destination, attachments={**destination.attachments, CONFIG: content})
