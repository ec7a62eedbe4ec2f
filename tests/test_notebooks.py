"""Every notebook runs from its first cell to its last, at smoke scale."""

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "notebooks").glob("*.ipynb"))
# Those that a newcomer opens first; the others are for `make test-all`.
ALWAYS = ("quickstart", "bring_your_own_objective")


@pytest.mark.parametrize(
    "path", [pytest.param(path, id=path.stem, marks=() if path.stem in ALWAYS else pytest.mark.slow) for path in NOTEBOOKS]
)
def test_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("PGJAX_SCALE", "smoke")
    book = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(book, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    pictures = [out for cell in book.cells for out in cell.get("outputs", ()) if "image/png" in out.get("data", {})]
    assert pictures, "a notebook without a figure"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_short_and_carries_no_machine(path):
    book = nbformat.read(path, as_version=4)
    code = [cell.source for cell in book.cells if cell.cell_type == "code"]
    assert sum(len(source.splitlines()) for source in code) < 100
    assert book.cells[0].source.startswith("# ") and "What to notice" in "".join(cell.source for cell in book.cells)
    text = path.read_text()
    assert "/home/" not in text and "/tmp/" not in text and "Traceback" not in text


def test_there_is_one_for_every_paper_so_far():
    names = {path.stem for path in NOTEBOOKS}
    assert names >= {"ppo", "trpo", "gae", "mdpo", "spo", "fixpo", "dpo", "guide", "quickstart", "bring_your_own_objective"}
