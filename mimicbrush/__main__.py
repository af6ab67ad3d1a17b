"""The command line: ``mimicbrush COMMAND ...``, which is also ``python -m mimicbrush COMMAND ...``.

Only the module of the named command is imported, so that help comes at once.
"""

from __future__ import annotations

import sys
from difflib import get_close_matches
from importlib import import_module

from mimicbrush.errors import InputError, cli_main

#: Group -> command -> its module in `mimicbrush.cli`, and what it does.
COMMAND_GROUPS: dict[str, dict[str, tuple[str, str]]] = {
    "Edit": {
        "edit": ("edit", "edit an image by imitating another; or many images, from a list"),
        "app": ("app", "edit in the browser"),
        "paint": ("paint", "paint masks in the browser"),
    },
    "Train": {
        "fetch-clips": ("dev.fetch_clips", "fetch freely licensed clips, with their licences"),
        "mine": ("mine", "mine training pairs from videos and photographs"),
        "pairs": ("pairs", "check a mined folder, export its manifest, write its report again"),
        "fetch": ("fetch", "fetch and check the weights that a training run begins with"),
        "encode-views": ("dev.encode_views", "encode fixed augmentations once, to train from them"),
        "train": ("train", "train a model"),
        "export": ("export", "make a pipeline folder of a checkpoint"),
        "convert": ("convert", "import, export, inspect and compare released checkpoints"),
        "sweep-table": ("dev.sweep_table", "print the results of a sweep"),
    },
    "Measure": {
        "evaluate": ("evaluate", "evaluate an editor on held-out pairs, or several on a benchmark"),
        "benchmark": ("benchmark", "build a benchmark from images and videos"),
        "pck": ("pck", "measure keypoint transfer by the reference attention"),
        "study": ("study", "make a blind user study, and score its answers"),
    },
    "Repeat what comes with the project": {
        "demo": ("dev.demo", "mine rendered clips, fine-tune the small model, edit before and after"),
        "data": ("dev.data", "make the data of the small model"),
        "encoders": ("dev.encoders", "train the frozen networks of the small model"),
        "ablations": ("dev.ablations", "train and compare ablations of the small model"),
    },
}
COMMANDS = {name: command for group in COMMAND_GROUPS.values() for name, command in group.items()}


def main() -> None:
    """Run the command that the command line names."""
    cli_main(lambda: run_command(sys.argv[1:]))


def run_command(arguments: list[str]) -> None:
    """Run one command. It reads its own arguments from ``sys.argv``.

    Args:
        arguments: the name of the command, and what is for the command itself.

    Raises:
        InputError: there is no such command.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(help_text())
        return
    name, *rest = arguments
    if name not in COMMANDS:
        nearest = get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {nearest[0]}? " if nearest else ""
        raise InputError(f"there is no command {name}; {hint}`mimicbrush --help` lists all")
    sys.argv = [f"mimicbrush {name}", *rest]
    import_module(f"mimicbrush.cli.{COMMANDS[name][0]}").main()


def help_text() -> str:
    """List all commands, one a line."""
    width = max(map(len, COMMANDS))
    lines = ["usage: mimicbrush COMMAND ...", "", "`mimicbrush COMMAND --help` shows the options of a command."]
    for title, group in COMMAND_GROUPS.items():
        lines += ["", f"{title}:", *(f"  {name:{width}}  {meaning}" for name, (_, meaning) in group.items())]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
