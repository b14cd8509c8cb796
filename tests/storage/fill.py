"""`python -m tests.storage.fill MODEL_ID`: get a model as the engine does; one line on stderr where it fails.

Prints the folder, and the peak of resident memory in bytes.
"""

import re
import sys
from pathlib import Path

from runtime import logs, settings
from runtime.errors import StartupError
from runtime.storage.registry import resolve

if __name__ == "__main__":
    chosen = settings.load(["--model_id", sys.argv[1]])
    logs.configure("info", "json")
    try:
        folder = resolve(chosen.source, chosen.storage, lambda progress: None)
    except StartupError as error:
        print(f"diffusion-runtime: {error}", file=sys.stderr)
        sys.exit(1)
    print(folder)
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())  # getrusage counts the parent's too
    print(int(peak[1]) * 1024 if peak else 0)
