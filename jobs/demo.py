"""The whole path on handwritten digits, on this machine: every stage submitted as a job to a local Ray cluster.

python jobs/demo.py --store s3
"""

import base64
import json
import os
import shutil
import sys
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import tyro

from igpt_ray import storage
from igpt_ray.data.digits import N_PX, digits
from igpt_ray.errors import IgptError, SettingError
from igpt_ray.flows import local_cluster
from igpt_ray.flows.config import DemoConfig
from igpt_ray.flows.serve import curl_line
from igpt_ray.interrupt import exits_on_interrupt
from igpt_ray.provenance import provenance

MARK = ".igpt_ray-demo"
PIXELS = ["--pixels.n-px", str(N_PX), "--pixels.crop", "centre"]
Report = dict[str, Any]


def demo(settings: DemoConfig) -> Report:
    """Run every stage, copy what is worth keeping to `out`, return the report."""
    started = time.perf_counter()
    out = fresh_folder(Path(settings.out))
    logs = out / "logs"
    with ExitStack() as stack:
        if settings.store == "s3":
            os.environ |= stack.enter_context(local_cluster.s3_server(out / "data", "demo", logs))
            data = "s3://demo"
        else:
            data = str(out / "data")
        say(f"starting Ray; all logs go to {logs}")
        client = stack.enter_context(
            local_cluster.ray_cluster(logs, n_cpus=max(4, settings.workers + 1), env=os.environ)
        )

        stages = {"digits": timed("digits", lambda: write_digits(data))}
        for name, words in jobs(settings, data).items():
            stages[name] = timed(name, partial(local_cluster.submit, words, client, logs / f"{name}.log", say))
        stages["serve"] = timed("serve", lambda: serve_once(data, client, logs / "serve.log"))
        keep(data, out)
    report = {"seconds": round(time.perf_counter() - started, 1), "stages": stages, "made_by": provenance(settings)}
    (out / "report.json").write_text(json.dumps(report, indent=1))
    return report


def jobs(settings: DemoConfig, data: str) -> dict[str, list[str]]:
    """Stage -> the words after `ray job submit -- python`."""
    source, palette, tokens = f"{data}/images", f"{data}/palette.npy", f"{data}/tokens"
    store = ["--source", source, *PIXELS]
    run = ["--data.tokens", tokens, "--run.root", f"{data}/runs", "--run.name", "demo"]
    steps = ["--optim.steps", str(settings.steps), "--run.checkpoint-every", str(max(1, settings.steps // 3))]
    on = ["--release", f"{data}/runs/demo/release", "--tokens", tokens]
    return {
        "palette": ["jobs/palette.py", *store, "--out", palette, "--k", "64"],
        "prepare": ["jobs/prepare.py", *store, "--palette", palette, "--tokens", tokens, "--shard-images", "400"],
        "pretrain": ["jobs/pretrain.py", "tiny", *run, *steps, "--workers.n", str(settings.workers)],
        "evaluate": ["jobs/evaluate.py", *on, "--baselines", "train"],
        "probe": ["jobs/probe.py", *on, "--out", f"{data}/probe", "--baselines", "--low-data", "25"],
        "complete": ["jobs/complete.py", *on, "--out", f"{data}/completions"],
        "score": ["jobs/score.py", *on, "--out", f"{data}/scores"],
    }


def write_digits(data: str) -> Report:
    """Class folders of PNG files, `<data>/images/<split>/<digit>/<number>.png`."""
    pictures = list(digits(seed=0))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda p: storage.write(f"{data}/images/{p.key}", p.png), pictures))
    return {"images": len(pictures)}


def serve_once(data: str, client: dict[str, str], log: Path) -> Report:
    """Serve the release and the probe's head; have a test picture finished, scored and classified over HTTP."""
    port = local_cluster.free_port()
    address = f"http://127.0.0.1:{port}"
    words = ["jobs/serve.py", "--release", f"digits={data}/runs/demo/release", "--heads", f"digit={data}/probe"]
    words += ["--open", "--port", str(port)]
    with local_cluster.submitted(words, client, log, ready=f"{address}/readyz"):
        picture = base64.b64encode(storage.read(sample_picture(data))).decode()
        completed = post(f"{address}/v1/completions", {"image": picture, "n": 4, "seed": 1})
        scored = post(f"{address}/v1/score", {"image": picture})
        classified = post(f"{address}/v1/classify", {"image": picture})
    return {
        "completions": len(completed["data"]),
        "nats_per_pixel": scored["data"][0]["nats_per_pixel"],
        "likeliest": classified["data"][0]["classes"][0],
    }


def post(url: str, body: Report) -> Report:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        found: Report = json.loads(answer.read())
        return found


def sample_picture(data: str) -> str:
    return next(entry.uri for entry in storage.walk(f"{data}/images/test/3"))


def keep(data: str, out: Path) -> None:
    """What outlives the S3 server: the figure, the release with the probe's head, and a picture to try it on."""
    storage.download(f"{data}/probe/classifier.npz", out / "probe" / "classifier.npz")
    storage.download(f"{data}/completions/completions.png", out / "completions.png")
    storage.download(sample_picture(data), out / "picture.png")
    release = f"{data}/runs/demo/release"
    for entry in storage.walk(release):
        storage.download(entry.uri, out / "release" / entry.uri[len(release) + 1 :])


def fresh_folder(out: Path) -> Path:
    """An empty `out`, marked as the demo's; a folder that holds anything else is never touched."""
    if out.exists() and any(out.iterdir()) and not (out / MARK).exists():
        raise SettingError(f"{out} holds files that are not the demo's: choose another --out")
    shutil.rmtree(out, ignore_errors=True)
    (out / "logs").mkdir(parents=True)
    (out / MARK).touch()
    return out


def timed(name: str, stage: Callable[[], Report]) -> Report:
    say(f"--- {name}")
    started = time.perf_counter()
    return {**stage(), "seconds": round(time.perf_counter() - started, 1)}


def table(report: Report) -> str:
    """One line a stage: seconds, and what came of it."""
    s = report["stages"]
    tokens, bases, test = s["prepare"]["token_count"], s["evaluate"]["baselines"], s["probe"]
    said = {
        "digits": f"{s['digits']['images']} images",
        "palette": f"{s['palette']['k']} colours, {s['palette']['psnr_db']} dB",
        "prepare": f"{s['prepare']['images']} images -> {tokens:,} tokens, {s['prepare']['bytes']:,} bytes",
        "pretrain": f"{s['pretrain']['step']} steps, {s['pretrain']['tokens_per_second']:,.0f} tokens/s",
        "evaluate": f"{s['evaluate']['nats_per_token']:.3f} nats per token on held-out digits"
        f" (unigram by position {bases['unigram_by_position']:.3f}, previous pixel"
        f" {bases['bigram_previous_pixel']:.3f}, 2-D context {bases['context_2d']:.3f})",
        "probe": f"{test['accuracy']:.1%} at layer {test['best_layer']} (untrained"
        f" {test['untrained']['accuracy']:.1%}, raw pixels {test['raw_pixels']['accuracy']:.1%});"
        f" with 25 labels a class {few(test):.1%} ({few(test['untrained']):.1%}, {few(test['raw_pixels']):.1%})",
        "complete": f"{s['complete']['completions']} completions, {s['complete']['tokens_per_second']:,.0f} tokens/s",
        "score": f"{s['score']['images']} images scored",
        "serve": f"{s['serve']['completions']} completions over HTTP; a 3 is taken for a"
        f" {s['serve']['likeliest']['class']} with {s['serve']['likeliest']['probability']:.0%}",
    }
    lines = [f"{'stage':<10}{'seconds':>8}  result"]
    lines += [f"{name:<10}{s[name]['seconds']:>8.1f}  {text}" for name, text in said.items()]
    return "\n".join([*lines, f"{'total':<10}{report['seconds']:>8.1f}"])


def few(probed: Report) -> float:
    """Mean accuracy of the linear probe with few labels."""
    return float(probed["low_data"]["25"]["linear"]["mean"])


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    settings = tyro.cli(DemoConfig)
    try:
        with exits_on_interrupt():
            report = demo(settings)
    except IgptError as error:
        say(f"error: {error}")
        sys.exit(1)
    say(f"\n{table(report)}\n\nthe figure: {settings.out}/completions.png    the report: {settings.out}/report.json")
    say("next: make serve, and open http://127.0.0.1:8000/ in a browser")
    say(f"or: {curl_line('http://127.0.0.1:8000', settings.out + '/picture.png')}")
    print(json.dumps({"seconds": report["seconds"], "report": f"{settings.out}/report.json"}))
