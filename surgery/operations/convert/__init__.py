"""convert: dialects and containers."""
