"""fold: adapters into weights as far as that is exact."""
