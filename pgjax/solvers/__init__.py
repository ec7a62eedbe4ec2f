"""Constrained optimisation: conjugate gradients and line search, and dual variables."""
