"""Released checkpoints in and out: reading foreign files safely, key maps, comparison, the hub's layout."""
