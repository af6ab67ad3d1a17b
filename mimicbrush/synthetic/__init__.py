"""Rendered data for the demo, the tests and the small model.

In reading order:

* `dead_leaves`: images of overlapping textured shapes.
* `clips`: clips of a moving camera over photographs or dead leaves, with moving things.
* `small_model_data`: the data that the small model is trained and tested on.
"""
