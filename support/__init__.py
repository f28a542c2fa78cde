"""What the lesson needs but does not teach: read it last, or never."""

import os
import sys

if sys.version_info < (3, 11):
    sys.exit("Python is %d.%d: this lesson needs 3.11 or newer" % sys.version_info[:2])
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # torch reads it once: what an Apple GPU lacks, its CPU does
