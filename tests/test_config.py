"""Settings: frozen and strict, the paper's sizes to the parameter, and typing mistakes answered with the right name."""

import json
import re
from importlib import metadata

import pytest
import torch
from pydantic import ValidationError

from igpt_ray.data.config import PaletteConfig, PixelsConfig, PrepareConfig
from igpt_ray.generate.config import CompleteConfig
from igpt_ray.model.config import ModelConfig
from igpt_ray.model.image_gpt import ImageGPT
from igpt_ray.provenance import provenance
from igpt_ray.serve.config import ServeConfig
from igpt_ray.settings import PoolConfig, Section
from igpt_ray.train.config import OptimConfig, PretrainConfig, RunConfig, WorkersConfig
from igpt_ray.train.presets import PRESETS, preset_from_arguments

PAPER = {
    "igpt-s": (24, 512, 8, 32, 76_571_648),
    "igpt-m": (36, 1024, 8, 32, 455_157_760),
    "igpt-l": (48, 1536, 16, 32, 1_362_250_752),
    "igpt-l-48": (48, 1536, 16, 48, 1_364_216_832),
    "igpt-xl": (60, 3072, 16, 64, 6_810_875_904),  # its heads are not stated; they do not change the count
}


@pytest.mark.parametrize(("n_layer", "n_embd", "n_head", "n_px", "n_params"), PAPER.values(), ids=PAPER)
def test_the_sizes_of_the_paper_have_its_parameters(
    n_layer: int, n_embd: int, n_head: int, n_px: int, n_params: int
) -> None:
    """A bias too many, tied embeddings or n + 1 positions; and a formula that drifts from the network."""
    model = ModelConfig(n_layer=n_layer, n_embd=n_embd, n_head=n_head, n_px=n_px)
    assert model.n_params == n_params
    with torch.device("meta"):
        network = ImageGPT(model)
    assert sum(p.numel() for p in network.parameters()) == n_params


@pytest.mark.parametrize("name", PAPER)
def test_the_presets_have_the_parameters_of_the_paper_and_the_masked_ones_no_start_vector(name: str) -> None:
    """Counted in the network that a preset builds, at its full size."""
    for preset, n_params in ((name, PAPER[name][4]), (f"{name}-bert", PAPER[name][4] - PAPER[name][1])):
        with torch.device("meta"):
            network = ImageGPT(PRESETS[preset][1].model)
        assert sum(p.numel() for p in network.parameters()) == PRESETS[preset][1].model.n_params == n_params


RECIPES = {
    "igpt-s": (3e-3, 128, 1_000_000),
    "igpt-m": (3e-3, 128, 1_000_000),
    "igpt-l": (1e-3, 128, 1_000_000),
    "igpt-l-48": (1e-2, 128, 1_000_000),
    "igpt-xl": (3e-4, 64, 2_000_000),
    "igpt-s-bert": (1e-2, 128, 1_000_000),
    "igpt-m-bert": (3e-3, 128, 1_000_000),
    "igpt-l-bert": (1e-3, 128, 1_000_000),
}


@pytest.mark.parametrize("name", RECIPES)
def test_presets_are_the_recipes_of_the_paper(name: str) -> None:
    """A preset that was tuned for a benchmark and still carries the paper's name."""
    preset = PRESETS[name][1]
    m, o, size = preset.model, preset.optim, PAPER[name.removesuffix("-bert")]
    assert (m.n_layer, m.n_embd, m.n_px, m.n_vocab) == (*size[:2], size[3], 512)
    assert name == "igpt-xl" or m.n_head == size[2]
    assert (m.objective, m.n_class) == ("masked" if name.endswith("-bert") else "next", 0)
    assert (o.lr, o.batch_size, o.steps) == RECIPES[name]
    assert (o.betas, o.clip) == ((0.9, 0.95), None)
    assert abs(o.warmup_steps - 1_281_167 / o.batch_size) < 1  # one epoch of ImageNet
    assert preset.workers.resolved(on_gpu=False).precision == "float32"


@pytest.mark.parametrize("name", ["tiny", "igpt-s", "igpt-m", "igpt-l", "igpt-xl"])
def test_a_modern_twin_sees_the_same_images_in_a_network_of_the_same_size(name: str) -> None:
    """A twin that wins because it is larger, or trains longer."""
    paper, twin = PRESETS[name][1], PRESETS[f"{name}-modern"][1]
    for field in ("n_layer", "n_embd", "n_head", "n_px", "n_vocab", "objective"):
        assert getattr(twin.model, field) == getattr(paper.model, field)
    for field in ("batch_size", "steps", "warmup_steps", "betas"):
        assert getattr(twin.optim, field) == getattr(paper.optim, field)
    assert not paper.model.modern
    assert twin.model.modern == ["qk_norm", "rotary"]
    assert ModelConfig.model_validate(twin.model.model_dump()) == twin.model  # its heads can be turned
    assert (paper.optim.muon_lr, paper.optim.schedule) == (None, "cosine")


def test_what_the_paper_does_not_state_is_said_where_it_is_chosen() -> None:
    """A choice of ours that passes for the paper's."""
    for name, said in (("igpt-xl", "not stated"), ("igpt-l-48-bert", "not in the paper"), ("igpt-xl-bert", "not in")):
        assert said in PRESETS[name][0]
    assert OptimConfig.__doc__
    for choice in ("linear warm-up", "epsilon 1e-8", "no gradient clipping"):
        assert choice in OptimConfig.__doc__


AUTO = ("precision", "compile", "micro_batch")


def auto_of(workers: WorkersConfig) -> tuple[object, ...]:
    return tuple(getattr(workers, name) for name in AUTO)


def test_auto_is_resolved_by_device_and_only_once() -> None:
    """The CPU keeps the settings with which the demo's results were measured."""
    assert auto_of(WorkersConfig().resolved(on_gpu=False)) == ("float32", False, 32)
    assert auto_of(WorkersConfig(gpus=1).resolved(on_gpu=True)) == ("bfloat16", True, "auto")
    for on_gpu in (True, False):
        once = PRESETS["igpt-s"][1].resolved(on_gpu)
        assert once.resolved(on_gpu) == once
    assert once.resolved(on_gpu=True).workers.precision == "float32"  # resolved for the CPU


@pytest.mark.parametrize("on_gpu", [True, False])
def test_explicit_settings_are_kept_on_every_device(on_gpu: bool) -> None:
    chosen = WorkersConfig(precision="bfloat16", compile=False, micro_batch=5)
    started = {"gpus": int(on_gpu), "precision": "float32", "compile": True, "micro_batch": 7}
    assert chosen.resolved(on_gpu, started) == chosen


def test_auto_keeps_the_settings_of_the_run_that_is_resumed() -> None:
    """A run that moves to another device keeps its precision only, because that changes its losses."""
    before = {"gpus": 1, "precision": "float32", "compile": False, "micro_batch": 32}  # the defaults before version 0.2
    assert auto_of(WorkersConfig(gpus=1).resolved(True, before)) == ("float32", False, 32)
    on_gpu = {"gpus": 1, "precision": "bfloat16", "compile": True, "micro_batch": "auto"}
    assert auto_of(WorkersConfig().resolved(False, on_gpu)) == ("bfloat16", False, 32)
    assert auto_of(WorkersConfig(gpus=1).resolved(True, {**before, "gpus": 0})) == ("float32", True, "auto")


@pytest.mark.parametrize("words", [[], ["--workers.gpus", "1"], ["--workers.compile", "False"]])
def test_auto_survives_the_command_line(words: list[str]) -> None:
    """A preset must not fix the values of a CPU before the number of GPUs is known."""
    workers = preset_from_arguments(["igpt-s", *words], PretrainConfig).workers
    assert auto_of(workers) == ("auto", False if "False" in words else "auto", "auto")


def test_settings_cannot_be_changed_after_they_were_read() -> None:
    """A function that edits its section: what is written beside the artefact would not be what ran."""
    settings = PretrainConfig()
    with pytest.raises(ValidationError, match="frozen"):
        settings.seed = 1
    with pytest.raises(ValidationError, match="frozen"):
        settings.optim.lr = 1.0


@pytest.mark.parametrize(
    "section", [PretrainConfig, ModelConfig, OptimConfig, RunConfig, WorkersConfig, PixelsConfig, PoolConfig]
)
def test_an_unknown_setting_is_refused(section: type[Section]) -> None:
    """A mistyped name in a config.json would silently mean the default."""
    with pytest.raises(ValidationError, match="not_a_setting"):
        section(not_a_setting=1)


IMPOSSIBLE = [
    (ModelConfig, {"n_layer": 0}),
    (ModelConfig, {"n_embd": -512}),
    (ModelConfig, {"n_embd": 512, "n_head": 7}),
    (ModelConfig, {"n_px": 0}),
    (ModelConfig, {"n_vocab": 1}),
    (ModelConfig, {"n_vocab": 65537}),
    (ModelConfig, {"n_embd": 12, "n_head": 2, "rotary": True}),
    (OptimConfig, {"lr": 0}),
    (OptimConfig, {"lr": float("inf")}),
    (OptimConfig, {"lr": float("nan")}),
    (OptimConfig, {"betas": (0.9, 1.0)}),
    (OptimConfig, {"betas": (0.9,)}),
    (OptimConfig, {"eps": 0}),
    (OptimConfig, {"batch_size": 0}),
    (OptimConfig, {"steps": 1.5}),
    (OptimConfig, {"warmup_steps": -1}),
    (OptimConfig, {"clip": 0}),
    (OptimConfig, {"muon_lr": 0}),
    (OptimConfig, {"decay_fraction": 0.0}),
    (OptimConfig, {"decay_fraction": 1.1}),
    (WorkersConfig, {"n": 0}),
    (WorkersConfig, {"cpus": 0}),
    (WorkersConfig, {"gpus": 2}),
    (WorkersConfig, {"precision": "float16"}),
    (WorkersConfig, {"max_failures": -1}),
    (WorkersConfig, {"n": 2, "min_n": 3}),
    (WorkersConfig, {"patience": 0}),
    (RunConfig, {"name": ""}),
    (RunConfig, {"name": "a/b"}),
    (RunConfig, {"name": ".."}),
    (RunConfig, {"root": "ftp://bucket"}),
    (RunConfig, {"keep": 0}),
    (PretrainConfig, {"seed": -1}),
    (PretrainConfig, {"seed": 2**32}),
    (PixelsConfig, {"n_px": 225}),
    (PixelsConfig, {"crop": "left"}),
    (PaletteConfig, {"source": "a", "out": "b", "k": 1}),
    (PrepareConfig, {"source": "a", "palette": "b", "tokens": "c", "budget": 1.5}),
    (PrepareConfig, {"source": "", "palette": "b", "tokens": "c"}),
    (CompleteConfig, {"release": "a", "tokens": "b", "out": "c", "temperature": -1}),
    (CompleteConfig, {"release": "a", "tokens": "b", "out": "c", "temperature": float("inf")}),
    (ServeConfig, {"release": "a", "port": 70000}),
]


@pytest.mark.parametrize(("section", "values"), IMPOSSIBLE, ids=lambda v: v.__name__ if isinstance(v, type) else str(v))
def test_an_impossible_value_is_refused(section: type[Section], values: dict[str, object]) -> None:
    """Refused where it is read, not after an hour on a cluster; a run named `..` would write beside its root."""
    with pytest.raises(ValidationError) as caught:
        section(**values)
    assert any(set(values) & set(map(str, error["loc"])) or not error["loc"] for error in caught.value.errors())


def test_settings_survive_json() -> None:
    """A run is resumed by comparing its config.json with the settings: tuples and numbers must come back equal."""
    for _, preset in PRESETS.values():
        assert PretrainConfig.model_validate_json(preset.model_dump_json()) == preset


def test_places_are_absolute_once_they_are_settings() -> None:
    """Ray's workers have another working directory."""
    assert RunConfig(root="file:///a/b/").root == "/a/b"
    assert RunConfig(root="runs").root.startswith("/")
    assert preset_from_arguments(["tiny", "--data.tokens", "tokens"], PretrainConfig).data.tokens.startswith("/")
    assert RunConfig(root="s3://bucket/runs/", name="x").uri == "s3://bucket/runs/x"


def test_a_word_on_the_command_line_changes_that_setting_alone() -> None:
    """A preset whose other sections fall back to defaults when one is touched."""
    settings = preset_from_arguments(["igpt-l-48", "--optim.lr", "1e-3", "--workers.n", "4"], PretrainConfig)
    preset = PRESETS["igpt-l-48"][1]
    expected = preset.model_dump() | {"optim": preset.optim.model_dump() | {"lr": 1e-3}}
    expected |= {"workers": preset.workers.model_dump() | {"n": 4}}
    assert settings == PretrainConfig.model_validate(expected)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["igpt-s", "--optim.lrr", "1e-3"], "--optim.lr"),
        (["igpt-s", "--data.token", "/a"], "--data.tokens"),
        (["igpt-s", "--model.n-heads", "8"], "--model.n-head"),
        (["igpt-ss"], "igpt-s"),
    ],
)
def test_a_mistyped_word_is_answered_with_the_nearest_name(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """An ignored word: the run would start with the default and nobody would know."""
    with pytest.raises(SystemExit) as caught:
        preset_from_arguments(words, PretrainConfig)
    assert caught.value.code == 2
    printed = capsys.readouterr()
    advice = re.split("Perhaps you meant|did you mean", printed.err)[1]
    assert expected in re.findall(r"[\w.-]+", advice)
    assert printed.out == ""


def test_an_impossible_word_ends_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    """A job must stop at the command line, with its reason on stderr."""
    with pytest.raises(SystemExit) as caught:
        preset_from_arguments(["tiny", "--model.n-head", "3"], PretrainConfig)
    assert caught.value.code == 2
    assert "not a multiple of n_head 3" in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_provenance_says_what_made_an_artefact() -> None:
    """An artefact nobody can make again: no settings, no versions, or something that JSON cannot hold."""
    made = json.loads(json.dumps(provenance(PretrainConfig(seed=5))))
    assert made["settings"]["seed"] == 5
    assert made["versions"]["torch"] == metadata.version("torch")
    assert made["git"] is None or re.fullmatch("[0-9a-f]{40}", made["git"])
