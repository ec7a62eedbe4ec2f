"""Fixtures for the tests of our own mathematics; third-party environments do not pass the strict ones, so none is global."""

import os
import signal
import warnings

# Tests compile much and run little: without LLVM's optimisations a program is ready three times sooner. This must be
# said before JAX starts, and holds for the processes that tests start.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_use_fusion_emitters=false",
    ]
).strip()

# A shell that starts the tests in the background has Ctrl-C ignored, which processes that tests start would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import jax
import pytest

from pgjax import cli

# The longest files first: `make test` gives whole files to its processes, and one that begins last is waited for.
_LONGEST = (
    *(
        "test_sweep_processes",
        "test_probe_learning",
        "test_contract",
        "test_runner",
        "test_envs",
        "test_playground",
        "test_compare",
    ),
    "test_mujoco",
)


def pytest_collection_modifyitems(items):
    rank = {name: i for i, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


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


@pytest.fixture(autouse=True, scope="session")
def compile_once(tmp_path_factory):
    """Programs that several tests compile alike come from a cache that lives as long as the session."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("programs"))
        # For the processes that tests start.
        patch.setenv("JAX_COMPILATION_CACHE_DIR", folder)
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
        yield


@pytest.fixture
def answer(capsys):
    """``answer(argv) -> (exit code, what stderr said)``: what is wrong is said in one line, without a traceback."""

    def answer(argv):
        code = cli._main(argv)
        said = capsys.readouterr().err.strip()
        assert len(said.splitlines()) == (1 if code else 0), said
        return code, said

    return answer


@pytest.fixture
def refuse(answer, tmp_path, monkeypatch):
    """``refuse(argv, words)``: a wrong request ends in code 2, says every word, and writes nothing."""

    def refuse(argv, words):
        monkeypatch.chdir(tmp_path)
        code, said = answer(argv)
        assert code == 2, said
        for word in words:
            assert word in said
        assert not list(tmp_path.iterdir()), "nothing may be written for a wrong request"

    return refuse
