"""The synthetic text that the built-in model learned from: pure, from seeds."""
