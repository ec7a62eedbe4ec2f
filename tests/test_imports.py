"""Who may import whom, what importing costs, and that the wheel holds what the checkout holds."""

import ast
import configparser
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Folder at the root -> the package it is.
FOLDERS = {
    "pgjax": "pgjax",
    "envs": "pgjax.envs",
    "algorithms": "pgjax.algorithms",
    "experiments": "pgjax.experiments",
}
# experiments -> algorithms -> pgjax <- envs: what a file must not import, anywhere in it.
FORBIDDEN = {
    "pgjax": ("pgjax.envs", "pgjax.algorithms", "pgjax.experiments"),
    "envs": ("pgjax.algorithms", "pgjax.experiments"),
    "algorithms": ("pgjax.envs", "pgjax.experiments"),
    # Some measure an adapter itself; nothing stands above them but the command line.
    "experiments": (),
}
# The command line puts everything together; pgjax/__init__.py offers everything, on first use.
MAY_IMPORT_ALL, MAY_IMPORT_ALL_LATER = "pgjax/cli/", "pgjax/__init__.py"


def sources():
    return sorted(path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def imported(tree, package, later=True):
    """Dotted names that a module's code imports, in functions as well unless ``later`` is False.

    ``package`` is what relative imports start from. A string such as ``"pgjax.envs.brax"`` counts as an import: that is
    what a table of modules to import on first use looks like.
    """
    in_functions = set()
    docstrings = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            in_functions.update(ast.walk(node))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docstrings.add(node.value)
    for node in ast.walk(tree):
        if not later and node in in_functions:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                start = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*start, *([base] if base else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif later and isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docstrings:
            if node.value.startswith("pgjax.") and " " not in node.value:
                yield node.value


def below(name, packages):
    return any(name == package or name.startswith(package + ".") for package in packages)


def wrong_imports(path, text):
    """Names that the file at ``path`` imports and must not."""
    folder = path.split("/")[0]
    package = ".".join([FOLDERS[folder], *path.split("/")[1:-1]])
    tree = ast.parse(text)
    bare = [name for name in imported(tree, package) if below(name, ("envs", "algorithms", "experiments"))]
    if path.startswith(MAY_IMPORT_ALL):
        return bare
    names = imported(tree, package, later=path != MAY_IMPORT_ALL_LATER)
    return bare + [name for name in names if below(name, FORBIDDEN[folder])]


@pytest.mark.parametrize("path", sources())
def test_arrows_point_one_way(path):
    assert wrong_imports(path, (ROOT / path).read_text()) == []


@pytest.mark.parametrize(
    ("path", "text", "wrong"),
    [
        ("pgjax/a.py", "from pgjax import envs", ["pgjax.envs"]),
        ("pgjax/a.py", "def f():\n    import pgjax.algorithms.ppo", ["pgjax.algorithms.ppo"]),
        ("pgjax/a.py", "from .envs import brax", ["pgjax.envs", "pgjax.envs.brax"]),
        ("pgjax/a.py", "import importlib\nimportlib.import_module(f'pgjax.envs.{name}')", ["pgjax.envs."]),
        ("pgjax/a.py", '"""See pgjax.envs."""\nimport pgjax.types', []),
        ("pgjax/__init__.py", "def f():\n    import pgjax.envs", []),
        ("pgjax/__init__.py", "import pgjax.envs", ["pgjax.envs"]),
        ("pgjax/cli/a.py", "import pgjax.envs, pgjax.algorithms, pgjax.experiments", []),
        ("pgjax/cli/a.py", "import envs", ["envs"]),
        ("envs/a.py", "from pgjax.algorithms import ppo", ["pgjax.algorithms", "pgjax.algorithms.ppo"]),
        ("envs/a.py", "from ..algorithms import ppo", ["pgjax.algorithms", "pgjax.algorithms.ppo"]),
        ("algorithms/a.py", "from pgjax.envs import make_env", ["pgjax.envs", "pgjax.envs.make_env"]),
        ("algorithms/a.py", "from pgjax.types import Objective", []),
        ("experiments/a.py", "import pgjax.algorithms", []),
        ("experiments/deep/a.py", "from ...envs import brax", []),
        ("experiments/deep/a.py", "import envs", ["envs"]),
    ],
)
def test_the_check_finds_what_it_should(path, text, wrong):
    assert wrong_imports(path, text) == wrong


def run_python(code, *arguments, cwd, path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(path)!r})\n{code}", *arguments],
        cwd=cwd,
        env=environment | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_importing_pgjax_imports_nothing_heavy(tmp_path):
    heavy = {"jax", "brax", "gymnax", "mujoco", "matplotlib", "pandas", "pyarrow", "orbax", "distrax", "flax", "scipy"}
    code = f"import pgjax; found = {heavy!r} & set(sys.modules); assert not found, found"
    done = run_python(code, cwd=tmp_path, path=ROOT)
    assert done.returncode == 0, done.stderr


def test_parts_are_reached_from_the_package(tmp_path):
    """As the README says: nothing but ``import pgjax`` is needed."""
    code = """
import pgjax
assert pgjax.estimators.gae and pgjax.algorithms.ppo.clip_surrogate and pgjax.on_policy.collect and pgjax.envs.list_envs
for name in ("tests", "nothing"):
    assert not hasattr(pgjax, name) and not hasattr(pgjax.algorithms, name), name
"""
    done = run_python(code, cwd=tmp_path, path=ROOT)
    assert done.returncode == 0, done.stderr


def test_the_checkout_works_without_being_installed(tmp_path):
    code = "import pgjax.envs, pgjax.algorithms, pgjax.experiments; print(pgjax.envs.__file__)"
    done = run_python(code, cwd=tmp_path, path=ROOT)
    assert done.stdout.strip() == str(ROOT / "envs" / "__init__.py"), done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of a copy of the checkout: what earlier builds left in it must not get in."""
    pytest.importorskip("setuptools", reason="building the wheel needs setuptools, as in requirements.lock")
    copy = tmp_path_factory.mktemp("checkout")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    build = "import setuptools.build_meta as b; b.build_wheel('dist')"
    done = subprocess.run([sys.executable, "-c", build], cwd=copy, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (built,) = (copy / "dist").glob("*.whl")
    return built


class TestWheel:
    def test_holds_every_module_and_data_file(self, wheel):
        expected = {"pgjax/py.typed"}
        for folder, package in FOLDERS.items():
            for path in (ROOT / folder).rglob("*"):
                if path.suffix in (".py", ".toml", ".json", ".css", ".js", ".npz"):
                    expected.add(f"{package.replace('.', '/')}/{path.relative_to(ROOT / folder).as_posix()}")
        held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
        assert held == expected

    def test_is_imported_from_another_folder(self, wheel, tmp_path):
        site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
        zipfile.ZipFile(wheel).extractall(site)
        elsewhere.mkdir()
        # Somebody's own folder of that name must not be taken for ours.
        (elsewhere / "envs").mkdir()
        (elsewhere / "envs" / "__init__.py").write_text("mine = True")
        code = """
import importlib
import pgjax
for name in ("envs", "algorithms", "experiments"):
    module = importlib.import_module(f"pgjax.{name}")
    assert module.__file__.startswith(sys.argv[1]), module.__file__
assert pgjax.__path__ == [sys.argv[1] + "/pgjax"], pgjax.__path__
assert importlib.import_module("pgjax.algorithms.ppo").make
assert importlib.util.find_spec("algorithms") is None and importlib.util.find_spec("experiments") is None
sys.path.insert(0, "")
import envs
assert envs.mine
"""
        done = run_python(code, site, cwd=elsewhere, path=site)
        assert done.returncode == 0, done.stderr

    def test_installs_the_command(self, wheel):
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
            entries = configparser.ConfigParser()
            entries.read_string(archive.read(name).decode())
        module, function = entries["console_scripts"]["pgjax"].split(":")
        assert module == "pgjax.cli"
        tree = ast.parse((ROOT / "pgjax" / "cli" / "__init__.py").read_text())
        assert function in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
