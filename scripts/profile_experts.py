"""Count which experts a text or chat file uses: ``fiddler profile`` from a checkout.

python scripts/profile_experts.py MODEL --text FILE [-o profile.json] [--picture heatmap.png]
"""

import sys

from fiddler.cli import cli

if __name__ == "__main__":
    cli.main(["profile", *sys.argv[1:]], prog_name="fiddler")
