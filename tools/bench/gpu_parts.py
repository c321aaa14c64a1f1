"""The parts of gpu_check.py. Each is a function of (report, place) that runs in a separate process."""

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from meter import (
    changed,
    new_model,
    product_ceiling,
    random_batch,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

from mdmtrain import config as configuration
from mdmtrain.checkpoint import store
from mdmtrain.config import Config
from mdmtrain.diffusion.objective import MaskedBatch
from mdmtrain.model.presets import ModelShape, model_shape
from mdmtrain.model.transformer import Transformer
from mdmtrain.muon import local, local_gradient
from mdmtrain.parallel.watchdog import Watchdog
from mdmtrain.parallel.world import World, init_world
from mdmtrain.train import build_state, open_inputs, train_from

ROOT = Path(__file__).resolve().parent.parent.parent
TEXT = ("nn", "optim", "distributed", "fx", "utils")  # folders of torch; their source code is the corpus


@dataclass(frozen=True)
class Place:
    """The folders and sizes that the parts use."""

    folder: Path  # scratch folder of this invocation
    data: Path  # the prepared corpus
    rehearsal: bool  # run on a CPU with tiny sizes
    repeat: int  # rounds of each benchmark

    def pick(self, there, here):
        """The first value on a GPU, the second one in a rehearsal."""
        return here if self.rehearsal else there


@dataclass
class Report:
    """The results of a part. Each one is written to the file at once, so that it is not lost if the part crashes."""

    file: Path
    checks: dict[str, dict] = field(default_factory=dict)
    numbers: dict = field(default_factory=dict)
    error: str | None = None

    def check(self, name: str, good: bool, detail: str) -> None:
        self.checks[name] = {"good": bool(good), "detail": detail}
        self.write()

    def note(self, **numbers) -> None:
        self.numbers |= numbers
        self.write()

    def write(self) -> None:
        found = {"checks": self.checks, "numbers": self.numbers, "error": self.error}
        store.write_atomically(self.file, json.dumps(found))


@cache
def the_world() -> World:
    """The world of this process: one rank."""
    return init_world()


# ---- the machine, the text


def device(report: Report, place: Place) -> None:
    """Describe the device, and measure the speed of its matrix products."""
    here = the_world().device
    numbers: dict[str, Any] = {"torch": torch.__version__, "device": str(here)}
    if here.type == "cuda":
        facts = torch.cuda.get_device_properties(here)
        numbers |= {"name": facts.name, "memory_bytes": facts.total_memory, "cuda": torch.version.cuda}
    report.note(**numbers)
    shape = ModelShape(vocab_size=64, d_model=256, n_layers=1, n_heads=4, n_kv_heads=4, d_ff=1024)
    for dtype in (torch.bfloat16, torch.float32):
        report.note(**{f"{str(dtype)[6:]}_flops": product_ceiling(the_world(), dtype, shape, place.pick(8192, 256))})


def corpus(report: Report, place: Place) -> None:
    """Prepare the Python source code of torch as data."""
    if not place.data.exists():
        source = Path(torch.__file__).parent
        inputs = [str(source / name) for name in place.pick(TEXT, TEXT[1:2])]
        command = [sys.executable, str(ROOT / "tools/prepare_data.py"), *inputs, "--include", "*.py"]
        options = ["--vocab-size", str(place.pick(4096, 512)), "--validation-fraction", "0.05"]
        subprocess.run([*command, *options, "--out", str(place.data)], check=True)
    report.check("prepared", (place.data / store.TOKENIZER_FILE).is_file(), str(place.data))


# ---- the model's parts against references


def attention(report: Report, place: Place) -> None:
    """Compare the model's attention on this device with float32 SDPA on the CPU, with and without documents."""
    world = the_world()
    length = place.pick(512, 64)
    shape = ModelShape(vocab_size=256, d_model=256, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=512)
    generator = torch.Generator().manual_seed(1)
    reference = Transformer(shape, 1 << 20)
    for parameter in reference.parameters():
        with torch.no_grad():
            parameter.normal_(0, 0.1, generator=generator) if parameter.ndim > 1 else parameter.fill_(1.0)
    ids = torch.randint(shape.vocab_size, (4, length), generator=generator)
    segments = (torch.rand(4, length, generator=generator) < 8 / length).cumsum(1).int()
    segments[-1, -length // 4 :] = -1  # padding
    positions = (segments.flatten() >= 0).nonzero().squeeze(1)

    def loss_and_gradients(model: Transformer, documents: bool) -> tuple[torch.Tensor, torch.Tensor]:
        there = next(model.parameters()).device
        one = ids.to(there)
        where = positions.to(there)
        ce = model(one, where, one.flatten()[where], segments.to(there) if documents else None)
        ce.sum().backward()
        gradients = torch.cat([local_gradient(p).flatten().float().cpu() for p in model.parameters()])
        model.zero_grad()
        return ce.detach().float().cpu(), gradients

    def distance(one: tuple, other: tuple) -> float:
        return max(float((a - b).norm() / b.norm()) for a, b in zip(one, other, strict=True))

    with sdpa_kernel(SDPBackend.MATH):
        exact = {documents: loss_and_gradients(reference, documents) for documents in (False, True)}
        rounded = loss_and_gradients(copy.deepcopy(reference).bfloat16(), True)
    missing = distance(exact[False], exact[True])  # the error of ignoring the documents
    # The limit for bfloat16 is twice the error that rounding alone causes in the reference.
    limits = {torch.float32: 1e-3, torch.bfloat16: 2 * distance(rounded, exact[True])}
    for dtype, limit in limits.items():
        model = copy.deepcopy(reference).to(world.device, dtype)
        for documents in (False, True):
            far = distance(loss_and_gradients(model, documents), exact[documents])
            name = f"{str(dtype)[6:]}, {'documents' if documents else 'whole rows'}"
            report.check(name, far < limit, f"relative error {far:.1e}, limit {limit:.1e}; without mask {missing:.1e}")
    sdpa_backends(report, world, length)


def sdpa_backends(report: Report, world: World, length: int) -> None:
    """Find the kernels that SDPA has on this device, and compare them with the exact result in float32."""
    q, k, v = (torch.randn(2, 4, length, 64, device=world.device) for _ in range(3))
    with sdpa_kernel(SDPBackend.MATH):
        exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    backends = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION)
    for backend in backends:
        try:
            with sdpa_kernel(backend):
                out = torch.nn.functional.scaled_dot_product_attention(q.bfloat16(), k.bfloat16(), v.bfloat16())
        except RuntimeError as error:
            report.note(**{backend.name: f"not available: {str(error)[:80]}"})
            continue
        far = float((out.float() - exact).norm() / exact.norm())
        report.check(f"SDPA {backend.name}, bfloat16", far < 2e-2, f"relative error {far:.1e}")


def graphs(report: Report, place: Place) -> None:
    """Check that torch.compile makes no new graphs after the first micro-batch of a kind, for any number of masks."""
    from torch._dynamo.utils import counters

    world = the_world()
    config = example(place, "170m", "model.n_layers=4", "run.micro_batch=4", "parallel.compile=true")
    shape = model_shape(config.model, 0)
    compiled = new_model(config, shape, world)
    eager = new_model(changed(config, "parallel", compile=False), shape, world)
    batch = random_batch(config, shape).to(world.device)
    segments = torch.arange(config.data.sequence_length, device=world.device).div(40, rounding_mode="floor")
    segments = segments.int().expand(batch.noisy.shape).contiguous()
    made = []
    for documents in (None, segments):
        for some in (1, 2, 3):
            # Contiguous, as in training: the compiler makes a graph of its own for other strides.
            kept = (part[::some].contiguous() for part in (batch.positions, batch.targets, batch.weights, batch.unit))
            few = MaskedBatch(batch.noisy, *kept)
            # First, because eager mode has a graph too: that of flex attention.
            expected = eager(few.noisy, few.positions, few.targets, documents)
            expected.sum().backward()
            ce = compiled(few.noisy, few.positions, few.targets, documents)
            ce.sum().backward()
            made.append(counters["stats"]["unique_graphs"])
            far = float((ce - expected).norm() / expected.norm())
            kind = "whole rows" if documents is None else "documents"
            report.check(f"{kind}, every {some}. position", far < 2e-2, f"relative error {far:.1e} to eager mode")
    report.note(graphs=made)
    report.check("steady", made[0] == made[2] and made[3] == made[5], f"graphs after each micro-batch: {made}")
    report.check("few", made[5] <= 8, f"{made[5]} graphs for 4 blocks")


# ---- the loop


def example(place: Place, name: str, *more: str) -> Config:
    """configs/NAME.yaml with a vocabulary of 32,768, or with tiny sizes in a rehearsal."""
    tiny = ["model.d_model=64", "model.n_layers=2", "model.n_heads=4", "model.n_kv_heads=4", "model.d_ff=128",
            "data.sequence_length=64", "run.micro_batch=2", "parallel.compute_dtype=float32"]  # fmt: skip
    # Small enough for every switch to fit, compiled or not.
    small = [f"run.micro_batch={32 if name == '170m' else 8}", "parallel.compile=false", "parallel.head_chunk=4096"]
    changes = ["model.vocab_size=32768", *small, *more, *(["model.vocab_size=256", *tiny] if place.rehearsal else [])]
    return configuration.load([str(ROOT / f"configs/{name}.yaml"), *changes])


def small_run(place: Place, name: str, **run) -> Config:
    """A configuration to train on the corpus, with two micro-steps, EMA and documents."""
    tree = {
        "run": {"dir": str(place.folder / name), "global_batch": 16, "micro_batch": 8, **run},
        "model": {"d_model": 128, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 256},
        "data": {"sources": [{"path": str(place.data)}], "sequence_length": place.pick(256, 64),
                 "workers": place.pick(2, 0), "document_mask": True, "verify": "size"},
        "optim": {"lr": 3e-3, "ema_decay": 0.9},
        "parallel": {"compute_dtype": place.pick("bfloat16", "float32")},
        "checkpoint": {"save_every": 4, "keep_last": 9},
        "monitor": {
            "log_every": 4,
            "tensorboard": False,
            "probe_every": 12,
            "probe_sequences": 4,
            "probe_rates": 2,
            "probe_masks": 2,
        },
        "eval": {"every": run["steps"], "rows": 4, "samples": 1},
    }  # fmt: skip
    return configuration.validate(tree, "gpu_check")


class StepWatch(Watchdog):
    """Calls begin(step) when the loop begins a step (counted from 1), and read() before it reads the device."""

    def __init__(self, config: Config, begin: Callable[[int], None], read: Callable[[], None] = lambda: None):
        super().__init__(the_world(), config.run)
        self._begin, self._read = begin, read

    def at(self, phase: str, step: int | None = None) -> None:
        super().at(phase, step)
        if step is not None:
            self._begin(step + 1)
        elif phase == "log":
            self._read()


def train(config: Config, watch: Watchdog | None = None, hook: Callable[[Transformer], None] | None = None) -> list:
    """Train and return the records. hook: called with the model before the first step, to register hooks."""
    world = the_world()
    watch = watch or Watchdog(world, config.run)
    with redirect_stdout(StringIO()):
        inputs = open_inputs(config, world, watch)
        state = build_state(inputs, config, world)
        if hook is not None:
            hook(state.model)
        train_from(state, inputs, config, world, watch)
    lines = (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "split" not in record]


def sync_free(report: Report, place: Place) -> None:
    """Check that the training loop does not wait for the device: from step 4 on it may wait only in flushes."""
    cuda = not place.rehearsal
    config = changed(small_run(place, "sync", steps=16), "checkpoint", save_every=16)

    def mode(name: str) -> None:
        if cuda:
            torch.cuda.set_sync_debug_mode(name)

    watch = StepWatch(config, lambda step: mode("error" if step >= 4 else "default"), lambda: mode("default"))
    records = train(config, watch)
    report.check("16 steps", len(records) == 16 and not any(r["skipped"] for r in records), "no wait for the device")


def nan_skip(report: Report, place: Place) -> None:
    """Check that a step with a NaN loss is skipped on the device: no weight changes, and the next step is normal."""
    config = small_run(place, "nan", steps=12)
    models: list[Transformer] = []
    weights: dict[int, torch.Tensor] = {}
    now = [0]

    def begin(step: int) -> None:
        now[0] = step
        if step in (6, 7, 8):
            weights[step] = torch.cat([local(p).detach().flatten().clone() for p in models[0].parameters()])

    def poison(model: Transformer) -> None:
        models.append(model)
        model.head.register_forward_hook(lambda _head, _rows, ce: ce * float("nan") if now[0] == 6 else None)

    records = train(config, StepWatch(config, begin), poison)
    skipped = [record["step"] for record in records if record["skipped"]]
    report.check("counted", skipped == [6], f"skipped: {skipped}, poisoned: [6]")
    report.check("no weight moved", torch.equal(weights[6], weights[7]), "bits of all weights before and after")
    report.check("the next step learns", not torch.equal(weights[7], weights[8]), "weights after step 7")
    report.check("finite after it", all(r["loss"] is not None for r in records[6:]), "losses of steps 7 to 12")


def saves(report: Report, place: Place) -> None:
    """Check that asynchronous checkpoints have the state of their own step: a resumed run has the same losses."""
    whole = small_run(place, "whole", steps=12)
    records = train(whole)
    folders = store.complete_checkpoints(Path(whole.run.dir))
    report.check("complete", [f.name for f in folders] == [f"step-{s:08d}" for s in (4, 8, 12)], str(len(folders)))
    again = changed(whole, "run", dir=str(place.folder / "again"))
    shutil.copytree(folders[0], Path(again.run.dir) / "checkpoints" / folders[0].name)
    resumed = train(again)
    losses = [[record["loss"] for record in run if record["step"] > 4] for run in (records, resumed)]
    first, *later = (abs(a - b) for a, b in zip(*losses, strict=True))
    report.check("its own step", first < 1e-4, f"loss of the step after it: {first:.1e} nats apart")
    report.check("same losses", max(first, *later) < 0.1, f"losses of 8 steps: {max(first, *later):.1e} nats apart")


def save_stall(report: Report, place: Place) -> None:
    """Measure how long a save delays training, asynchronous and synchronous."""
    file = place.folder / "save.json"
    sizes = place.pick(["--layers", "16", "--saves", "3"], ["--layers", "1", "--saves", "1"])
    command = [sys.executable, str(ROOT / "tools/bench/save.py"), "--out", str(place.folder / "saves"), *sizes]
    subprocess.run([*command, "--json", str(file)], check=True)
    report.note(**json.loads(file.read_text()))
