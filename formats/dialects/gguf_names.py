"""llama.cpp's names of a model's weights, and the weights whose rows it reorders.

The names are those of the gguf package, by architecture. What else llama.cpp's conversion (convert_hf_to_gguf.py,
conversion/) does to a weight depends on the model's class: `ARCHITECTURES` lists the classes that were checked there.
This module knows no factors.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from formats.errors import AdapterFormatError
from formats.gguf_file import gguf_package
from formats.layers import LayerKind, owner

TOKENS, HEAD = "token_embd.weight", "output.weight"
# Lookup tables and layers whose weights llama.cpp has, but to which it applies no adapter.
_UNADAPTED = re.compile(r"^(position_embd|token_types|cls|blk\.\d+\.ffn_gate_inp_shexp)\b|_norm\.weight$")
_CONV1D = (".c_attn", ".c_proj", ".c_fc")
_PAIRED = re.compile(r"^blk\.\d+\.attn_(?P<which>[qk])\.weight$")


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp converts a model class.

    Attributes:
        name: llama.cpp's name of the architecture.
        strip, add: prefix that is removed from the file's names, or added to them, to look up gguf's names.
        pairs: whether the rows of queries and keys are reordered into pairs (LlamaModel.permute).
        turned: name endings of the layers that the model stores as (in, out).
        lacks: name parts of the weights that the conversion leaves out or cuts.
        encoder: whether the model has no head, so that none can be tied to the embedding.
    """

    name: str
    strip: str = ""
    add: str = ""
    pairs: bool = False
    turned: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    encoder: bool = False

    def kind(self, weight: str, target: str) -> LayerKind:
        """How the model stores a weight, given gguf's name and the model's own."""
        if weight == TOKENS:
            return LayerKind.EMBEDDING
        return LayerKind.TRANSPOSED if owner(target).endswith(self.turned) else LayerKind.LINEAR

    def heads(self, weight: str, config: Mapping[str, Any], rows: int) -> int:
        """Number of heads within which the rows of a weight, by gguf's name, are reordered into pairs; 0 if they are
        not.

        Raises:
            AdapterFormatError: config.json lacks the number, or the number does not divide the rows.
        """
        match = _PAIRED.match(weight)
        if not self.pairs or match is None:
            return 0
        heads = config.get("num_attention_heads")
        if match["which"] == "k":
            heads = config.get("num_key_value_heads") or heads
        if type(heads) is not int or heads < 1 or rows % (2 * heads):
            raise AdapterFormatError(
                "config.json's number of heads does not divide the weight's rows",
                where=weight,
                expected=f"heads with an even number of rows, {rows} rows in all",
                found=heads,
                then="check that config.json belongs to this base",
            )
        return heads


_BERT = Architecture("bert", strip="bert.", lacks=("pooler.", "cls.", "classifier"), encoder=True)
# Gemma's head is tied to its embedding; Gemma 3's embedding is cut to the size of the tokenizer's vocabulary.
_GEMMA = ("lm_head.",)
ARCHITECTURES = {
    "LlamaForCausalLM": Architecture("llama", pairs=True),
    "LlamaModel": Architecture("llama", add="model.", pairs=True),
    "MistralForCausalLM": Architecture("llama", pairs=True),
    "MixtralForCausalLM": Architecture("llama", pairs=True),
    "GraniteForCausalLM": Architecture("granite", pairs=True),
    "Qwen2ForCausalLM": Architecture("qwen2"),
    "Qwen2Model": Architecture("qwen2", add="model."),
    "Qwen3ForCausalLM": Architecture("qwen3"),
    "Qwen3Model": Architecture("qwen3", add="model."),
    "Qwen2MoeForCausalLM": Architecture("qwen2moe"),
    "Qwen3MoeForCausalLM": Architecture("qwen3moe"),
    "GemmaForCausalLM": Architecture("gemma", lacks=_GEMMA),
    "Gemma2ForCausalLM": Architecture("gemma2", lacks=_GEMMA),
    "Gemma3ForCausalLM": Architecture("gemma3", lacks=(*_GEMMA, "embed_tokens.")),
    "PhiForCausalLM": Architecture("phi2"),
    "Phi3ForCausalLM": Architecture("phi3"),
    "GPT2LMHeadModel": Architecture("gpt2", turned=_CONV1D),
    "BertModel": _BERT,
    "BertForMaskedLM": _BERT,
}


def architecture_of(config: Mapping[str, Any], where: object) -> Architecture:
    """The architecture of a base, by the class that its config.json names.

    Raises:
        AdapterFormatError: there is no config.json, or llama.cpp's conversion of this class was not checked.
    """
    classes = config.get("architectures")
    name = str(classes[0]) if isinstance(classes, list) and classes else ""
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    if not name:
        raise AdapterFormatError(
            "llama.cpp's names and order of rows depend on the base's class, which is not given",
            where=where,
            expected="a config.json with `architectures` next to the base's weights",
            then="name the base's folder (convert --base), or put its config.json next to the weights' file",
        )
    known = config.get("model_type") in gguf_package().MODEL_ARCH_NAMES.values()
    raise AdapterFormatError(
        f"llama.cpp {'knows such models, but ' if known else ''}may store the weights of this class in another order, "
        "and that order is not known here",
        where=where,
        expected=", ".join(ARCHITECTURES),
        found=name,
        then="use llama.cpp's own convert_lora_to_gguf.py, or surgery merge",
    )


def gguf_names(architecture: Architecture, base: Collection[str]) -> dict[str, str]:
    """gguf's names of the base's weights to which llama.cpp applies adapters, by their names in the base."""
    gguf = gguf_package()
    numbers = [int(part) for name in base for part in name.split(".") if part.isdigit()]
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    table = gguf.get_tensor_name_map(kind, max(numbers, default=0) + 1)
    lacks = tuple(f".{part}" for part in architecture.lacks)
    found: dict[str, str] = {}
    for name in base:
        inner = name.removeprefix(architecture.strip)
        if not name.endswith(".weight") or any(part in f".{inner}" for part in lacks):
            continue
        known = table.get_name(owner(inner)) or table.get_name(architecture.add + owner(inner))
        if known is not None and not _UNADAPTED.search(f"{known}.weight"):
            found[name] = f"{known}.weight"
    return found
