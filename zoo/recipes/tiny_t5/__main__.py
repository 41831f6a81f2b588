"""Build the tiny T5 from packages: ``python -m recipes.tiny_t5 FOLDER``.

Every step writes its result to the working folder and is skipped if the result is there already. The exported files go
to the data folder of `smile_zoo.tiny_t5`. The recipe needs the extra ``recipes`` and the package registries of Debian
and PyPI.
"""

from recipes.common.command import run
from recipes.tiny_t5.build import build

if __name__ == "__main__":
    run(build, __doc__, "1 GB")
