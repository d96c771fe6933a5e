"""A `jaxserve` command as the child of another: it ends when that one does.

python -m jaxserve.cli.tied_process PARENT_PID COMMAND...
"""

from __future__ import annotations

import sys

from jaxserve.cli.main import main
from jaxserve.process_ties import die_with_parent

if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    del sys.argv[1]
    main()
