# SPDX-License-Identifier: MIT
"""How fast the operator and the models are on this machine, beside what else there is for the same work."""
