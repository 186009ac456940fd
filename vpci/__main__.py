"""`python -m vpci` is `vpci`."""

import sys

from vpci.cli import main

sys.exit(main())
