"""Verification of a mined folder: everything is read again, and nothing is changed.

In reading order:

* `folder`: the whole folder: plan, shards, index and summary.
* `shard`: one shard: its marker, its tar, and each image and segment that its rows name.
"""
