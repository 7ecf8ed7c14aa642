# SPDX-License-Identifier: MIT
"""The command line: `internimage VERB`, one file a verb.

Exit status: 0 done, 1 done with something left out that was not to be left out, 2 bad input.
"""

import argparse
import errno
import logging
import os
import signal
import sys

from .. import __version__
from ..errors import UserError
from ..progress import MessageHandler
from . import benchmark, convert, evaluate, finetune, info, predict, push

_MISSING = (FileNotFoundError, PermissionError, NotADirectoryError)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_VERBS = (evaluate, predict, finetune, convert, push, benchmark, info)


def parser() -> argparse.ArgumentParser:
    """The whole command line's parser."""
    top = argparse.ArgumentParser(prog="internimage", description="InternImage: evaluate, predict, fine-tune, convert.")
    top.add_argument("--version", action="version", version=f"internimage {__version__}")
    verbs = top.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb in _VERBS:
        name = verb.__name__.rpartition(".")[2]
        sub = verbs.add_parser(name, help=verb.HELP, description=verb.HELP, formatter_class=_Formatter)
        verb.add_arguments(sub)
        sub.set_defaults(run=verb.run)
    return top


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults in the help, but not where there is none to tell."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default is None or action.default is False or action.default == []:
            return action.help or ""
        return super()._get_help_string(action) or ""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = parser().parse_args(argv)
    if getattr(sys.stdout, "errors", None) == "strict":  # names of files and classes may hold any bytes
        sys.stdout.reconfigure(errors="backslashreplace")
    logger = logging.getLogger("internimage")  # ours alone: other packages have handlers of their own
    if not logger.handlers:
        logger.addHandler(MessageHandler())
    try:
        return arguments.run(arguments)
    except UserError as error:
        return _fail(arguments.verb, error)
    except BrokenPipeError:  # the reader of a pipe, such as head, has had enough
        sys.stderr.close()
        return 0
    except OSError as error:  # of a file: it is not there, is not ours, the disk is full
        if error.filename is None and error.errno not in _FULL and not isinstance(error, _MISSING):
            raise
        return _fail(arguments.verb, error)
    except KeyboardInterrupt as error:
        if os.environ.get("RANK", "0") == "0":  # of a torchrun launch, one process speaks
            print(error if error.args else "interrupted", file=sys.stderr)
        return 130


def _fail(verb: str, error: Exception) -> int:
    """Say what went wrong: one process of a torchrun launch, unless an error is its alone."""
    rank = os.environ.get("RANK", "0")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # torchrun ends all processes as soon as one has ended: not before the message is there
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if rank == "0" or not getattr(error, "everywhere", False):
        process = "" if rank == "0" else f", process {rank}"
        print(f"internimage {verb}{process}: error: {error}", file=sys.stderr, flush=True)
    return getattr(error, "status", 2)  # not every error is a UserError
