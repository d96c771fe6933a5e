"""`jaxserve checkpoint` as a script: converts, verifies and compares models on disk.

.venv/bin/python tools/migrate_checkpoint.py convert SRC DST --to safetensors
"""

from __future__ import annotations

import sys

from jaxserve.cli.main import main

if __name__ == "__main__":
    sys.argv[1:1] = ["checkpoint"]
    main()
