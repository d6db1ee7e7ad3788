"""The entry point of the command line: `aptvit`, and `python -m aptvit` where no script is installed."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line; without the libraries that it needs, one line and exit code 2."""
    try:
        from aptvit import cli
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        print("aptvit: the commands need typer and rich: pip install 'aptvit[cli]'", file=sys.stderr)
        raise SystemExit(2) from None
    cli.main()


if __name__ == "__main__":
    main()
