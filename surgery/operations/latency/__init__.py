"""bench and compare: measure the cost of a model at inference."""
