"""The benchmark builder: inner-ID and inter-ID cases from images and videos that no model was trained on.

Files, in reading order:

* `options`: what to build from, and how.
* `build`: from options to a finished benchmark.
* `materials`: images with their facts and rights, and regions on them.
* `inner_id`: pairs of one instance in two scenes.
* `inter_id`: pairs of two subjects of one class.
* `part_boxes`: boxes of a part that two images both show.
* `contamination`: checks that nothing was trained on.
* `licences`: author, licence and address of each image.
"""
