"""`python -m lejepa_fast.data` is the command `lejepa-data`."""

import sys

from lejepa_fast.data.commands import main

if __name__ == "__main__":
    sys.exit(main())
