"""Editors: anything that repaints the masked part of a source, for held-out pairs and for the benchmark.

Files, in reading order:

* `protocol`: `Editor`, and what it gets and gives back.
* `registry`: opens an editor by the name that it has on a command line.
* `mimicbrush`: a `MimicBrushPipeline`.
* `baselines`: fills without a model, the ground truth, and results of other programs.
* `reference_only`: reference-only attention, nothing trained.
* `diffusers_editors`: Paint-by-Example, and SD inpainting with an IP-Adapter.
* `flux2_klein`: FLUX.2 klein, with a LoRA or untrained.
* `weights`: where public weights lie.
"""
