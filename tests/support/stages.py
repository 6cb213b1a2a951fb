"""Palette, preparation, verification and training in one process with its own Ray, for tests of the object store.

python tests/support/stages.py s3://bucket
"""

import sys

from igpt_ray import storage
from igpt_ray.data.config import PaletteConfig, PixelsConfig, PrepareConfig, VerifyConfig
from igpt_ray.flows import job, prepare, train
from igpt_ray.model.config import ModelConfig
from igpt_ray.train.config import DataConfig, OptimConfig, PretrainConfig, RunConfig

PIXELS = PixelsConfig(n_px=4, crop="centre")
SHAPE = ModelConfig(n_layer=1, n_embd=16, n_head=2, n_px=4, n_vocab=16)


def main(bucket: str) -> None:
    job.connect()
    source, palette, tokens = (storage.join(bucket, name) for name in ("imagenet", "palette.npy", "tokens"))
    prepare.fit_palette(PaletteConfig(source=source, out=palette, k=16, pixels=PIXELS))
    prepare.prepare(PrepareConfig(source=source, palette=palette, tokens=tokens, pixels=PIXELS))
    storage.write(storage.join(tokens, "train", "left-over.parquet"), b"of a preparation with other settings")
    prepare.verify(VerifyConfig(tokens=tokens, remake=0, remove=True))
    train.pretrain(
        PretrainConfig(
            model=SHAPE,
            optim=OptimConfig(batch_size=4, steps=12, warmup_steps=2),
            data=DataConfig(tokens=tokens),
            run=RunConfig(root=storage.join(bucket, "runs"), name="s1", checkpoint_every=3, keep=1, log_every=3),
        )
    )


if __name__ == "__main__":
    main(sys.argv[1])
