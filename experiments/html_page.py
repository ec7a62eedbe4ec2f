"""A page of one file: everything inline, nothing loaded from anywhere, texts escaped."""

import base64
import hashlib
import html
from typing import Any


def esc(text: Any) -> str:
    """Text as HTML, for element contents and quoted attributes alike."""
    return html.escape(str(text), quote=True)


def document(title: str, style: str, body: str, script: str = "") -> str:
    """The HTML text of a page, with a policy that lets a browser run this ``script`` and load nothing but inline pictures.

    Args: title: plain text.  style, script: as they are.  body: HTML.
    """
    allowed = f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; "
    allowed += f"script-src '{_digest(script)}'; " if script else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{allowed}base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{esc(title)}</title>
<style>{style}</style>
</head>
<body>
{body}
{f"<script>{script}</script>" if script else ""}
</body>
</html>
"""


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
