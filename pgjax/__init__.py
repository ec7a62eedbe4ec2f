"""pgjax: the policy-gradient family under one loop, pure-functional, on vectorised JAX environments."""

import os as _os

# In a checkout the sub-packages `envs`, `algorithms` and `experiments` stand beside this folder; the wheel maps them in.
_root = _os.path.dirname(_os.path.dirname(_os.path.abspath(__file__)))
if _os.path.exists(_os.path.join(_root, "pyproject.toml")) and _os.path.isdir(_os.path.join(_root, "algorithms")):
    __path__.append(_root)
