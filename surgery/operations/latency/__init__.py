"""bench and compare: what a model costs at inference."""
