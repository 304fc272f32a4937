"""`python -m kimia.cli`: the `kimia` command where no script is installed."""

import sys

from kimia.cli import main

sys.exit(main())
