"""Files of learned objectives: what is saved comes back, and what is wrong with a file is said in one line."""

import json
import zipfile

import numpy as np
import pytest

from pgjax.errors import DamagedFile, RequestError
from pgjax.learned import files as learned_files
from pgjax.learned.files import Learned

PARAMS = {"hidden": np.arange(16, dtype=np.float32).reshape(8, 2), "deeper": {"out": np.array([[0.5], [-1.5]], np.float32)}}
LEARNED = Learned("lpo", PARAMS, {"form": "ppo", "xi": 1e-4, "feature_clip": None}, {"seeds": [0, 1], "worst": float("-inf")})


def meta(**changes):
    body = {"format": "pgjax-learned", "version": 1, "kind": "lpo", "convention": {}, "provenance": {}}
    return np.asarray(json.dumps({**body, **changes}))


def test_what_is_saved_comes_back(tmp_path):
    path = learned_files.save(tmp_path / "folder" / "mine.npz", LEARNED)
    for source in (path, str(path), f"lpo:{path}"):
        loaded = learned_files.load(source, "lpo")
        assert loaded.kind == "lpo" and loaded.convention == LEARNED.convention
        assert loaded.provenance == LEARNED.provenance
        assert set(loaded.params) == {"hidden", "deeper"} and set(loaded.params["deeper"]) == {"out"}
        for a, b in ((loaded.params["hidden"], PARAMS["hidden"]), (loaded.params["deeper"]["out"], PARAMS["deeper"]["out"])):
            np.testing.assert_array_equal(a, b)
            assert a.dtype == b.dtype
    assert [file.name for file in path.parent.iterdir()] == ["mine.npz"], "nothing is left beside it"


def test_limits_of_meta_training():
    assert learned_files.limits_of(LEARNED) is None
    seen = {"log_ratio": [-1, 1.5], "advantage": [-4, 4]}
    assert learned_files.limits_of(LEARNED._replace(provenance={"range": seen})) == ((-1.0, 1.5), (-4.0, 4.0))


def test_the_digest_tells_files_apart(tmp_path):
    one = learned_files.save(tmp_path / "one.npz", LEARNED)
    other = learned_files.save(tmp_path / "other.npz", LEARNED._replace(params={"hidden": PARAMS["hidden"] + 1}))
    assert len(learned_files.digest(one)) == 64 and learned_files.digest(one) != learned_files.digest(other)


@pytest.mark.parametrize(
    ("entries", "error", "words"),
    [
        ({"meta": meta(version=2), "params/a": np.zeros(2)}, RequestError, ["version 2", "upgrade pgjax"]),
        ({"meta": meta(kind="lpg"), "params/a": np.zeros(2)}, RequestError, ["'lpg'", "'lpo'"]),
        ({"meta": meta(format="other"), "params/a": np.zeros(2)}, DamagedFile, ["pgjax-learned"]),
        ({"meta": meta()}, DamagedFile, ["lacks parameters"]),
        ({"params/a": np.zeros(2)}, DamagedFile, ["no learned objective"]),
        ({"meta": np.asarray("no json"), "params/a": np.zeros(2)}, DamagedFile, ["damaged"]),
        ({"meta": meta(), "params/a": np.array([1.0, np.nan])}, DamagedFile, ["params/a", "finite"]),
        ({"meta": meta(), "weights": np.zeros(2)}, DamagedFile, ["'weights'"]),
        ({"meta": meta(), "params/a": np.zeros(2), "params/a/b": np.zeros(2)}, DamagedFile, ["params/a/b"]),
        ({"meta": meta(), "params/a": np.array(["text"])}, DamagedFile, ["params/a"]),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, entries, error, words):
    np.savez(tmp_path / "bad.npz", **entries)
    with pytest.raises(error) as raised:
        learned_files.load(tmp_path / "bad.npz", "lpo")
    assert type(raised.value) is error
    for word in ["bad.npz", *words]:
        assert word in str(raised.value)
    assert "\n" not in str(raised.value)


def test_pickled_objects_are_not_opened(tmp_path):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was run",))

    np.savez(tmp_path / "trap.npz", **{"meta": meta(), "params/a": np.array([Trap()], object)})
    with pytest.raises(DamagedFile, match=r"trap\.npz is damaged"):
        learned_files.load(tmp_path / "trap.npz", "lpo")


@pytest.mark.parametrize("what", ["cut", "flipped", "empty"])
def test_damaged_files_are_noticed(tmp_path, what):
    path = learned_files.save(tmp_path / "mine.npz", LEARNED)
    content = bytearray(path.read_bytes())
    if what == "cut":
        content = content[: len(content) // 2]
    elif what == "flipped":
        with zipfile.ZipFile(path) as archive:
            first = archive.infolist()[1]
        # In the compressed numbers, behind the header of that entry: 30 bytes and its name.
        content[first.header_offset + 30 + len(first.filename) + first.compress_size // 2] ^= 0x40
    else:
        content = b""
    path.write_bytes(content)
    with pytest.raises(DamagedFile, match=r"mine\.npz is damaged"):
        learned_files.load(path, "lpo")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("lpo:nothing_of_the_sort", ["lpo:nothing_of_the_sort", "not shipped"]),
        ("lpo:no/such.npz", ["no file no/such.npz"]),
        ("lpg:default", ["'lpg:default'", "'lpg', not 'lpo'"]),
    ],
)
def test_names_that_lead_nowhere(source, words):
    with pytest.raises(RequestError) as raised:
        learned_files.load(source, "lpo")
    for word in words:
        assert word in str(raised.value)


def test_shipped_names_are_listed(tmp_path, monkeypatch):
    learned_files.save(tmp_path / "algorithms" / "learned" / "lpo-default.npz", LEARNED)
    learned_files.save(tmp_path / "algorithms" / "learned" / "lpg-groove.npz", LEARNED._replace(kind="lpg"))
    monkeypatch.setattr("pgjax.__path__", [str(tmp_path)])
    assert list(learned_files.shipped("lpo")) == ["default"] and list(learned_files.shipped("lpg")) == ["groove"]
    assert learned_files.load("lpo:default", "lpo").params["hidden"].shape == (8, 2)
    assert learned_files.load("groove", "lpg").kind == "lpg"
    with pytest.raises(RequestError, match="did you mean default"):
        learned_files.load("lpo:defualt", "lpo")


@pytest.mark.parametrize(
    ("learned", "word"),
    [
        (LEARNED._replace(kind="ppo"), "'ppo' is unknown"),
        (LEARNED._replace(params={"a": np.array([np.inf])}), "params/a"),
        (LEARNED._replace(params={"a": "text"}), "params/a is a str"),
        (LEARNED._replace(params={"a/b": np.zeros(1)}), "'a/b'"),
    ],
)
def test_what_cannot_be_saved(tmp_path, learned, word):
    with pytest.raises(RequestError, match=word):
        learned_files.save(tmp_path / "mine.npz", learned)
    assert not list(tmp_path.iterdir())
    with pytest.raises(RequestError, match=r"must end in \.npz"):
        learned_files.save(tmp_path / "mine", LEARNED)
