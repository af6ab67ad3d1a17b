"""The layouts of other trainers. Each module names the repository and file that it follows.

A format is one `ExportFormat`. It has a function that names the files of a sample. If the trainer reads a list of
samples, a second function writes that list. A new format needs a module with these, and an entry in `registry`.

* `layout`: defines a format, and the sample that it lays out.
* `diffusers_folder`: an image folder with metadata.jsonl, for the scripts of diffusers.
* `diffsynth`: metadata.json with lists of edit images, for DiffSynth-Studio.
* `ai_toolkit`: folders of control images, for ai-toolkit.
* `onetrainer`: mask and condition files beside the image, for OneTrainer.
* `musubi`: JSON lines with control paths and the dataset TOML, for musubi-tuner.
* `webdataset_tars`: plain tars, for WebDataset.
* `registry`: all formats by name.
"""
