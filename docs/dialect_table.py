"""What each dialect of adapters can express, found by asking its writer: docs/dialects.md."""

from __future__ import annotations

from collections.abc import Iterator

from formats.adapter import Adapter, AdapterModule, Replacement
from formats.dialects import WRITERS
from formats.dialects.gguf_names import ARCHITECTURES
from formats.dialects.writing import DialectWriter, Wanted
from formats.errors import AdapterFormatError
from formats.layers import LayerKind, owner
from formats.spec import CheckpointRef, DType, TensorRef, TensorSpec

_REF = CheckpointRef("adapter")
# By names that each dialect has a place for: AdapterHub's and llama.cpp's adapt layers of known models only.
_LAYER, _BIAS = (f"encoder.layer.0.output.dense.{tensor}" for tensor in ("weight", "bias"))
_OTHER = "encoder.layer.0.attention.self.query.weight"
_TOKENS = "embeddings.word_embeddings.weight"
_QUERIES, _CONV1D = "model.layers.0.self_attn.q_proj.weight", "transformer.h.0.mlp.c_fc.weight"
_MODELS = {_QUERIES: "LlamaForCausalLM", _CONV1D: "GPT2LMHeadModel"}  # the others are of a BERT


def _factors(**shapes: tuple[int, ...]) -> dict[str, TensorRef]:
    return {
        name.replace("__", "."): TensorRef(_REF, TensorSpec(name, DType.F32, shape)) for name, shape in shapes.items()
    }


_LINEAR, _SQUARE = _factors(lora_A=(2, 12), lora_B=(8, 2)), _factors(lora_A=(2, 8), lora_B=(8, 2))
_CONV = _factors(lora_A=(2, 4, 3, 3), lora_B=(6, 2, 1, 1))
_KERNEL = (6, 4, 3, 3)
_LOHA = _factors(hada_w1_a=(8, 2), hada_w1_b=(2, 12), hada_w2_a=(8, 2), hada_w2_b=(2, 12))
_LOKR = _factors(lokr_w1=(2, 3), lokr_w2_a=(4, 1), lokr_w2_b=(1, 4))
_FUSED = _factors(lora_A=(4, 12), lora_B=(8, 2))


def _module(method: str, kind: LayerKind, factors: dict[str, TensorRef], **more: object) -> AdapterModule:
    settings = {"name": _LAYER, "rank": 2, "alpha": 3.0, **more}
    return AdapterModule(str(settings.pop("name")), method, kind, factors, **settings)  # type: ignore[arg-type]


def _adapters() -> Iterator[tuple[str, tuple[int, ...], list[AdapterModule], list[Replacement]]]:
    """What is adapted, the shape of its weight, and the adapter's modules and tensors in full."""
    linear, conv = LayerKind.LINEAR, LayerKind.CONV
    one = _module("lora", linear, _LINEAR)
    magnitude = _factors(lora_magnitude_vector=(8,))
    bias = _module("lora_bias", linear, _factors(lora_B__bias=(8,)), name=_BIAS)
    yield "LoRA, a linear layer", (8, 12), [one], []
    yield "queries and keys of a Llama", (8, 12), [_module("lora", linear, _LINEAR, name=_QUERIES)], []
    yield "a convolution", _KERNEL, [_module("lora", conv, _CONV)], []
    tokens = _module("lora", LayerKind.EMBEDDING, _LINEAR, name=_TOKENS)
    yield "an embedding", (12, 8), [tokens], []
    turned = _module("lora", LayerKind.TRANSPOSED, _LINEAR, name=_CONV1D)
    yield "a layer that stores (in, out)", (12, 8), [turned], []
    yield "rsLoRA", (8, 12), [_module("lora", linear, _LINEAR, rslora=True)], []
    other = _module("lora", linear, _SQUARE, alpha=5.0, name=_OTHER)
    yield "another alpha for each layer", (8, 12), [one, other], []
    yield (
        "a fused layer of loralib's",
        (16, 12),
        [_module("lora_fused", linear, _FUSED, settings={"enabled": [True, False, True, False]})],
        [],
    )
    yield "DoRA", (8, 12), [_module("dora", linear, {**_LINEAR, **magnitude})], []
    yield "the change of a bias", (8, 12), [one, bias], []
    yield "a bias in full", (8, 12), [one], [Replacement(_BIAS, magnitude["lora_magnitude_vector"], False)]
    yield (
        "LoCon with a core",
        _KERNEL,
        [_module("lora_tucker", conv, _factors(lora_A=(2, 4, 1, 1), lora_mid=(2, 2, 3, 3), lora_B=(6, 2, 1, 1)))],
        [],
    )
    yield "LoHa", (8, 12), [_module("loha", linear, _LOHA)], []
    yield "LoKr", (8, 12), [_module("lokr", linear, _LOKR, rank=1)], []
    scaled = {"settings": {"feedforward": False}, "rank": 1, "alpha": 1.0}
    yield "(IA)³ of outputs, without a bias", (8, 12), [_module("ia3", linear, _factors(ia3_l=(8, 1)), **scaled)], []
    yield "DoRA around LoHa, LoKr or a core", (8, 12), [_module("dora_loha", linear, {**_LOHA, **magnitude})], []
    scaled["settings"] = {"feedforward": True}
    yield "(IA)³ of inputs", (8, 12), [_module("ia3", linear, _factors(ia3_l=(1, 12)), **scaled)], []
    own = _module("lycoris_ia3", linear, _factors(scale=(8,), on_input=()), settings={"on_input": False})
    yield "LyCORIS's (IA)³ of outputs", (8, 12), [own], []
    oft = _module("lycoris_oft", linear, _factors(oft_blocks=(2, 4, 4), alpha=()), settings={"constraint": 0.0})
    yield "LyCORIS's OFT, BOFT, GLoRA", (8, 12), [oft], []
    yield "a whole difference", (8, 12), [_module("full", linear, _factors(diff=(8, 12)))], []


def _cell(writer: DialectWriter, shape: tuple[int, ...], modules: list[AdapterModule], full: list[Replacement]) -> str:
    target = modules[0].target
    specs = {target: shape, f"{owner(target)}.bias": (8,), _OTHER: (8, 8)}
    base = {name: TensorSpec(name, DType.F32, size) for name, size in specs.items()}
    adapter = Adapter(_REF, "any", {}, tuple(modules), tuple(full))
    model = {"architectures": [_MODELS.get(target, "BertModel")], "num_attention_heads": 2}
    try:
        written = writer.write(adapter, {}, Wanted(base, "base", component="unet", model=model))
    except AdapterFormatError as error:
        flag = error.details.get("next", "").rpartition("--drop ")[2]
        return f"`--drop {flag}`" if flag in ("bias", "full") else "refused"
    made = [piece for piece in written.pieces if piece.sources and not piece.is_copy]
    return "computed" if made else "yes"


def dialects() -> str:
    """The table, as Markdown."""
    names = [writer.name for writer in WRITERS]
    lines = [_TEXT, f"| | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for label, shape, modules, full in _adapters():
        lines.append(f"| {label} | {' | '.join(_cell(writer, shape, modules, full) for writer in WRITERS)} |")
    return "\n".join([*lines, _READ.replace("CLASSES", ", ".join(f"`{name}`" for name in ARCHITECTURES))])


_TEXT = """# The dialects of adapters

Generated by asking each dialect's writer (docs/dialect_table.py) by `make docs`; do not edit.

## What `surgery convert --to` writes

Every conversion keeps ΔW, within 1e-6 in float32: [for every pair of dialects and kind of layer](round-trips.md), and as
peft, loralib, LyCORIS and diffusers themselves load it (tests/parity). *yes*: every factor keeps its bytes, under another name or in another shape. *computed*: a factor is
transposed, multiplied, put into blocks or its rows into another order, in float64 and rounded once. *refused*: the
dialect has no place for it; `--drop layer` leaves such layers behind. `--drop`: refused, unless that is to be left
behind.
"""
_READ = """
AdapterHub's library adapts query, key and value and the two layers of the MLP, of BERT-, RoBERTa-, DistilBERT-, ViT-,
GPT-2-, GPT-J- and Llama-like models, and one config rules all layers: a smaller rank is filled up with zeros, another
alpha multiplied into B, a fused layer's A written once for each slice, and what the config reaches beyond the adapter
gets factors that change nothing. Any other layer is refused. It loads our
folders with `use_safetensors=True`. (IA)³ is merged with the bias, as the adapted model has it; the library's own merge
forgets the bias. Its VeRA and DoRA are merged as the adapted model computes them: VeRA with square matrices, DoRA with
the bias scaled and without alpha / r in its norm; neither is any other dialect's.

LyCORIS's (IA)³ learns the difference to 1 and leaves the bias, which peft's scales with the outputs: the two are the same
of inputs, and of layers without a bias. Its OFT and BOFT turn outputs and peft's inputs, its GLoRA multiplies W0 by a
matrix and peft's element by element: refused, but for `--to lora`.

ComfyUI does not read (IA)³, leaves OFT's `rescale` aside and takes a constraint as it stands: refused. It divides DoRA by
the length of the base's weights, where trainers and merge divide by that of the changed ones; convert says so. Its loader
is restated in tests/comfyui_loader.py, by which all else is tested.

Scalings go where a dialect keeps them: a tensor `alpha` for each layer (kohya, LyCORIS, ComfyUI, always float32), ranks
and alphas by pattern (peft, diffusers). loralib's files hold none; the report tells the `lora_alpha` to load them with,
and layers of another alpha get the difference multiplied into B; so do those of a GGUF file, which holds one alpha for all. In ONNX Runtime's (ort) all scalings are in B; its
tensors have the base's dtype, since a graph's inputs have one, and the names of the inputs of
`surgery export-onnx --as inputs`. Of a source's metadata `ss_*` and `modelspec.*` go along, but for hashes of the old
file.

## What is read

By merge, unmerge, verify, inspect and convert.

| | a key | alpha | names |
|---|---|---|---|
| peft | `base_model.model.LAYER.lora_A.weight` | the config's | the model's |
| kohya | `lora_unet_LAYER.lora_down.weight`; `lora_te_`, `lora_te1_`, `lora_te2_`, `lora_te3_`; OneTrainer's `lora_transformer_` | a tensor; without one the rank | dots are underscores: restored from the base's names |
| lycoris | the same, or `lycoris_LAYER.…`: `lora_mid`, `hada_*`, `lokr_*`, `diff`, `diff_b`, `w_norm`, `b_norm`, `dora_scale`, `oft_blocks` and `rescale`, `a1` to `b2`, `weight` beside `on_input` | the same; two whole factors of LoKr are not scaled; OFT's is its constraint | the same |
| diffusers | `unet.LAYER.lora_A.weight`; `transformer.`, `text_encoder.`, `text_encoder_2.`, `text_encoder_3.`; `.lora.down`, `.lora_linear_layer.down`, `.processor.to_q_lora.down` | `lora_adapter_metadata`, or a tensor; without either the rank | the model's |
| comfyui | `diffusion_model.LAYER.lora_up.weight`, or any factor above; `text_encoders.clip_l.transformer.`, `clip_g`, `t5xxl` | a tensor; without one the rank | the model's |
| loralib | `LAYER.lora_A` | told: `--alpha` | the model's |
| gguf | `blk.0.attn_q.weight.lora_a`, LoRA only | `adapter.lora.alpha`; without one, or 0, the rank | gguf's, by the class in the base's config.json |
| ort | `LAYER.lora_A` in an `.onnx_adapter` file | 1: multiplied into B | the model's |
| adapterhub | `LAYER.loras.NAME.lora_A`, `.lora_B`; of (IA)³ `.lora_B` alone | the config's; the rank in files of adapters before 1.1, which scaled so | the model's |

Stable Diffusion's UNet has two sets of names, the original checkpoints' (`input_blocks`) and diffusers' (`down_blocks`).
Adapters of either fit bases of either, SDXL's by kohya's trainer among them; diffusers' files get diffusers' names,
ComfyUI's the original's, kohya's diffusers' but for SDXL's, where its trainer takes both. Flux and SD3 have query, key
and value in one layer on one side and in three on the other: there names do not lead across, and the base must have the
adapter's.

A file of several parts of a pipeline is read for one of them, the base's: `--component unet`. convert takes all at once,
with a base for each: `--base unet=unet/ --base text_encoder=text_encoder/`. `unet` and `transformer`
mean the same where a dialect tells no difference. Without `--base`, convert takes the names and shapes that LoRA's own
factors tell, in dotted names (peft, diffusers, ComfyUI).

What a dialect has no place for can still become a LoRA: `--to lora` truncates the ΔW of any method.

Refused with the reason: DoRA's magnitudes of inputs, LoKr with a whole second factor on a one-dimensional convolution
(LyCORIS and peft put its parts in different places).

## llama.cpp

`--to gguf` writes one `.gguf` file, and needs `--base` with a config.json beside its weights; so does reading one.
llama.cpp keeps a Llama's queries and keys with their rows in pairs, so that `lora_b`'s rows move too, and looks the token
embedding's `lora_a` up by rows. Which weights are changed in such ways follows from the model's class. These are known:
CLASSES. For others nothing is written or read.

float32, float16 and bfloat16 stay; float64 becomes float32. With factors in bfloat16 llama.cpp rounds what it multiplies
them with to bfloat16 too, which moved log-probabilities of a tiny model by 8e-3, with float16 by 7e-4. Refused: biases,
norms and whole tensors, which llama.cpp leaves aside; an embedding that is also the head, on whose factors it aborts;
tables of positions and stacks of experts (all these unless `--drop` leaves them behind); quantised factors; adapters that
single tokens switch on.

llama.cpp itself is the judge: with our file it computes what the merged model does
(tests/parity/test_parity_llamacpp.py). From its convert_lora_to_gguf.py we differ in two points: that takes the config's
`lora_alpha` for every layer, whatever `alpha_pattern` and `use_rslora` say, and it turns the factors of GPT-2's Conv1D,
whose shapes llama-adapter.cpp then refuses.
"""
