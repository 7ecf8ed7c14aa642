# SPDX-License-Identifier: MIT
"""InternImage-T on the CPU against its peers: `internimage benchmark models`, for a clone that is not installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from internimage.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(["benchmark", "models", *sys.argv[1:]]))
