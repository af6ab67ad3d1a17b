"""Mined pairs as datasets for other trainers: target, source with its hole, references, mask and caption.

In reading order:

* `run`: exports a mined folder from end to end; goes on where an earlier run was stopped.
* `options`: what decides the content of an export.
* `plan`: which pairs go where: the split, what is left out, and parts of some pairs.
* `samples`: a pair -> its samples, as training would see them, as files.
* `formats/`: what the files of each trainer are called, and the lists that it reads.
* `parts`: one part: its files, and a marker that is written last.
* `lists`: what is written when the parts are done: lists of samples, licences, counts.
* `verify`: reads an export again, and names what is wrong.
"""
