"""How fast is `tokenize`, beside bare `tokenizers`, TRL and axolotl? And how much memory?

    python benchmarks/tokenize.py [--rounds 5] [--copies 8] [--peer-rows 80] [--cores 1 --cores 2]
    python benchmarks/tokenize.py --memory 100000

The measurement is in `peers/rates.py`, which says what is compared. This file only makes sure that
its name harms nobody: Python puts a script's folder before the standard library, so that every
script in this one would import this file where the standard library (linecache, inspect) wants its
`tokenize`.
"""

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120 - nothing is imported yet

if __name__ == "tokenize":
    from importlib.machinery import SourceFileLoader
    from importlib.util import module_from_spec, spec_from_loader

    _path = os.path.join(os.path.dirname(os.__file__), "tokenize.py")  # noqa: PTH118, PTH120
    _loader = SourceFileLoader("tokenize", _path)
    _spec = spec_from_loader("tokenize", _loader)
    assert _spec is not None
    _module = module_from_spec(_spec)
    sys.modules["tokenize"] = _module  # what an import statement gives is taken from here
    _loader.exec_module(_module)
else:
    sys.path[:] = [path for path in sys.path if os.path.abspath(path) != HERE]  # noqa: PTH100

if __name__ == "__main__":
    sys.path.insert(0, os.path.join(HERE, "peers"))  # noqa: PTH118
    from rates import main

    main()
