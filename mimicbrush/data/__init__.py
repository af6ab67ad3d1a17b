"""Mined pairs in, batches for training out.

In reading order, from a manifest row to a batch:

* `schema`: the columns of a manifest.
* `manifest`: reads the manifest of a mined folder as a table of pairs, and splits it.
* `pair`: one pair: reads its images and segments.
* `options`: the options of the training data, with those of the masks.
* `pair_sources`: one mined folder, or several with weights.
* `training_data`: which origins a model has seen: the file training_data.json.
* `sampler`: which pair is sample number n.
* `transforms`: samples geometry, colours and mask of a pair. The mask strategies are in `mimicbrush.ops.masks`.
* `other_references`: samples the references after the first, other frames of the same shot.
* `custom_masks`: mask strategies of a user's own.
* `encoded_views`: views that are encoded once: writes and reads their folder.
* `dataset`: samples by global number; replaces pairs that cannot be read.
* `batch`: samples -> batches, rendered in the loader or on the model's device.
* `loader`: loads batches in worker processes.
"""
