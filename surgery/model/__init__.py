"""A model that was opened: its folder, config, names, layers, and the module that transformers builds of it."""
