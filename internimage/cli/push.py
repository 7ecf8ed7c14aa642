# SPDX-License-Identifier: MIT
"""`internimage push`."""

import argparse
import sys
from pathlib import Path

from huggingface_hub import constants

from ..convert.convert import check_folder
from ..convert.folder import CARD
from ..terminal import say
from ..weights.hub import check_repository, push


def run(arguments: argparse.Namespace) -> int:
    check_repository(arguments.repository, arguments.revision)
    folder = Path(arguments.folder).expanduser()
    files = check_folder(folder)
    if CARD not in files:
        say(f"'{folder}' has no {CARD}: the repository will have no model card", sys.stderr)
    left = sorted(file.name for file in folder.iterdir() if file.name not in files)
    where = f"{constants.ENDPOINT}/{arguments.repository}" + (f" ({arguments.revision})" if arguments.revision else "")
    say(f"{'would upload' if arguments.dry_run else 'uploading'} to {where}, in one commit:")
    for file in files:
        say(f"{(folder / file).stat().st_size:>16,}  {file}")
    if left:
        say(f"not uploaded: {', '.join(left)}")
    if arguments.dry_run:
        return 0
    say(push(folder, arguments.repository, files, arguments.revision, arguments.private, arguments.message))
    return 0
