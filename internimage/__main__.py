# SPDX-License-Identifier: MIT
"""`python -m internimage`."""

import sys

from .cli import main

sys.exit(main())
