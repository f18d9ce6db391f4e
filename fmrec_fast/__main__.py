"""``python -m fmrec_fast`` is the command line."""

import sys

from fmrec_fast.cli import main

sys.exit(main())
