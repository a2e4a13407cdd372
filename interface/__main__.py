"""`python -m prefixvlm`, the same as the command `prefixvlm`."""

import sys

from prefixvlm.cli import main

sys.exit(main())
