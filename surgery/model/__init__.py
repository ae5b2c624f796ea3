"""What is known of a model: its folder, config, names, layers, and the module that transformers builds from it."""
