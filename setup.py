# SPDX-License-Identifier: MIT
"""Everything that is declared stands in pyproject.toml; what has to be decided at build time belongs here."""

from setuptools import setup

setup()
