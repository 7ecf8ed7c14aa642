# SPDX-License-Identifier: MIT
"""`internimage push`."""

import argparse
import sys
from pathlib import Path

from huggingface_hub import constants

from ..hub import check_repository, push
from ..models.convert import CARD, check_folder

HELP = "Upload a folder that convert has written to the Hub."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="with model.safetensors or shards, config.json, README.md")
    parser.add_argument("repository", metavar="OWNER/NAME", help="is made if there is none")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to commit to, instead of the main one")
    parser.add_argument("--private", action="store_true", help="hide a repository that is made")
    parser.add_argument("--message", metavar="TEXT", default="", help="of the commit")
    parser.add_argument("--dry-run", action="store_true", help="print what would be uploaded, and upload nothing")


def run(arguments: argparse.Namespace) -> int:
    check_repository(arguments.repository, arguments.revision)
    folder = Path(arguments.folder).expanduser()
    files = check_folder(folder)
    if CARD not in files:
        print(f"'{folder}' has no {CARD}: the repository will have no model card", file=sys.stderr)
    left = sorted(file.name for file in folder.iterdir() if file.name not in files)
    where = f"{constants.ENDPOINT}/{arguments.repository}" + (f" ({arguments.revision})" if arguments.revision else "")
    print(f"{'would go' if arguments.dry_run else 'going'} to {where}, in one commit:")
    for file in files:
        print(f"{(folder / file).stat().st_size:>16,}  {file}")
    if left:
        print(f"not uploaded: {', '.join(left)}")
    if arguments.dry_run:
        return 0
    print(push(folder, arguments.repository, files, arguments.revision, arguments.private, arguments.message))
    return 0
