# SPDX-License-Identifier: MIT
"""What can be trained, evaluated and predicted, a folder a task."""
