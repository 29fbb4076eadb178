"""`python -m outlast` is the command `outlast`."""

import sys

from outlast.cli.main import main

sys.exit(main())
