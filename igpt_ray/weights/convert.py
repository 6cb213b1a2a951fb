"""OpenAI's checkpoint, a folder of transformers or a release -> a release, or a folder of transformers."""

import time
from dataclasses import dataclass
from typing import Any

from igpt_ray import storage
from igpt_ray.data import pixels
from igpt_ray.data.palette import Palette
from igpt_ray.data.token_store import TokenFormat
from igpt_ray.errors import CheckpointError, SettingError
from igpt_ray.model.image_gpt import ImageGPT
from igpt_ray.provenance import provenance
from igpt_ray.weights import hf, openai, release
from igpt_ray.weights.config import ConvertConfig


@dataclass(frozen=True)
class Source:
    """Weights that were read, with the palette if their format stores one."""

    format: str
    model: ImageGPT
    palette: Palette | None


def convert(settings: ConvertConfig) -> dict[str, Any]:
    """Read what lies at the source, write it in the other format, say what it was."""
    started = time.perf_counter()
    found = _read(settings.source)
    palette = _palette(settings, found)
    if settings.to == "transformers":
        hf.save_hf(found.model, settings.out, palette)
    elif found.format == "release":
        raise SettingError(f"{settings.source} is a release already: --to transformers makes the other format of it")
    else:
        _release(settings, found, palette)
    return {
        "source": settings.source,
        "format": found.format,
        "out": settings.out,
        "to": settings.to,
        **found.model.config.model_dump(),
        "n_params": found.model.config.n_params,
        "palette": None if palette is None else palette.fingerprint,
        "seconds": round(time.perf_counter() - started, 2),
    }


def _read(source: str) -> Source:
    if storage.exists(f"{source}.index"):
        return Source("openai", openai.load_openai(source), None)
    if storage.exists(storage.join(source, "palette.npy")):
        loaded = release.load_release(source)
        return Source("release", loaded.model, loaded.palette)
    if storage.exists(storage.join(source, hf.CONFIG)):
        return Source("transformers", hf.load_hf(source), hf.palette_of(source))
    raise CheckpointError(
        f"nothing to convert at {source}: expected a release, a folder of transformers, or the path of an OpenAI"
        " checkpoint without .index, as in DIR/model.ckpt-1000000"
    )


def _palette(settings: ConvertConfig, found: Source) -> Palette | None:
    """That of the settings, or what the source holds; if both, they must be equal."""
    given = Palette.load(settings.palette) if settings.palette else None
    if given and found.palette and given.fingerprint != found.palette.fingerprint:
        raise SettingError(
            f"{settings.source} has a palette of its own, and {settings.palette} is another: leave it out"
        )
    return given or found.palette


def _release(settings: ConvertConfig, found: Source, palette: Palette | None) -> None:
    m = found.model.config
    if palette is None:
        raise SettingError(f"{settings.source} has no palette, and a release needs one: --palette openai, or a .npy")
    if len(palette) != m.n_vocab:
        raise SettingError(f"the palette has {len(palette)} colours, the network a vocabulary of {m.n_vocab}")
    kind = TokenFormat(
        n_px=m.n_px,
        n_vocab=m.n_vocab,
        palette=palette.fingerprint,
        pipeline=pixels.PIPELINES[settings.pipeline],
    )
    about = release.ReleaseConfig(
        format=release.FORMAT,
        model=m,
        kind=kind,
        sha256="",
        classes=[],
        trained={"converted_from": f"{settings.source} ({found.format})", **provenance(settings)},
    )
    release.save_release(settings.out, found.model.state_dict(), palette, about)
