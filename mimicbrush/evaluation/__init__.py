"""Does a model imitate? Held-out pairs, the reference gain, baselines, and sheets to look at."""
