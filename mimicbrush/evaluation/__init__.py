"""Does a model imitate? Held-out pairs, what a reference is worth, baselines, and sheets to look at."""
