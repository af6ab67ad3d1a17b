"""All that has weights."""
