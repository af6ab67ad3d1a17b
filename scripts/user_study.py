"""Make a blind user study, and score its answers: `mimicbrush study`."""

from mimicbrush.cli.study import main
from mimicbrush.errors import cli_main

if __name__ == "__main__":
    cli_main(main)
