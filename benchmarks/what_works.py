"""Print what each pass makes of each small network of the tests, as Markdown: the table of what works in the README.

python benchmarks/what_works.py               # every registered pass
python benchmarks/what_works.py int8          # some
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the networks are those of the tests

from tests import conformance

if __name__ == "__main__":
    print(conformance.table(sys.argv[1:] or None))
