"""convert: rewrites adapters in another dialect, and files in another container."""
