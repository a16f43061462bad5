"""How good a model is as it runs here: perplexity, distance from a reference, right answers."""
