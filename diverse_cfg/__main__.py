"""`python -m diverse_cfg …` is the same program as `diverse-cfg …`."""

import sys

from diverse_cfg.cli import main

if __name__ == "__main__":
    sys.exit(main())
