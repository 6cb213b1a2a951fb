"""The pixel loop on the device: several positions of all slots per call, without a decision of the host.

The state of the slots is in tensors of fixed shape, and a step reads and writes only these. On CUDA it is recorded as a
graph: one launch instead of hundreds. The host waits once per call of `run`.
"""

import importlib.util
import logging
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from igpt_ray.generate import sampler
from igpt_ray.generate.kv_cache import KVCache, without_cudnn

WARM_UP_RUNS = 2
"""Runs before the recording, because libraries allocate and compile in the first."""
SHAPES = 64
"""Shapes that torch.compile compiles a block for in one process, where its own limit is 8."""

log = logging.getLogger(__name__)


class DeviceLoop:
    """State of all slots of a `KVCache`, and the step that advances the active slots by one position."""

    def __init__(self, cache: KVCache, compiled: bool | None = None):
        """`compiled`: run the blocks by torch.compile, which takes seconds here; None: on CUDA with Triton, unless
        the kernels of `triton_linear` leave nothing to compile.

        A failure of torch.compile is logged as a warning, and the blocks run without it.
        """
        config, n, device = cache.network.config, cache.slots, cache.device
        T = config.n_positions
        self.cache = cache
        self.positions = torch.zeros(n, dtype=torch.long, device=device)
        self.active = torch.zeros_like(self.positions)
        """1 for the slots that advance, 0 for the others. These compute position 0, which is written before its use."""
        self.tokens = torch.zeros(n, T, dtype=torch.long, device=device)
        """(slots, T): the prompt, and each pixel as it is generated."""
        self.prompt_mask = torch.zeros(n, T, dtype=torch.bool, device=device)
        self.uniforms = torch.zeros(n, T, dtype=torch.float64, device=device)
        self.temperature = torch.ones(n, dtype=torch.float64, device=device)
        self.top_k = torch.zeros(n, dtype=torch.long, device=device)
        self.top_p = torch.ones(n, dtype=torch.float64, device=device)
        if compiled is None:
            triton = device.type == "cuda" and importlib.util.find_spec("triton") is not None
            compiled = triton and (not cache.fused or config.rotary or config.qk_norm)
        self.sampler = self._sampler_of_triton() if device.type == "cuda" else None
        """The module `triton_sampler`, or None without it."""
        self.compiled = compiled and self._compile()
        self._steps: list[Callable[[], None]] = [self._plain_step, self._filtered_step]
        if device.type == "cuda":
            self._steps = [_recorded(step, device) for step in self._steps]

    @torch.inference_mode()
    def _sampler_of_triton(self) -> ModuleType | None:
        """Import Triton's sampling, and compare it with torch's; None, with a warning, if it fails or differs."""
        try:
            from igpt_ray.generate import triton_sampler

            n, V = len(self.positions), self.cache.network.config.n_vocab
            generator = torch.Generator().manual_seed(0)
            logits = torch.randn(n, V, generator=generator).to(self.cache.kv)
            uniforms = torch.rand(self.uniforms.shape, generator=generator, dtype=torch.float64).to(
                self.uniforms.device
            )
            tokens, positions = torch.zeros_like(self.tokens), torch.zeros_like(self.positions)
            state = self.temperature, self.prompt_mask, tokens, positions, self.active
            triton_sampler.sample(logits, uniforms, *state)
            if not torch.equal(tokens[:, 0], sampler.sample(logits, uniforms[:, 0], self.temperature, None)):
                raise RuntimeError("its samples differ from those of torch's operations")
            self.sampler, self.compiled = triton_sampler, False
            self._plain_step()
            return triton_sampler
        except Exception:
            log.warning("Triton's sampling kernels cannot be used; sampling takes torch's operations", exc_info=True)
            return None

    def _compile(self) -> bool:
        """Compile the blocks in a first step; returns whether this worked."""
        self.compiled = True
        try:
            with torch._dynamo.config.patch(recompile_limit=SHAPES), without_cudnn():
                self._plain_step()
        except Exception:
            log.warning("torch.compile failed; the decode step runs without it", exc_info=True)
            return False
        return True

    @torch.inference_mode()
    def load(
        self,
        slots: Sequence[int],
        tokens: Tensor,
        prompt_mask: Tensor,
        uniforms: Tensor,
        temperature: Sequence[float],
        top_k: Sequence[int],
        top_p: Sequence[float],
    ) -> None:
        """Set the state of `slots`: tokens, mask and uniforms are (len(slots), T), the others have a value per slot."""
        device = self.tokens.device
        rows = torch.tensor(slots, device=device)
        self.tokens[rows] = tokens.to(device)
        self.prompt_mask[rows] = prompt_mask.to(device)
        self.uniforms[rows] = uniforms.to(device)
        for state, value in ((self.temperature, temperature), (self.top_k, top_k), (self.top_p, top_p)):
            state[rows] = torch.tensor(value, dtype=state.dtype, device=device)

    @torch.inference_mode()
    def run(self, slots: Sequence[int], positions: Sequence[int], steps: int, filtered: bool) -> Tensor:
        """Advance `slots` from their `positions` by `steps`, and return the tokens (slots, T) of all slots on the CPU.

        `filtered`: a slot uses top_k or top_p. Without them a step needs no sort.
        """
        state = torch.zeros(2, len(self.positions), dtype=torch.long)
        state[:, list(slots)] = torch.tensor([list(positions), [1] * len(slots)])
        positions_and_active = state.to(self.positions.device)
        self.positions.copy_(positions_and_active[0])
        self.active.copy_(positions_and_active[1])
        step = self._steps[filtered]
        for _ in range(steps):
            step()
        return self.tokens.cpu()

    def _plain_step(self) -> None:
        self._step(filtered=False)

    def _filtered_step(self) -> None:
        self._step(filtered=True)

    @torch.inference_mode()
    def _step(self, filtered: bool) -> None:
        if self.sampler is not None and not filtered:
            m = self.cache.network
            h = self.sampler.embed(self.tokens, self.positions, m.wte.weight, m.wpe, m.sos)
            logits = self.cache.decode_all(h, self.positions, self.compiled)
            state = self.uniforms, self.temperature, self.prompt_mask, self.tokens, self.positions, self.active
            self.sampler.sample(logits, *state)
            return
        here = self.positions[:, None]
        previous_tokens = self.tokens.gather(1, (here - 1).clamp_min(0))[:, 0]
        logits = self.cache.forward_all(self.positions, previous_tokens, self.compiled)
        kept = (self.top_k, self.top_p) if filtered else None
        sampled = sampler.sample(logits, self.uniforms.gather(1, here)[:, 0], self.temperature, kept)[:, None]
        self.tokens.scatter_(
            1, here, torch.where(self.prompt_mask.gather(1, here), self.tokens.gather(1, here), sampled)
        )
        # No index may leave the tensors on CUDA, where it would end the process.
        self.positions.add_(self.active).clamp_max_(self.tokens.shape[1] - 1)


def _recorded(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Record `step` as a CUDA graph and return its replay, or `step` with a warning if that fails.

    The state of the slots is undefined afterwards.
    """
    try:
        with torch.cuda.device(device), without_cudnn():
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP_RUNS):
                    step()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads, for example of a server that also scores images, may allocate memory during the recording.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                step()
    except Exception:
        log.warning("recording a CUDA graph failed; each operation of a step is launched on its own", exc_info=True)
        return step
    return graph.replay
