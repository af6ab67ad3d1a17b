"""Keypoint transfer: methods carry keypoints of one image to another, and PCK counts how many arrive.

Files, in reading order:

* `tasks`: pairs of images with keypoints whose places in both are known.
* `homographies`: tasks from photographs that are warped, and from real images of planes.
* `attention`: keypoints carried by the reference attention.
* `attention_maps`: that attention, recorded by layer and by third of the steps.
* `methods`: other methods: features, the same place, chance.
* `pck`: the percentage of correct keypoints, and its tables.
* `transfer_plot`: plots of carried keypoints.
"""
