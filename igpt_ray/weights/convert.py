"""Convert an OpenAI checkpoint, a transformers folder or a release to a release or a transformers folder."""

from dataclasses import dataclass
from typing import Literal

from pydantic import ConfigDict

from igpt_ray import storage
from igpt_ray.data import pixels
from igpt_ray.data.palette import Palette
from igpt_ray.data.token_format import TokenFormat
from igpt_ray.errors import CheckpointError, SettingError
from igpt_ray.model.image_gpt import ImageGPT
from igpt_ray.provenance import provenance
from igpt_ray.settings import Result
from igpt_ray.weights import hf, openai, release
from igpt_ray.weights.config import ConvertConfig


@dataclass(frozen=True)
class Source:
    """Weights that were read, with the palette if their format stores one."""

    format: Literal["openai", "transformers", "release"]
    model: ImageGPT
    palette: Palette | None


class ConvertResult(Result):
    """Also has the settings of the network as fields, `n_layer` etc."""

    model_config = ConfigDict(extra="allow")

    source: str
    format: Literal["openai", "transformers", "release"]
    """Format of the source."""
    out: str
    to: str
    n_params: int
    palette: str | None
    """Fingerprint."""


def convert(settings: ConvertConfig) -> ConvertResult:
    """Convert the weights at `settings.source`."""
    source = _read(settings.source)
    palette = _palette(settings, source)
    if settings.to == "transformers":
        hf.save_hf(source.model, settings.out, palette)
    elif source.format == "release":
        raise SettingError(f"{settings.source} is already a release: use --to transformers to convert it")
    else:
        _release(settings, source, palette)
    return ConvertResult(
        source=settings.source,
        format=source.format,
        out=settings.out,
        to=settings.to,
        n_params=source.model.config.n_params,
        palette=None if palette is None else palette.fingerprint,
        **source.model.config.model_dump(),
    )


def _read(source: str) -> Source:
    if storage.exists(f"{source}.index"):
        return Source("openai", openai.load_openai(source), None)
    if storage.exists(storage.join(source, "palette.npy")):
        loaded = release.load_release(source)
        return Source("release", loaded.model, loaded.palette)
    if storage.exists(storage.join(source, hf.CONFIG)):
        return Source("transformers", hf.load_hf(source), hf.palette_of(source))
    raise CheckpointError(
        f"nothing to convert at {source}: expected a release, a transformers folder, or the path of an OpenAI"
        " checkpoint without .index, as in DIR/model.ckpt-1000000"
    )


def _palette(settings: ConvertConfig, source: Source) -> Palette | None:
    """The palette of the settings or of the source. Raises `SettingError` if both exist and differ."""
    chosen = Palette.load(settings.palette) if settings.palette else None
    if chosen and source.palette and chosen.fingerprint != source.palette.fingerprint:
        raise SettingError(
            f"{settings.source} already has a palette, which differs from {settings.palette}: omit --palette"
        )
    return chosen or source.palette


def _release(settings: ConvertConfig, source: Source, palette: Palette | None) -> None:
    m = source.model.config
    if palette is None:
        raise SettingError(
            f"{settings.source} has no palette, and a release needs one: set --palette openai, or a .npy"
        )
    if len(palette) != m.n_vocab:
        raise SettingError(f"the palette has {len(palette)} colours, the model a vocabulary of {m.n_vocab}")
    kind = TokenFormat(
        n_px=m.n_px,
        n_vocab=m.n_vocab,
        palette=palette.fingerprint,
        pipeline=pixels.pipeline_id(settings.pipeline, settings.view),
    )
    config = release.ReleaseConfig(
        format=release.FORMAT,
        model=m,
        kind=kind,
        sha256="",
        classes=[],
        trained={"converted_from": f"{settings.source} ({source.format})", **provenance(settings)},
    )
    release.save_release(settings.out, source.model.state_dict(), palette, config)
