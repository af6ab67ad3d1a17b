"""Edits from files.

In reading order; the first four import no torch:

* ``requests`` - which edits a folder or a list asks for, and where each result goes
* ``inputs`` - the images of one edit, read and checked
* ``batch`` - many edits, one after the other
* ``editor`` - the model that makes them, loaded when the first edit needs it
* ``contact_sheet`` - the edits side by side
* ``reference_part`` - which part of the reference an edit looked at
* ``auto_zoom`` - edit again with that part alone
"""
