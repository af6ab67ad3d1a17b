"""Files: images, JSON, hashes, and writing without incomplete files.

In reading order:

* `atomic`: writes files and folders aside, then renames them; paths that stay inside a folder.
* `outputs`: asks before work starts whether its results can be written, and keeps what cannot be.
* `locks`: lets one process at a time write into a folder.
* `color_profiles`: colours of ICC profiles, to sRGB and back.
* `download`: fetches files over https, and goes on where an earlier try stopped.
* `hashing`: SHA-256 of files, and quick fingerprints.
* `image_formats`: the quality with which a result is stored; formats that need a package of their own.
* `images`: reads and writes images (EXIF, colours, transparency, 16 bits, damage).
* `jsonl`: logs of one JSON object per line.
* `settings_file`: settings of a folder that is made piece by piece.
* `stored_files`: files of a folder with their sizes and hashes, to see later whether they are the same.
* `text`: makes text of unknown origin fit to be stored and printed; reads it as JSON.
"""
