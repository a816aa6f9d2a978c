"""Every operation against its oracle on many random convolutions, on every backend.

    python -m tests.sweeps.operations [--cases 20000] [--seed 0] [--backend NAME] [--workers 2] [--minutes 30]
        [--resume FILE]

Case k of a seed is always the same one; a failure is printed with the command that runs that case alone. Results are
appended to a file of JSON lines, from which `--resume` goes on. The exit status is 0 if all cases ran and passed, 1 if
any failed, 2 if time ran out before that.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from tests.support.oracles import OPERATIONS, Case, make_case
from tests.support.strategies import random_call

jax.config.update("jax_enable_x64", True)
BACKENDS = ("numpy", "torch", "jax")
TOLERANCE = 1e-10
CHUNK = 40
Result = dict[str, Any]


# ------------------------------------------------------------------------------------------------------- a single case
def case_of(seed: int, k: int, backend: str | None = None) -> tuple[Case, str]:
    """Case k of a seed, and its backend: operations take turns, and each its backends if none is given."""
    op = tuple(OPERATIONS)[k % len(OPERATIONS)]
    backend = backend or BACKENDS[k // len(OPERATIONS) % len(BACKENDS)]
    return make_case(op, **random_call(np.random.default_rng([seed, k]), op)), backend


def as_array(array: np.ndarray, backend: str, dtype: str | None = None) -> Any:
    """A backend's own copy of an array, in a dtype."""
    if backend == "numpy":
        return array.astype(dtype or array.dtype)
    if backend == "jax":
        return jnp.array(array, dtype or array.dtype)
    tensor = torch.from_numpy(array)
    return tensor.to(getattr(torch, dtype), copy=True) if dtype else tensor.clone()


def mismatch(found: Any, expected: np.ndarray, backend: str, dtype: str | None = None, rtol: float = TOLERANCE) -> str:
    """What is wrong with a result, or nothing; differences are measured by the largest expected entry."""
    kind = {"numpy": np.ndarray, "torch": torch.Tensor, "jax": jax.Array}[backend]
    if not isinstance(found, kind):
        return f"result is a {type(found).__name__}, expected a {kind.__name__}"
    dtype = dtype or str(expected.dtype)
    if str(found.dtype).removeprefix("torch.") != dtype:
        return f"result has dtype {found.dtype}, expected {dtype}"
    if tuple(found.shape) != expected.shape:
        return f"result has shape {tuple(found.shape)}, expected {expected.shape}"
    if isinstance(found, torch.Tensor):
        found = found.detach().to(getattr(torch, str(expected.dtype)))
    values = np.asarray(found)
    difference = np.abs(values.astype(expected.dtype) - expected)
    largest = max(1.0, float(np.abs(expected).max(initial=0.0)))
    wrong = ~(difference <= rtol * largest)
    if not wrong.any():
        return ""
    at = tuple(int(i) for i in np.unravel_index(int(np.argmax(np.where(wrong, difference, -1.0))), wrong.shape))
    return (
        f"{int(wrong.sum())} of {wrong.size} entries differ, the largest by {difference[at]:.3g} at {list(at)}: found"
        f" {values[at]}, expected {expected[at]}"
    )


def check(case: Case, backend: str, dtype: str | None = None, rtol: float = TOLERANCE) -> str:
    """Evaluate a case on a backend: what is wrong with the result or with the operands afterwards, or nothing."""
    import lensor

    network = getattr(lensor.ops, case.op)(lensor.ConvSpec(**case.spec), **case.options)
    operands = {name: as_array(array, backend, dtype) for name, array in case.operands.items()}
    before = {name: as_array(array, backend, dtype) for name, array in case.operands.items()}
    problem = mismatch(network(**operands, **case.sizes), case.expected, backend, dtype, rtol)
    changed = [name for name, array in operands.items() if not bool((array == before[name]).all())]
    return problem or (f"operand {changed[0]} was changed" if changed else "")


def run_case(seed: int, k: int, on: str | None = None) -> Result:
    """The line of case k for the state file."""
    start = time.perf_counter()
    result: Result = {"k": k}
    try:
        case, backend = case_of(seed, k, on)
        result |= {"op": case.op, "backend": backend}
        problem = ""
        try:
            problem = check(case, backend)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}\n{traceback.format_exc(limit=-3)}"
        if problem:
            result |= {"problem": problem, "call": case.call}
    except Exception:
        # Not a case that failed, but one that could not be made: the oracle's fault, and just as bad.
        result |= {"op": "?", "backend": "?", "problem": f"no oracle: {traceback.format_exc(limit=-3)}", "call": "?"}
    result["seconds"] = round(time.perf_counter() - start, 4)
    return result


def run_chunk(seed: int, cases: Sequence[int], on: str | None) -> list[Result]:
    """Several cases, in a worker."""
    found = [run_case(seed, k, on) for k in cases]
    jax.clear_caches()
    return found


def _start_worker() -> None:
    """One thread for torch, and no worker left behind if the sweep is killed."""
    torch.set_num_threads(1)
    if parent := parent_process():
        Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


# ----------------------------------------------------------------------------------------------------- the whole sweep
class State:
    """The state file: a first line with the seed, then a line for each case."""

    def __init__(self, path: Path, seed: int) -> None:
        self.path, self.results = path, dict[int, Result]()
        if path.exists() and path.stat().st_size:
            self._read(seed)
        else:
            path.write_text(json.dumps({"seed": seed}) + "\n")

    def _read(self, seed: int) -> None:
        first, *lines = self.path.read_text().splitlines(keepends=True)
        found = json.loads(first).get("seed")
        if found != seed:
            raise SystemExit(f"{self.path} is of seed {found}, expected seed {seed}")
        complete = [line for line in lines if line.endswith("\n")]
        for line in complete:
            result = json.loads(line)
            self.results[result["k"]] = result
        if complete != lines:
            # The last run was stopped within a line.
            self.path.write_text(first + "".join(complete))

    def add(self, results: Iterable[Result]) -> None:
        """Append lines."""
        with self.path.open("a") as file:
            for result in results:
                self.results[result["k"]] = result
                file.write(json.dumps(result) + "\n")


@contextmanager
def progress(total: int, done: int) -> Iterator[Callable[[int, int], None]]:
    """A bar with the time left, or without rich a line every ten seconds; call it with cases done and failed."""
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        start, said = time.monotonic(), [0.0]

        def say(now: int, failed: int) -> None:
            elapsed = time.monotonic() - start
            if elapsed - said[0] >= 10 or now == total:
                said[0] = elapsed
                left = elapsed / max(1, now - done) * (total - now)
                print(f"{now}/{total} cases, {failed} failed, {left / 60:.1f} minutes left", flush=True)

        yield say
        return
    time_left = TimeRemainingColumn(elapsed_when_finished=True)
    with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), time_left) as bar:
        task = bar.add_task("0 failed", total=total, completed=done)
        yield lambda now, failed: bar.update(task, completed=now, description=f"{failed} failed")


def described(result: Result) -> str:
    """A case that failed: the call and what is wrong."""
    return f"{result['call']}\n  on {result['backend']}: {result['problem']}"


def rerun_command(seed: int, result: Result) -> str:
    """What runs the case of a result alone."""
    return f"python -m tests.sweeps.operations --seed {seed} --case {result['k']} --backend {result['backend']}"


def sweep(state: State, seed: int, cases: int, workers: int, minutes: float, on: str | None = None) -> None:
    """Run all cases that the state has no result for, until they are done or time is out."""
    left = [k for k in range(cases) if k not in state.results]
    chunks = deque(left[at : at + CHUNK] for at in range(0, len(left), CHUNK))
    deadline = time.monotonic() + 60 * minutes
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_start_worker)
    running: dict[Future[list[Result]], list[int]] = {}
    failed = sum("problem" in result for result in state.results.values())
    try:
        with progress(cases, cases - len(left)) as say:
            while chunks or running:
                while chunks and len(running) < 2 * workers:
                    chunk = chunks.popleft()
                    running[pool.submit(run_chunk, seed, chunk, on)] = chunk
                finished, _ = wait(running, max(0.0, deadline - time.monotonic()), FIRST_COMPLETED)
                if not finished:
                    break
                for future in finished:
                    results = future.result()
                    del running[future]
                    state.add(results)
                    failed += sum("problem" in result for result in results)
                say(sum(k < cases for k in state.results), failed)
    except BrokenProcessPool:
        print(f"a worker died in one of the cases {sorted(k for chunk in running.values() for k in chunk)}")
        raise
    finally:
        # Workers that hang in a case would be waited for.
        for process in list((pool._processes or {}).values()):
            with suppress(ProcessLookupError):
                process.terminate()
        pool.shutdown(cancel_futures=True)


def report(results: Sequence[Result], cases: int, seed: int, shown: int = 40) -> int:
    """Print failures and counts; the exit status."""
    failures = [result for result in results if "problem" in result]
    for result in failures[:shown]:
        print(f"\n{described(result)}\n  {rerun_command(seed, result)}")
    if len(failures) > shown:
        print(f"\n... and {len(failures) - shown} more")
    counts = Counter((result["op"], result["backend"]) for result in results)
    wrong = Counter((result["op"], result["backend"]) for result in failures)
    print(f"\n{'operation':26}" + "".join(f"{backend:>8}{'failed':>8}" for backend in BACKENDS))
    for op in [*OPERATIONS, *(["?"] if any(result["op"] == "?" for result in results) else [])]:
        backends = ("?",) if op == "?" else BACKENDS
        print(f"{op:26}" + "".join(f"{counts[op, backend]:8}{wrong[op, backend]:8}" for backend in backends))
    fewest = min(counts[op, backend] for op in OPERATIONS for backend in {result["backend"] for result in results})
    print(f"\nfewest cases of an operation on a backend: {fewest}")
    seconds = sum(result["seconds"] for result in results)
    print(f"\n{len(results)} of {cases} cases, {len(failures)} failed, {seconds:.0f} seconds of work")
    return 1 if failures else 2 if len(results) < cases else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.sweeps.operations", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=20_000, help="number of cases (default: 20000)")
    parser.add_argument("--seed", type=int, default=0, help="what the cases are drawn from (default: 0)")
    parser.add_argument("--backend", choices=BACKENDS, help="run all cases on this backend")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="processes (default: 2)")
    parser.add_argument("--minutes", type=float, default=30, help="time after which to stop (default: 30)")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="results to go on from and append to")
    parser.add_argument("--case", type=int, metavar="K", help="run this case alone")
    options = parser.parse_args(arguments)
    if options.case is not None:
        _start_worker()
        result = run_case(options.seed, options.case, options.backend)
        print(described(result) if "problem" in result else json.dumps(result))
        return int("problem" in result)
    path = options.resume
    if path is None:
        handle, name = tempfile.mkstemp(prefix=f"sweep-{options.seed}-", suffix=".jsonl")
        os.close(handle)
        path = Path(name)
    print(f"results go to {path}")
    state = State(path, options.seed)
    sweep(state, options.seed, options.cases, options.workers, options.minutes, options.backend)
    results = [state.results[k] for k in sorted(state.results) if k < options.cases]
    status = report(results, options.cases, options.seed)
    if len(results) < options.cases:
        print(f"time is out; go on with --seed {options.seed} --cases {options.cases} --resume {path}")
    return status


if __name__ == "__main__":
    sys.exit(main())
