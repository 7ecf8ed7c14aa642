# SPDX-License-Identifier: MIT
"""The `internimage` command. It parses its arguments before it loads torch and timm, which takes seconds.

`import internimage` loads both, because it registers the models with timm. This module is outside of the package, so
that it can set `starting`, from which the package knows that the command line imports it.
"""

import sys

starting = False  # true while the command imports the package, never in a program that imports this module


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
