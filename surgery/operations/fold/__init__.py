"""fold: merges adapters into weights as far as this is exact."""
