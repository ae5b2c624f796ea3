"""Makes graphs from torch modules, without weights."""
