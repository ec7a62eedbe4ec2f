"""The page that shows all episodes side by side: everything inline, everything from a run escaped."""

import base64
from collections.abc import Sequence
from typing import NamedTuple

import pgjax
from pgjax.experiments.html_page import document, esc

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 1320px; padding: 1.2rem; color: #222; }
h1 { font-size: 1.4rem; margin: 0 0 .3rem; }
h2 { font-size: 1.1rem; margin: 1.6rem 0 .5rem; }
p { margin: .3rem 0; max-width: 60rem; }
code { background: #f3f3f1; padding: .1rem .3rem; border-radius: 3px; overflow-wrap: anywhere; }
.row { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 1rem; max-width: 1320px; }
figure { margin: 0; max-width: 420px; }
img { width: 100%; height: auto; border: 1px solid #ccc; display: block; }
figcaption { margin-top: .35rem; }
b { font-variant-numeric: tabular-nums; }
small { color: #666; }
"""


class Shown(NamedTuple):
    """One picture. name: of the file.  policy, pick: what it shows.  told: facts below it, in the order of reading.
    viewer: file beside the page in which it can be looked at from any side, if there is one."""

    name: str
    policy: str
    pick: str
    content: bytes
    told: Sequence[str]
    viewer: str = ""


def make_page(title: str, lead: Sequence[str], shown: Sequence[Shown], spread: dict[str, str], command: str) -> str:
    """The HTML text, which needs no other file and no network, and may load nothing.

    Args: lead: sentences below the title.  spread: of each policy, one sentence on all of its episodes.
    """
    sections = "\n".join(
        f'<section>\n<h2>{esc(name.capitalize())} policy</h2>\n<p>{esc(said)}</p>\n<div class="row">\n'
        + "\n".join(_figure(one) for one in shown if one.policy == name)
        + "\n</div>\n</section>"
        for name, said in spread.items()
    )
    sentences = "\n".join(f"<p>{esc(sentence)}</p>" for sentence in lead)
    body = f"""<h1>{esc(title)}</h1>
{sentences}
{sections}
<p><small>Made by pgjax {esc(pgjax.__version__)}: <code>{esc(command)}</code></small></p>"""
    return document(title, _STYLE, body)


def _figure(one: Shown) -> str:
    data = base64.b64encode(one.content).decode()
    head, *rest = one.told
    link = f'<br><a href="{esc(one.viewer)}">from any side</a>' if one.viewer else ""
    return (
        f'<figure>\n<img src="data:image/gif;base64,{data}" alt="{esc(f"{one.pick} episode of the {one.policy} policy")}">\n'
        f"<figcaption><b>{esc(one.pick)}: {esc(head)}</b><br>"
        f"<small>{esc(', '.join(rest))} ({esc(one.name)})</small>{link}</figcaption>\n"
        "</figure>"
    )
