"""Prepare text for training: read documents, tokenize them in parallel, write shards.

All output is written to a hidden folder next to the destination, which is renamed to the destination as the last step
(`parts`). So a folder at the destination is always complete. Its content does not depend on the number of workers or
processes.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mdmtrain.data.division import Division
from mdmtrain.data.inputs import Input, open_name
from mdmtrain.data.options import Options
from mdmtrain.data.parts import JOB, Preparation, Stage, in_use, kept_units, work_folder
from mdmtrain.data.records import Reading, check_inputs
from mdmtrain.data.shards import MANIFEST, PreparedSplit, read_manifest
from mdmtrain.data.staging import locked

STAGE_NAMES: dict[Stage, str] = {  # as shown to the user
    "tokenizer": "reading for the tokenizer",
    "hashes": "hashing documents",
    "duplicates": "finding duplicates",
    "parts": "tokenizing",
}
_KINDS = {"text": "text", "jsonl": "JSON lines", "parquet": "Parquet", "arrow": "Arrow", "tokens": "token ids"}
Progress = Callable[[str, int, int], None]  # phase, bytes of the input files that are done, all bytes


@dataclass
class Summary:
    out: Path
    manifest: dict[str, Any]
    already: bool  # nothing was done: the folder from these inputs and options existed already
    reading: Reading  # counts of the files that were read, and of the documents that were left out

    def lines(self, seconds: float) -> list[str]:
        """The lines that are printed at the end: sizes, counts and the time taken."""
        manifest = self.manifest
        fingerprint = self.manifest["fingerprint"][:12]
        if self.already:
            return [f"already prepared: {self.out} (same inputs and options; fingerprint {fingerprint})"]
        lines = []
        for split, content in manifest["splits"].items():
            learned = content.get("response_tokens")  # with eos
            text_tokens = learned - content["documents"] if learned else content["tokens"] - 2 * content["documents"]
            lines.append(
                f"{split:<10} {content['tokens']:>15,} tokens  {content['bytes']:>15,} bytes  "
                f"{content['bytes'] / text_tokens:.2f} bytes/token  "
                f"{content['documents']:>10,} documents  {len(content['shards'])} shards"
                + (f"  {learned:,} tokens of responses" if learned else "")
            )
        files = [f"{count:,} of {_KINDS[kind]}" for kind, count in sorted(self.reading.files.items())]
        return [
            *lines,
            f"files      {', '.join(files)}",
            *self.reading.summary(),
            f"vocabulary {manifest['tokenizer']['vocab_size']:,} pieces, {manifest['dtype']}",
            f"prepared   {self.out} (fingerprint {fingerprint}) in {seconds:.1f} s",
        ]


def prepare(
    inputs: Sequence[Input | Path], out: Path, options: Options, workers: int, progress: Progress | None = None
) -> Summary:
    """Prepare the files `inputs` into the folder `out`; does nothing if that was done before.

    Raises ValueError (bad input, one line) or OSError; `out` is then unchanged. Finished parts are kept for the next
    call (see `preparation`); if there are none, no file is left.
    """
    division = Division.of([one if isinstance(one, Input) else open_name(one) for one in inputs], options)
    if done := finished(division, out):
        return done
    with preparation(division, out) as making:
        for stage in making.stages():
            _do_stage(making, stage, workers, progress or (lambda phase, done, total: None))
        manifest, reading = making.finish(out)
    return Summary(out, manifest, False, reading)


def _do_stage(making: Preparation, stage: Stage, workers: int, progress: Progress) -> None:
    todo = making.pending(stage)
    if not todo:
        return
    total = sum(making.size(stage, unit) for unit in range(making.units(stage)))
    before = total - sum(making.size(stage, unit) for unit in todo)

    def report(done: int) -> None:
        progress(STAGE_NAMES[stage], before + done, total)

    with making.doing(stage, workers) as do:
        for unit in todo:
            do(unit, report)
            before += making.size(stage, unit)


def finished(division: Division, out: Path) -> Summary | None:
    """The summary of `out` if it was made from this division, None if it does not exist or is an empty folder.

    Raises ValueError if `out` is anything else.
    """
    if (out / MANIFEST).is_file():
        if not (work_folder(out) / "data").exists():  # killed between the final rename and the removal of this folder
            shutil.rmtree(work_folder(out), ignore_errors=True)
        manifest = read_manifest(out)
        if manifest["made_from"] != division.made_from:
            raise ValueError(f"{out} holds data made from other inputs or options: remove it or choose another --out")
        for split in manifest["splits"]:
            PreparedSplit(out, split)
        return Summary(out, manifest, True, division.options.reading())
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} exists and is not a prepared folder: choose another --out")
    return None


@contextmanager
def preparation(division: Division, out: Path) -> Iterator[Preparation]:
    """Begin or resume the preparation of `out` in a locked work folder next to it, which is removed at the end.

    The work folder is kept if the block fails and units are finished, and after SIGKILL; the next call resumes from it.
    Raises ValueError if another process prepares `out`, or if the block fails; the message says which units are kept.
    """
    work = work_folder(out)
    making = Preparation(division, work)
    try:
        with locked(work, out):
            making.refuse_other_options()
            try:
                making.begin()
                if not (work / JOB).exists():
                    making.clean()
                if not in_use(work):
                    check_inputs(division.inputs, division.options.reading())
                yield making
            except ValueError as error:
                raise ValueError(f"{error}{_kept(work)}") from error
            finally:
                if (out / MANIFEST).is_file() or not in_use(work):
                    shutil.rmtree(work, ignore_errors=True)
    except BrokenProcessPool:
        why = "a worker was killed (out of memory?): use fewer --workers"
        raise ValueError(f"preparing {out} failed: {why}{_kept(work)}") from None
    except OSError as error:
        problem = f"{error.filename or out}: {error.strerror or error}"
        raise ValueError(f"preparing {out} failed: {problem}{_kept(work) or '; nothing was written'}") from None


def _kept(work: Path) -> str:
    kept = kept_units(work)
    return f"; finished units kept: {kept}; the same command resumes" if kept else ""
