"""`python -m zoo` is the console script `zoo`."""

import sys

from zoo.main import main

if __name__ == "__main__":
    sys.exit(main())
