"""An opened model: its folder, config, names and layers, and the module that transformers builds from its config."""
