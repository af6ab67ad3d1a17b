"""Mine training pairs from videos and photographs: `mimicbrush mine`."""

from mimicbrush.cli.mine import main
from mimicbrush.errors import cli_main

if __name__ == "__main__":
    cli_main(main)
