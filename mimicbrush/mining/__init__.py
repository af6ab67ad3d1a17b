"""Raw videos and images in, shards of pairs and a manifest out."""
