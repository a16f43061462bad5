"""From weights to codes, by rounding alone: which range of codes, and which code."""
