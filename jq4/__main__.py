"""`python -m jq4`, the same as `jq4`."""

import sys

from jq4.cli import main

if __name__ == "__main__":
    sys.exit(main())
