"""One training run: recipe, presets, techniques, the two batch loops, checkpoints, history."""
