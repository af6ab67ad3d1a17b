"""Exports mined pairs as datasets for other trainers: target, source with its hole, references, mask and caption.

In reading order:

* `run`: exports a mined folder from end to end, and continues an earlier run that was stopped.
* `options`: the options that decide the content of an export.
* `plan`: plans which pairs are exported, and in which split and part.
* `samples`: makes the samples of a pair as training sees them, and encodes their files.
* `formats/`: names of the files for each trainer, and the lists that it reads.
* `parts`: writes the files of a part, and then its marker.
* `lists`: writes lists of samples, licences and counts after the parts.
* `verify`: reads an export again, and lists its faults.
"""
