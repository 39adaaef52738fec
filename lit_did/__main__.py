"""`python -m lit_did`: the command `lit-did`."""

import sys

from lit_did.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
