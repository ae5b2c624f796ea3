"""merge, unmerge and verify: add adapters to weights, take them off again, check a merge."""
