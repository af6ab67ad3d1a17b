"""Pure functions on arrays and tensors; whatever is random is passed in.

In reading order:

* `geometry`: one 3 x 3 matrix for all geometry of a sample, and the warp.
* `color_jitter`: colour jitter as one affine map of RGB.
* `masks`: the mask strategies.
* `canvas`: letterbox, blanking, paste-back, and tensors; jitter and warp of a whole batch, on any device.
* `crops`: boxes, and the place of an image on the canvas; unlike `canvas`, it needs neither OpenCV nor torch.
* `counter_rng`: random numbers by key.
* `keypoints`: SIFT and ORB keypoints, and their matches.
* `similarity`: SSIM, PSNR, sharpness and near duplicates.
* `rle`: segments as COCO run lengths.
* `pillow_resize`: Pillow's bicubic resize on any device, bit for bit.
* `correspondence`: which place of the reference filled which place of the source.
* `reference_maps`: where in the references each masked place looked, as maps.
* `plot`: matches, masks and segments over images.
* `contact_sheet`: labelled grids of images.
"""
