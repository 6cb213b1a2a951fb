"""The command line: one table of commands, run as `igpt <command>`, `python -m igpt_ray <command>` or a file in jobs/.

A command parses its settings, joins or starts Ray if it needs a cluster, calls one flow, and prints the flow's result
as one JSON line. Neither torch nor ray is imported before the settings are valid.
"""

import difflib
import sys
from importlib import import_module
from typing import Any, NamedTuple

from igpt_ray.interrupt import exits_on_interrupt


class Command(NamedTuple):
    """A command. `flow` and `settings` are `module:name`, imported when the command runs."""

    summary: str
    flow: str
    settings: str
    example: str
    cluster: bool = True
    """Whether the flow needs Ray."""
    preset: bool = False
    """Whether the first word is a preset of `igpt_ray.train.presets`."""


COMMANDS = {
    "palette": Command(
        "fit a palette to the training images of a folder or bucket",
        "igpt_ray.flows.prepare:fit_palette",
        "igpt_ray.data.config:PaletteConfig",
        "--source s3://bucket/imagenet --out s3://bucket/palette.npy",
    ),
    "prepare": Command(
        "turn images into a token store",
        "igpt_ray.flows.prepare:prepare",
        "igpt_ray.data.config:PrepareConfig",
        "--source s3://bucket/imagenet --palette openai --tokens s3://bucket/tokens",
    ),
    "verify": Command(
        "verify every byte of a token store, and some shards against the source",
        "igpt_ray.flows.prepare:verify",
        "igpt_ray.data.config:VerifyConfig",
        "--tokens s3://bucket/tokens",
    ),
    "estimate": Command(
        "estimate memory, traffic, hours and cost of a training run",
        "igpt_ray.flows.estimate:report",
        "igpt_ray.train.config:EstimateConfig",
        "igpt-l --workers.n 64 --cluster.device h200",
        cluster=False,
        preset=True,
    ),
    "pretrain": Command(
        "pretrain on a token store, or resume a run",
        "igpt_ray.flows.train:pretrain",
        "igpt_ray.train.config:PretrainConfig",
        "igpt-s --data.tokens s3://bucket/tokens --run.root s3://bucket/runs --run.name s1",
        preset=True,
    ),
    "finetune": Command(
        "fine-tune a release with a class head",
        "igpt_ray.flows.finetune:finetune",
        "igpt_ray.train.config:FinetuneConfig",
        "--release s3://bucket/runs/s1/release --tokens s3://bucket/labelled --run.root s3://bucket/runs",
    ),
    "evaluate": Command(
        "nats per token of a release on a split; accuracy of a fine-tuned release",
        "igpt_ray.flows.evaluate:evaluate",
        "igpt_ray.evaluate.config:EvaluateConfig",
        "--release s3://bucket/runs/s1/release --tokens s3://bucket/tokens --split val",
    ),
    "features": Command(
        "write features of every layer to Parquet",
        "igpt_ray.flows.features:extract",
        "igpt_ray.evaluate.config:FeaturesConfig",
        "--release s3://bucket/runs/s1/release --tokens s3://bucket/tokens --out s3://bucket/features",
    ),
    "probe": Command(
        "fit a linear probe to every layer",
        "igpt_ray.flows.probe:probe_layers",
        "igpt_ray.evaluate.config:ProbeConfig",
        "--release s3://bucket/runs/s1/release --tokens s3://bucket/tokens --out s3://bucket/probe",
    ),
    "complete": Command(
        "complete the lower part of images, and draw figures",
        "igpt_ray.flows.batch:complete",
        "igpt_ray.generate.config:CompleteConfig",
        "--release s3://bucket/runs/s1/release --tokens s3://bucket/tokens --out s3://bucket/completions",
    ),
    "score": Command(
        "write the nats of every image to Parquet",
        "igpt_ray.flows.batch:score",
        "igpt_ray.evaluate.config:ScoreConfig",
        "--release s3://bucket/runs/s1/release --tokens s3://bucket/tokens --out s3://bucket/scores",
    ),
    "audit": Command(
        "audit bias: iEAT, and completions by group",
        "igpt_ray.flows.audit:run_audit",
        "igpt_ray.evaluate.config:AuditConfig",
        "--release s3://bucket/runs/s1/release --ieat s3://bucket/stimuli --out s3://bucket/audit",
    ),
    "report": Command(
        "report on a release: likelihood, probes, fine-tuning, completions",
        "igpt_ray.flows.report:write_report",
        "igpt_ray.flows.config:ReportConfig",
        "--release s3://bucket/runs/s1/release --tokens s3://bucket/tokens --out s3://bucket/report",
    ),
    "convert": Command(
        "convert weights between OpenAI's checkpoints, transformers' folders and releases",
        "igpt_ray.weights.convert:convert",
        "igpt_ray.weights.config:ConvertConfig",
        "--source s3://bucket/igpt-s/model.ckpt-1000000 --palette openai --out s3://bucket/releases/igpt-s",
        cluster=False,
    ),
    "serve": Command(
        "serve releases over HTTP, or check a file for `serve deploy`",
        "igpt_ray.flows.serve:run",
        "igpt_ray.serve.config:ServeConfig",
        "--release s3://bucket/runs/s1/release --keys keys.txt",
    ),
    "watch": Command(
        "drain this node when its cloud announces its preemption",
        "igpt_ray.flows.watch:watch",
        "igpt_ray.flows.config:WatchConfig",
        "--cloud aws",
        cluster=False,
    ),
}

GROUPS = {
    "Data": ("palette", "prepare", "verify"),
    "Training": ("estimate", "pretrain", "finetune"),
    "Evaluation": ("evaluate", "features", "probe", "complete", "score", "audit", "report"),
    "Serving and operation": ("serve", "convert", "watch"),
}
"""The commands in the order of `igpt --help`."""


def main() -> None:
    """The console script `igpt`."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help", "help"):
        summaries = "\n\n".join(
            "\n".join([f"{group}:", *(f"  {command:10} {COMMANDS[command].summary}" for command in commands)])
            for group, commands in GROUPS.items()
        )
        usage = "usage: igpt COMMAND [--setting VALUE ...]\n\nImage GPT on Ray, from images to an HTTP endpoint."
        options = "settings and an example of a command: igpt COMMAND --help; version: igpt --version"
        sys.stdout.write(f"{usage}\n\n{summaries}\n\n{options}\n")  # one write, so that `| head` does not raise
    elif name == "--version":
        from igpt_ray import __version__

        print(__version__)
    elif name in COMMANDS:
        run(name, sys.argv[2:], f"igpt {name}")
    else:
        nearest = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f", did you mean {nearest[0]}?" if nearest else "."
        print(f"error: no command {name!r}{hint} igpt --help lists the commands", file=sys.stderr)
        sys.exit(2)


def run(name: str, arguments: list[str] | None = None, prog: str | None = None) -> None:
    """Run a command with `arguments` as its settings (by default sys.argv), and print its JSON line.

    Exits with code 2 if the settings are invalid, 1 if the flow fails, 130 or 143 after an interrupt.
    """
    command = COMMANDS[name]
    with exits_on_interrupt():
        settings = parse(name, sys.argv[1:] if arguments is None else arguments, prog or f"python jobs/{name}.py")
        job = import_module("igpt_ray.flows.job")
        local = (name == "serve" and settings.check) or (name == "prepare" and settings.dry_run)
        job.finish(_load(command.flow), settings, command.cluster and not local)


def parse(name: str, arguments: list[str], prog: str) -> Any:
    """The settings of a command. Prints help or the error and exits if `arguments` are not valid settings."""
    import tyro

    command = COMMANDS[name]
    kind = _load(command.settings)
    if command.preset:
        return import_module("igpt_ray.train.presets").preset_from_arguments(arguments, kind, prog)
    description = f"{kind.__doc__}\n\nExample: {prog} {command.example}"
    return tyro.cli(kind, args=arguments, prog=prog, description=description)


def _load(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)
