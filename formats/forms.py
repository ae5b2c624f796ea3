"""How to read and write each container that stores every tensor contiguously: all containers except torch's."""

from __future__ import annotations

from collections.abc import Mapping

from formats.containers import Container
from formats.gguf_file import GGUF
from formats.ort_file import ORT
from formats.plain_file import Form
from formats.safetensors_file import SAFETENSORS

FORMS: Mapping[Container, Form] = {Container.SAFETENSORS: SAFETENSORS, Container.GGUF: GGUF, Container.ORT: ORT}
