# SPDX-License-Identifier: MIT
"""The `internimage` command. It reads its arguments first, and loads torch and timm, which takes seconds, after that.

`import internimage` loads both, because it registers the models with timm. This module stands beside the package, so
that it can tell the package before it is imported that the command line imports it.
"""

import sys

starting = False  # while the command imports the package; never in a program that imports it


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    global starting
    try:
        starting = True
        try:
            from internimage.cli import main as run
        finally:
            starting = False
        return run(argv)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
