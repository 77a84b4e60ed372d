"""`python -m poemerge` is `poemerge`."""

import sys

from poemerge.cli.main import main

sys.exit(main())
