# SPDX-License-Identifier: MIT
"""What a user can have got wrong, as one family of exceptions: the command line prints them without a traceback."""


class UserError(Exception):
    """Bad input. The message names what was wrong and what would be right."""
