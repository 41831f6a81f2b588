"""Build the image benchmark from packages: ``python -m recipes.images FOLDER``.

Every step writes its result to the working folder and is skipped if the result is there already. The last step writes
the exported files to the data folder of `smile_zoo.images`. The recipe needs the extra ``recipes`` and the package
registries of Debian, npm and PyPI.
"""

import torch

from recipes.common.command import run
from recipes.images.build import build

if __name__ == "__main__":
    torch.set_num_threads(2)
    run(build, __doc__, "6 GB")
