"""merge, unmerge and verify: adapters into weights, and off them again."""
