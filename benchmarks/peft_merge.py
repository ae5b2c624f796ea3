"""The peer of merge: PEFT's merge_and_unload and save_pretrained, as its documentation has it."""

from __future__ import annotations

import json
import sys
import time

import torch
from peft import PeftModel
from transformers import LlamaForCausalLM  # by name: the Auto classes would import it within the time below


def main() -> None:
    base, adapter, out = sys.argv[1:4]
    start = time.perf_counter()
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
    print(json.dumps({"seconds": time.perf_counter() - start}))


if __name__ == "__main__":
    main()
