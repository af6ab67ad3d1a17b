"""Does the model imitate? Held-out pairs, metrics and the reference gain."""
