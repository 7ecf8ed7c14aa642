# SPDX-License-Identifier: MIT
"""Exporters and runtimes in silence: what goes wrong is an exception as well, and their advice is not for users."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

_ROOT = ""
_LOGGERS = _ROOT, "torch.onnx", "torch.export", "torch._inductor", "torch.utils", "onnxscript", "onnx_ir"


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """No warnings, log lines or progress on standard output inside."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before):
            logger.setLevel(level)
