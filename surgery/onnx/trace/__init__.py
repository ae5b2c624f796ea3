"""Makes graphs from torch modules, without their weights."""
