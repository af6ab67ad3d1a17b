"""Pure functions on arrays and tensors; whatever is random is passed in."""
