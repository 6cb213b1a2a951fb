"""Demo on handwritten digits on one machine: every stage is a job on a local Ray cluster.

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

MARKER = ".igpt_ray-demo"
PIXELS = ["--pixels.n-px", str(N_PX), "--pixels.crop", "centre"]
Report = dict[str, Any]


def demo(settings: DemoConfig) -> Report:
    """Run every stage, copy the results to `out`, and return the report.

    Raises `SettingError` if `out` has files that are not the demo's.
    """
    started = time.perf_counter()
    out = fresh_folder(Path(settings.out))
    logs = out / "logs"
    with ExitStack() as stack:
        if settings.store == "s3":
            os.environ |= stack.enter_context(local_cluster.s3_server(out / "data", "demo", logs))
            data = "s3://demo"
        else:
            data = str(out / "data")
        log(f"starting Ray; all logs go to {logs}")
        client = stack.enter_context(
            local_cluster.ray_cluster(logs, n_cpus=max(4, settings.workers + 1), env=os.environ)
        )

        stages = {"digits": timed("digits", lambda: write_digits(data))}
        for name, arguments in jobs(settings, data).items():
            stages[name] = timed(name, partial(local_cluster.submit, arguments, client, logs / f"{name}.log", log))
        stages["serve"] = timed("serve", lambda: serve_once(data, client, logs / "serve.log"))
        copy_results(data, out)
    report = {"seconds": round(time.perf_counter() - started, 1), "stages": stages, "made_by": provenance(settings)}
    (out / "report.json").write_text(json.dumps(report, indent=1))
    return report


def jobs(settings: DemoConfig, data: str) -> dict[str, list[str]]:
    """For each stage, the arguments after `ray job submit -- python`."""
    source, palette, tokens = f"{data}/images", f"{data}/palette.npy", f"{data}/tokens"
    store = ["--source", source, *PIXELS]
    run = ["--data.tokens", tokens, "--run.root", f"{data}/runs", "--run.name", "demo"]
    steps = ["--optim.steps", str(settings.steps), "--run.checkpoint-every", str(max(1, settings.steps // 3))]
    inputs = ["--release", f"{data}/runs/demo/release", "--tokens", tokens]
    return {
        "palette": ["jobs/palette.py", *store, "--out", palette, "--k", "64"],
        "prepare": ["jobs/prepare.py", *store, "--palette", palette, "--tokens", tokens, "--shard-images", "400"],
        "pretrain": ["jobs/pretrain.py", "tiny", *run, *steps, "--workers.n", str(settings.workers)],
        "evaluate": ["jobs/evaluate.py", *inputs, "--baselines", "train"],
        "probe": ["jobs/probe.py", *inputs, "--out", f"{data}/probe", "--baselines", "--low-data", "25"],
        "complete": ["jobs/complete.py", *inputs, "--out", f"{data}/completions"],
        "score": ["jobs/score.py", *inputs, "--out", f"{data}/scores"],
    }


def write_digits(data: str) -> Report:
    """Write PNG files to class folders, `<data>/images/<split>/<digit>/<number>.png`."""
    images = list(digits(seed=0))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda image: storage.write(f"{data}/images/{image.key}", image.png), images))
    return {"images": len(images)}


def serve_once(data: str, client: dict[str, str], log: Path) -> Report:
    """Serve the release and the probe's head; complete, score and classify a test image over HTTP."""
    port = local_cluster.free_port()
    address = f"http://127.0.0.1:{port}"
    arguments = ["jobs/serve.py", "--release", f"digits={data}/runs/demo/release", "--heads", f"digit={data}/probe"]
    arguments += ["--open", "--port", str(port)]
    with local_cluster.submitted(arguments, client, log, ready=f"{address}/readyz"):
        image = base64.b64encode(storage.read(sample_image(data))).decode()
        completed = post(f"{address}/v1/completions", {"image": image, "n": 4, "seed": 1})
        scored = post(f"{address}/v1/score", {"image": image})
        classified = post(f"{address}/v1/classify", {"image": image})
    return {
        "completions": len(completed["data"]),
        "nats_per_pixel": scored["data"][0]["nats_per_pixel"],
        "likeliest": classified["data"][0]["classes"][0],
    }


def post(url: str, body: Report) -> Report:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        answer: Report = json.loads(response.read())
        return answer


def sample_image(data: str) -> str:
    return next(entry.uri for entry in storage.walk(f"{data}/images/test/3"))


def copy_results(data: str, out: Path) -> None:
    """Copy the figure, the release, the probe's head and a test image to `out`, because the S3 server stops."""
    storage.download(f"{data}/probe/classifier.npz", out / "probe" / "classifier.npz")
    storage.download(f"{data}/completions/completions.png", out / "completions.png")
    storage.download(sample_image(data), out / "picture.png")
    release = f"{data}/runs/demo/release"
    for entry in storage.walk(release):
        storage.download(entry.uri, out / "release" / entry.uri[len(release) + 1 :])


def fresh_folder(out: Path) -> Path:
    """Empty `out` and mark it as the demo's. Raises `SettingError` if it has files but no mark."""
    if out.exists() and any(out.iterdir()) and not (out / MARKER).exists():
        raise SettingError(f"{out} has files that are not the demo's: choose another --out")
    shutil.rmtree(out, ignore_errors=True)
    (out / "logs").mkdir(parents=True)
    (out / MARKER).touch()
    return out


def timed(name: str, stage: Callable[[], Report]) -> Report:
    log(f"--- {name}")
    started = time.perf_counter()
    return {**stage(), "seconds": round(time.perf_counter() - started, 1)}


def table(report: Report) -> str:
    """One line per stage: seconds and result."""
    s = report["stages"]
    tokens, baselines, probe = s["prepare"]["token_count"], s["evaluate"]["baselines"], s["probe"]
    results = {
        "digits": f"{s['digits']['images']} images",
        "palette": f"{s['palette']['k']} colours, {s['palette']['psnr_db']} dB",
        "prepare": f"{s['prepare']['images']} images -> {tokens:,} tokens, {s['prepare']['bytes']:,} bytes",
        "pretrain": f"{s['pretrain']['step']} steps, {s['pretrain']['tokens_per_second']:,.0f} tokens/s",
        "evaluate": f"{s['evaluate']['nats_per_token']:.3f} nats per token on held-out digits"
        f" (unigram by position {baselines['unigram_by_position']:.3f}, previous pixel"
        f" {baselines['bigram_previous_pixel']:.3f}, 2-D context {baselines['context_2d']:.3f})",
        "probe": f"{probe['accuracy']:.1%} at layer {probe['best_layer']} (untrained"
        f" {probe['untrained']['accuracy']:.1%}, raw pixels {probe['raw_pixels']['accuracy']:.1%});"
        f" with 25 labels per class {few(probe):.1%} ({few(probe['untrained']):.1%}, {few(probe['raw_pixels']):.1%})",
        "complete": f"{s['complete']['completions']} completions, {s['complete']['tokens_per_second']:,.0f} tokens/s",
        "score": f"{s['score']['images']} images scored",
        "serve": f"{s['serve']['completions']} completions over HTTP; a 3 is classified as a"
        f" {s['serve']['likeliest']['class']} with {s['serve']['likeliest']['probability']:.0%}",
    }
    lines = [f"{'stage':<10}{'seconds':>8}  result"]
    lines += [f"{name:<10}{s[name]['seconds']:>8.1f}  {text}" for name, text in results.items()]
    return "\n".join([*lines, f"{'total':<10}{report['seconds']:>8.1f}"])


def few(probed: Report) -> float:
    """Mean accuracy of the linear probe with few labels."""
    return float(probed["low_data"]["25"]["linear"]["mean"])


def log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    settings = tyro.cli(DemoConfig)
    try:
        with exits_on_interrupt():
            report = demo(settings)
    except IgptError as error:
        log(f"error: {error}")
        sys.exit(1)
    log(f"\n{table(report)}\n\nfigure: {settings.out}/completions.png    report: {settings.out}/report.json")
    log("next: make serve, and open http://127.0.0.1:8000/ in a browser")
    log(f"or: {curl_line('http://127.0.0.1:8000', settings.out + '/picture.png')}")
    print(json.dumps({"seconds": report["seconds"], "report": f"{settings.out}/report.json"}))
