"""Write the pretrained CLIP and the images of the tasks in the form in which the zoo distributes them."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from recipes.images.tasks import Images

EXPORTED = {"train": 150, "validation": 300, "test": 600}  # images per split


def export_clip(model: CLIPModel, processor: CLIPProcessor, folder: Path) -> None:
    """Write the pretrained model in float16, with its tokenizer and image processor; the folder is replaced."""
    shutil.rmtree(folder, ignore_errors=True)
    model.half().save_pretrained(folder)
    processor.save_pretrained(folder)
    model.float()


def export_images(images: Images, task: str, folder: Path, lossless: bool = True) -> None:
    """Write each split as parquet in the format of the datasets library: ``image`` (WebP) and ``label``."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in EXPORTED.items():
        pixels, labels = images[split]
        encoded = []
        for array in pixels[:count]:
            buffer = io.BytesIO()
            Image.fromarray(array).save(buffer, format="WEBP", lossless=lossless, quality=90, method=6)
            encoded.append({"bytes": buffer.getvalue(), "path": None})
        struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        table = pa.table({"image": pa.array(encoded, type=struct), "label": pa.array(labels[:count])})
        features = (
            '{"info": {"features": {"image": {"_type": "Image"}, "label": {"dtype": "int64", "_type": "Value"}}}}'
        )
        pq.write_table(table.replace_schema_metadata({"huggingface": features}), folder / f"{task}-{split}.parquet")
