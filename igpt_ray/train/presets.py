"""Presets of training settings: the paper's sizes and recipes, modern variants, and tiny networks for tests."""

import difflib
import sys
from typing import TypeVar

from igpt_ray.model.config import ModelConfig
from igpt_ray.train.config import OptimConfig, PretrainConfig, RunConfig, WorkersConfig


def _paper(n_layer: int, n_embd: int, n_head: int, n_px: int, optim: OptimConfig) -> PretrainConfig:
    """A recipe of the paper. The defaults of `OptimConfig` supply what the paper does not state."""
    return PretrainConfig(model=ModelConfig(n_layer=n_layer, n_embd=n_embd, n_head=n_head, n_px=n_px), optim=optim)


def _bert(recipe: PretrainConfig, lr: float) -> PretrainConfig:
    """The BERT variant of a recipe. The paper states another objective and learning rate, and no other difference."""
    model = recipe.model.model_copy(update={"objective": "masked"})
    return recipe.model_copy(update={"model": model, "optim": recipe.optim.model_copy(update={"lr": lr})})


def _modern(recipe: PretrainConfig, lr: float, muon_lr: float) -> PretrainConfig:
    """The modern variant of a recipe, with the same size, images, batch and steps.

    Its changes are the best of `python -m benchmarks modern` on tiny networks (docs/results.md). The learning rates of
    larger networks are not tuned: Adam's are the paper's, and Muon's is its authors'.
    """
    model = recipe.model.model_copy(update={"qk_norm": True, "rotary": True})
    optim = recipe.optim.model_copy(update={"lr": lr, "muon_lr": muon_lr, "schedule": "warmup_stable_decay"})
    return recipe.model_copy(update={"model": model, "optim": optim})


TINY = PretrainConfig(
    model=ModelConfig(n_layer=4, n_embd=128, n_head=4, n_px=8, n_vocab=64),
    optim=OptimConfig(lr=3e-3, batch_size=64, steps=330, warmup_steps=30),
    workers=WorkersConfig(micro_batch=64),
    run=RunConfig(checkpoint_every=110),
)
IGPT_S = _paper(24, 512, 8, 32, OptimConfig(lr=3e-3))
IGPT_M = _paper(36, 1024, 8, 32, OptimConfig(lr=3e-3))
IGPT_L = _paper(48, 1536, 16, 32, OptimConfig(lr=1e-3))
IGPT_L_48 = _paper(48, 1536, 16, 48, OptimConfig(lr=1e-2))
IGPT_XL = _paper(60, 3072, 32, 64, OptimConfig(lr=3e-4, batch_size=64, steps=2_000_000, warmup_steps=20_018))

PRESETS: dict[str, tuple[str, PretrainConfig]] = {
    "tiny": ("4 layers x 128 at 8x8, 64 colours: trains on a laptop in a minute", TINY),
    "igpt-s": ("iGPT-S of the paper, 76.6M parameters", IGPT_S),
    "igpt-m": ("iGPT-M of the paper, 455M parameters", IGPT_M),
    "igpt-l": ("iGPT-L of the paper at 32x32, 1.36B parameters", IGPT_L),
    "igpt-l-48": ("iGPT-L of the paper at 48x48, 1.36B parameters; learning rate 0.01 as printed", IGPT_L_48),
    "igpt-xl": ("iGPT-XL of the paper, 6.8B parameters; 32 heads (not stated) have the head width of L", IGPT_XL),
    "igpt-s-bert": ("iGPT-S of the paper with masked pixels", _bert(IGPT_S, 1e-2)),
    "igpt-m-bert": ("iGPT-M of the paper with masked pixels", _bert(IGPT_M, 3e-3)),
    "igpt-l-bert": ("iGPT-L of the paper at 32x32 with masked pixels", _bert(IGPT_L, 1e-3)),
    "igpt-l-48-bert": ("iGPT-L at 48x48 with masked pixels; not in the paper", _bert(IGPT_L_48, 1e-3)),
    "igpt-xl-bert": ("iGPT-XL with masked pixels; not in the paper", _bert(IGPT_XL, 3e-4)),
    "tiny-modern": ("tiny with Muon and a modern network", _modern(TINY, 6e-3, 0.04)),
    "igpt-s-modern": ("iGPT-S with Muon and a modern network; not in the paper", _modern(IGPT_S, 3e-3, 0.02)),
    "igpt-m-modern": ("iGPT-M with Muon and a modern network; not in the paper", _modern(IGPT_M, 3e-3, 0.02)),
    "igpt-l-modern": ("iGPT-L at 32x32 with Muon and a modern network; not in the paper", _modern(IGPT_L, 1e-3, 0.02)),
    "igpt-xl-modern": ("iGPT-XL with Muon and a modern network; not in the paper", _modern(IGPT_XL, 3e-4, 0.02)),
}


P = TypeVar("P", bound=PretrainConfig)


def preset_from_arguments(arguments: list[str], settings: type[P], prog: str | None = None) -> P:
    """Settings from a preset and options, such as `["igpt-s", "--optim.lr", "1e-3"]`.

    Exits with code 2 and the nearest name if the first word is not a preset. tyro parses the options of one preset
    only, because as subcommands the presets would repeat its error messages.
    """
    import tyro

    name = arguments[0] if arguments else "--help"
    prog = prog or f"jobs/{settings.__name__.removesuffix('Config').lower()}.py"
    if name in PRESETS:
        preset = PRESETS[name][1]
        default = settings(**{field: getattr(preset, field) for field in PretrainConfig.model_fields})
        return tyro.cli(settings, default=default, args=arguments[1:], prog=f"{prog} {name}")
    if name in ("-h", "--help"):
        print(f"usage: {prog} PRESET [--setting VALUE ...]\n\n{settings.__doc__}\n\npresets:")
        for preset_name, (description, _) in PRESETS.items():
            print(f"  {preset_name:20} {description}")
        print(f"\nsettings of a preset: {prog} tiny --help")
        sys.exit(0)
    nearest = difflib.get_close_matches(name, PRESETS, 1)
    hint = f", did you mean {nearest[0]}?" if nearest else "."
    print(f"error: expected a preset ({', '.join(PRESETS)}), got {name!r}{hint} See {prog} --help", file=sys.stderr)
    sys.exit(2)
