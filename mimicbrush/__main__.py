"""The command line: ``mimicbrush COMMAND ...``, which is also ``python -m mimicbrush COMMAND ...``.

Only the module of the named command is imported, so that help appears at once.
"""

from __future__ import annotations

import sys
from difflib import get_close_matches
from importlib import import_module

from mimicbrush.errors import InputError, cli_main

#: Group -> command -> its module in `mimicbrush.cli`, and what it does.
COMMAND_GROUPS: dict[str, dict[str, tuple[str, str]]] = {
    "Edit": {
        "edit": ("edit", "edit an image by imitating another, or edit many images from a list"),
        "app": ("app", "edit in the browser"),
        "paint": ("paint", "paint masks for a folder of images in the browser"),
    },
    "Train": {
        "fetch-clips": ("dev.fetch_clips", "download freely licensed video clips, with their licences"),
        "mine": ("mine", "mine training pairs from videos and photographs"),
        "pairs": ("pairs", "verify, export or report on a folder of mined pairs"),
        "fetch": ("fetch", "download and check the weights that a training run starts from"),
        "encode-views": ("dev.encode_views", "encode fixed augmentations of all pairs once, for faster training"),
        "train": ("train", "train or fine-tune a model"),
        "export": ("export", "turn a checkpoint into a pipeline folder"),
        "convert": ("convert", "import, export, inspect and compare weights of other formats"),
        "sweep-table": ("dev.sweep_table", "print the results of a sweep of training runs"),
    },
    "Measure": {
        "evaluate": ("evaluate", "evaluate an editor on held-out pairs, or several editors on a benchmark"),
        "benchmark": ("benchmark", "build a benchmark from images and videos"),
        "pck": ("pck", "measure how well the reference attention finds corresponding points"),
        "study": ("study", "make a blind user study, and score the answers"),
    },
    "Reproduce the results of the project": {
        "demo": ("dev.demo", "render and mine clips, fine-tune the small model, compare edits before and after"),
        "data": ("dev.data", "make the training data of the small model"),
        "encoders": ("dev.encoders", "train the frozen networks of the small model"),
        "ablations": ("dev.ablations", "train and compare ablations of the small model"),
    },
}
COMMANDS = {name: command for group in COMMAND_GROUPS.values() for name, command in group.items()}


def main() -> None:
    """Run the command named on the command line."""
    cli_main(lambda: run_command(sys.argv[1:]))


def run_command(arguments: list[str]) -> None:
    """Run one command, which reads its own arguments from ``sys.argv``.

    Args:
        arguments: the name of the command, and its arguments.

    Raises:
        InputError: there is no such command.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(help_text())
        return
    name, *rest = arguments
    if name not in COMMANDS:
        nearest = get_close_matches(name, COMMANDS, n=1)
        hint = f"Did you mean {nearest[0]!r}? " if nearest else ""
        raise InputError(f"there is no command {name!r}. {hint}`mimicbrush --help` lists all commands.")
    sys.argv = [f"mimicbrush {name}", *rest]
    import_module(f"mimicbrush.cli.{COMMANDS[name][0]}").main()


def help_text() -> str:
    """List all commands, one per line."""
    width = max(map(len, COMMANDS))
    lines = [
        "usage: mimicbrush COMMAND [ARGUMENT ...]",
        "",
        "Edit an image by imitating another one: zero-shot image editing with reference imitation.",
        "",
        "  mimicbrush edit REFERENCE.jpg SOURCE.jpg MASK.png    (writes SOURCE_edited.png)",
        "",
        "`mimicbrush COMMAND --help` explains the options of a command.",
    ]
    for title, group in COMMAND_GROUPS.items():
        lines += ["", f"{title}:", *(f"  {name:{width}}  {meaning}" for name, (_, meaning) in group.items())]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
