"""Files of learned objectives and update rules: parameters, what they mean, and where they come from. Never pickle.

A file is one ``.npz``: an array for every parameter, named ``params/...`` by its path, and ``meta``, a JSON text with the
format's version, the kind, the convention (everything without which the weights mean nothing) and the provenance.

The files that pgjax ships stand in ``algorithms/learned`` and go by names such as ``lpo:default``.
"""

import hashlib
import io
import json
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import pgjax
from pgjax.errors import DamagedFile, RequestError, close_names
from pgjax.host.checkpoints import disk_errors, from_json, to_json, write_file

FORMAT, VERSION = "pgjax-learned", 1
KINDS = ("lpo", "lpg")
_PARAMS = "params"


class Learned(NamedTuple):
    """A learned objective or rule.

    kind: ``lpo`` or ``lpg``.  params: nested dicts of arrays.
    convention: JSON values that the kind's module reads: without them the weights mean nothing.
    provenance: JSON values: command, seeds, versions, environments and steps, curve; ``range`` has the lowest and highest
      ``log_ratio`` and ``advantage`` of meta-training, for kinds that see those.
    """

    kind: str
    params: dict[str, Any]
    convention: dict[str, Any]
    provenance: dict[str, Any]


def save(path: str | os.PathLike[str], learned: Learned) -> Path:
    """Writes the file, whole or not at all.

    Raises: RequestError for an unknown kind, parameters that are not nested dicts of finite numbers, or a path that is not
    ``.npz``; RunError if the disk refuses.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise RequestError(f"path = {path} must end in .npz")
    _check_kind(learned.kind)
    arrays = _flatten(learned.params)
    for name, value in arrays.items():
        if not np.isfinite(value).all():
            raise RequestError(f"{name} has numbers that are not finite; such parameters are not worth keeping")
    body = {
        "format": FORMAT,
        "version": VERSION,
        **{part: getattr(learned, part) for part in ("kind", "convention", "provenance")},
    }
    content = io.BytesIO()
    np.savez_compressed(content, meta=np.asarray(json.dumps(to_json(body))), **arrays)  # pyright: ignore[reportArgumentType]
    aside = path.with_name(path.name + ".tmp")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(aside, content.getvalue())
        aside.replace(path)
    return path


def load(source: str | os.PathLike[str], kind: str) -> Learned:
    """Reads what ``source`` names: the ``NAME`` of a shipped one, or the path of a file; either may follow ``KIND:``.

    Raises: RequestError for an unknown name, a missing file, another kind or a newer version; DamagedFile for a file that
    is not what was written.
    """
    _check_kind(kind)
    path = find(source, kind)
    body, arrays = _read(path)
    if body.get("format") != FORMAT:
        raise DamagedFile(f"{path} is no learned objective: its meta does not say {FORMAT}")
    if body.get("version") != VERSION:
        raise RequestError(f"{path} has version {body.get('version')} of its format, this pgjax reads {VERSION}; upgrade pgjax")
    if body.get("kind") != kind:
        raise RequestError(f"{path} holds a learned objective of kind {body.get('kind')!r}, not {kind!r}; name another file")
    if not all(isinstance(body.get(part), dict) for part in ("convention", "provenance")) or not arrays:
        raise DamagedFile(f"{path} is damaged: it lacks parameters, convention or provenance")
    for name, value in arrays.items():
        if not np.issubdtype(value.dtype, np.number) or not np.isfinite(value).all():
            raise DamagedFile(f"{path} is damaged: {name} has entries that are not finite numbers")
    return Learned(kind, _unflatten(path, arrays), body["convention"], body["provenance"])


def find(source: str | os.PathLike[str], kind: str) -> Path:
    """The file that ``source`` names. Raises: RequestError if there is none; it lists the names that are shipped."""
    text = os.fspath(source)
    prefix, colon, rest = text.partition(":")
    if colon and prefix in KINDS:
        if prefix != kind:
            raise RequestError(f"{text!r} is of kind {prefix!r}, not {kind!r}; name another one")
        text = rest
    if text.endswith(".npz") or os.sep in text:
        if not Path(text).is_file():
            raise RequestError(f"{kind}:{text}: there is no file {text}; give a file of pgjax meta-train or {_names(kind)}")
        return Path(text)
    known = shipped(kind)
    if text not in known:
        close = close_names(text, known) if known else f"{_names(kind)}; give the path of a file that ends in .npz"
        raise RequestError(f"{kind}:{text} is not shipped with pgjax: {close}")
    return known[text]


def shipped(kind: str) -> dict[str, Path]:
    """``{name: file}`` of what pgjax ships of a kind."""
    files = [file for root in pgjax.__path__ for file in Path(root, "algorithms", "learned").glob(f"{kind}-*.npz")]
    return {file.stem.removeprefix(f"{kind}-"): file for file in sorted(files)}


def digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, in hexadecimal: which weights a run had."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def limits_of(learned: Learned) -> tuple[tuple[float, float], tuple[float, float]] | None:
    """``((lowest, highest) log ratio, (lowest, highest) advantage)`` of meta-training, or None if the file does not say."""
    seen = learned.provenance.get("range")
    if not seen:
        return None
    (a, b), (c, d) = seen["log_ratio"], seen["advantage"]
    return (float(a), float(b)), (float(c), float(d))


def _names(kind: str) -> str:
    return ", ".join(f"{kind}:{name}" for name in shipped(kind)) or "none is shipped"


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise RequestError(f"kind = {kind!r} is unknown; {close_names(kind, KINDS)}")


def _flatten(params: Any, name: str = _PARAMS) -> dict[str, np.ndarray]:
    if not isinstance(params, dict):
        value = np.asarray(params)
        if not np.issubdtype(value.dtype, np.number):
            raise RequestError(f"{name} is a {type(params).__name__}; parameters are nested dicts of numbers")
        return {name: value}
    flat = {}
    for key, value in params.items():
        if not isinstance(key, str) or not key or "/" in key:
            raise RequestError(f"{name} has the key {key!r}; give texts without a slash")
        flat.update(_flatten(value, f"{name}/{key}"))
    return flat


def _unflatten(path: Path, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in arrays.items():
        first, *folders, last = name.split("/") if "/" in name else (name, "")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        if first != _PARAMS or not last or not isinstance(place, dict) or last in place:
            raise DamagedFile(f"{path} is damaged: it has an array {name!r}")
        place[last] = value
    return tree


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    try:
        with np.load(path, allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files}
        body = from_json(json.loads(str(arrays.pop("meta"))))
        if not isinstance(body, dict):
            raise ValueError("its meta is no table")
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error, AttributeError) as error:
        said = (str(error).splitlines() or [""])[0]
        raise DamagedFile(f"{path} is damaged, or no learned objective: {type(error).__name__}: {said[:200]}") from error
    return body, arrays
