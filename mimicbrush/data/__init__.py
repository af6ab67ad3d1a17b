"""All that yields a TrainBatch: the manifest, the sampler, augmentation and the dataset."""
