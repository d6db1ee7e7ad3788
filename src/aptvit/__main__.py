"""python -m aptvit: the command line, where no script is installed."""

from aptvit.cli import main

if __name__ == "__main__":
    main()
