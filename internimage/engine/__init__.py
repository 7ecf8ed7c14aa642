# SPDX-License-Identifier: MIT
"""Training of any task: steps, processes, checkpoints and the folder of a run."""
