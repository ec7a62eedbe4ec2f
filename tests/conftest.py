"""Fixtures for the tests of our own mathematics; third-party environments do not pass them, so none is global."""

import warnings

import jax
import pytest


@pytest.fixture
def strict():
    """Errors instead of silence: implicit rank promotion, warnings, a random key used twice."""
    with warnings.catch_warnings(), jax.numpy_rank_promotion("raise"), jax.debug_key_reuse(True):
        warnings.simplefilter("error")
        yield


@pytest.fixture
def float64():
    """64-bit floats, for identities that hold exactly."""
    with jax.enable_x64(True):
        yield
