"""Mining: from videos and photographs to shards of pairs, a manifest, a report, and datasets for other trainers.

In reading order:

* `run`: mines a folder from end to end.
* `options`: what decides the content of a mined folder.
* `plan`: which files are mined, and in which shard.
* `input_list`: reads a CSV or Parquet list of inputs.
* `clips/`: fetches clips of the web that a list names, with their licences.
* `executors`: mines shards on this machine or on a Ray cluster.
* `shards`: one shard: a tar, a Parquet part, an audit part and a marker.
* `worker_pool`: reads each file in a process that may die.
* `worker`: what such a process does with one file.
* `video/`: reads videos strictly, and finds shots.
* `pair_selection`: chooses the two frames of a pair.
* `segmented_images`: reads photographs with their segments, loose or in a tar.
* `jpeg`: reduces and encodes the frames that are stored.
* `refusals`: the reasons for which a file gives no pair, and which file of this package decides it.
* `summary`: counts what a mined folder holds.
* `export`: writes the manifest as JSON lines.
* `exports/`: writes pairs as data sets of other trainers.
* `report/`: the HTML report of a mined folder.
* `verify/`: reads a mined folder again, and names what is wrong.
"""
