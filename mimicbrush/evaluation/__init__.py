"""Evaluation: does a model imitate its reference, and how do editors compare?

Folders and files, in reading order:

* `editors`: one protocol of editors, and all of them behind one registry.
* `heldout`: held-out pairs; what a reference is worth, after training and during it.
* `benchmark`: the paper's four tracks; editors side by side, by the paper's metrics.
* `benchmark_builder`: builds a benchmark from images and videos that no model was trained on.
* `keypoint_transfer`: where the reference attention carries keypoints (PCK).
* `user_study`: a blind study, its page and its scores.
* `ablations`: ablations beside the full model, and beside the directions of the paper.
* `paper_tables`: the numbers that the paper prints.
* `statistics`: bootstrap intervals over whole videos.
"""
