"""``python -m pgjax`` is the ``pgjax`` command."""

from pgjax.cli import main

main()
