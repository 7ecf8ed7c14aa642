# SPDX-License-Identifier: MIT
"""`internimage ARGUMENTS` in a folder: in_folder.py FOLDER ARGUMENTS."""

import os
import sys

from internimage.cli import main

os.chdir(sys.argv[1])
sys.exit(main(sys.argv[2:]))
