"""``python -m fiddler``: the same as the ``fiddler`` command."""

from fiddler.cli import main

main()
