"""resize, combine and to_lora: LoRA factors from other adapters."""
