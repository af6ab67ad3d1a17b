"""Held-out pairs: how well an editor restores the masked part of one frame with the help of the other.

Files, in reading order:

* `options`: options of an evaluation, after training and during it.
* `selection`: which pairs are held out, and which of them are taken.
* `samples`: masks, warps, wrong references and noise of each pair.
* `scoring`: one batch, edited with the true, a wrong and no reference, and scored.
* `reference_gain`: scores inside the mask, what a reference gains, and means over pairs.
* `run`: the evaluation; numbers, a line per pair, and contact sheets.
* `report`: files for programs, and sentences for people.
* `showcase`: a few large pairs with a hole that only the reference explains.
* `during_training`: the same evaluation on a few pairs, every so many steps.
* `pairs_sheet`: a contact sheet of mined pairs with their matches.
"""
