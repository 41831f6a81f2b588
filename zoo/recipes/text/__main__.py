"""Build the text benchmark from packages: ``python -m recipes.text FOLDER``.

Every step writes its result to the working folder and is skipped if the result is there already. The exported files go
to the data folder of `smile_zoo.text`. The recipe needs the extras ``recipes`` and ``text``, and the package registries
of Debian.
"""

from recipes.common.command import run
from recipes.text.build import build

if __name__ == "__main__":
    experts = run(build, __doc__, "3 GB")
    print(experts.groupby("kind")[["pretrained", "fine-tuned", "adapter"]].mean().round(1).to_string())
