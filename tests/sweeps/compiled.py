"""Compiled passes over random models: the same numbers as uncompiled ones, before and after the weights change.

python -m tests.sweeps.compiled --models 200 --seed 0
"""

from __future__ import annotations

import argparse
import collections
import random
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lensor import curvature
from lensor.curvature import compiled
from tests.support.models import COMPILED, Case, make_case

NOT_TRACED = ("cannot be traced", "cannot be compiled")


def kfac(case: Case, approx: str, fisher: str, compile: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    options: dict[str, Any] = {"approx": approx, "fisher": fisher, "generator": generator, "compile": compile}
    blocks = curvature.kfac(case.model, case.loss.given, [case.data, case.data], **options)
    return {f"{name} {kind}": getattr(block, kind) for name, block in blocks.items() for kind in "AB"}


def functions(case: Case, rng: random.Random) -> dict[str, Callable[[Any], dict[str, Tensor]]]:
    """Functions of how the pass is compiled."""
    approx, fisher = rng.choice(("expand", "reduce")), rng.choice(("type-2", "mc", "empirical", "forward-only"))

    def clipped(compile: Any) -> dict[str, Tensor]:
        found = curvature.clipped_gradients(
            case.model, case.loss.given, case.data, 0.1, reduction="sum", compile=compile
        )
        return found.gradients | {"norms": found.norms}

    return {
        f"kfac {approx} {fisher}": lambda compile: kfac(case, approx, fisher, compile),
        "gradients": lambda compile: curvature.per_example_gradients(
            case.model, case.loss.given, case.data, compile=compile
        ),
        "norms": lambda compile: curvature.per_example_gradient_norms(
            case.model, case.loss.given, case.data, compile=compile
        ),
        "clipped": clipped,
    }


def run_case(seed: int, trait: str | None = None) -> list[tuple[str, str]]:
    """The outcome of each function on the model of a seed."""
    case = make_case(seed, None if trait is None else [trait])
    if any(one in COMPILED for one in case.traits):
        return []
    found = []
    compiled.passes.clear()
    for name, function in functions(case, random.Random(seed)).items():
        found.append((name, _outcome(case, function)))
    return found


def _outcome(case: Case, function: Callable[[Any], dict[str, Tensor]]) -> str:
    tolerance = 1e-3 if case.dtype == torch.float32 else 1e-9

    def called(compile: Any) -> dict[str, Tensor] | str:
        with warnings.catch_warnings(), case.world(), case.situation() as trouble:
            warnings.simplefilter("ignore")
            try:
                result = function(compile)
            except (ValueError, TypeError, NotImplementedError) as error:
                return f"{type(error).__name__}: {error}"
        return trouble[0] if trouble else result

    for change in (1.0, 0.9):
        with torch.no_grad():
            for parameter in case.model.parameters():
                if not parameter.is_inference():
                    parameter.mul_(change)
        expected = called(False)
        for time in ("first", "second"):
            result = called("eager")
            if isinstance(result, str) and any(text in result for text in NOT_TRACED):
                return f"not traced: {result[:160]}"
            if isinstance(expected, str) and "cannot be found" in expected and not isinstance(result, str):
                continue  # a graph does not look for the axis of the examples again
            if isinstance(expected, str) or isinstance(result, str):
                if isinstance(expected, str) and isinstance(result, str):
                    return "refused"
                return f"WRONG: {time}, uncompiled {str(expected)[:200]}, compiled {str(result)[:200]}"
            if list(expected) != list(result):
                return f"WRONG: {time}, {list(expected)} and {list(result)}"
            for key, one in expected.items():
                largest = float(one.abs().max()) if one.numel() else 0.0
                if one.shape != result[key].shape or one.dtype != result[key].dtype:
                    return f"WRONG: {time}, {key}: {one.shape} {one.dtype}, {result[key].shape} {result[key].dtype}"
                difference = float((one - result[key]).abs().max()) if one.numel() else 0.0
                if case.seeded:
                    continue  # a graph may draw other numbers
                if not difference <= tolerance * largest + 1e-12:
                    return f"WRONG: {time}, weights times {change}, {key} is off by {difference:.2g}, {largest:.2g}"
    return "equal"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    counts: collections.Counter[str] = collections.Counter()
    for seed in range(arguments.seed, arguments.seed + arguments.models):
        try:
            outcomes = run_case(seed)
        except Exception as error:
            outcomes = [("crash", f"crash: {type(error).__name__}: {str(error)[:200]}")]
        for name, outcome in outcomes:
            counts[outcome.partition(":")[0]] += 1
            if outcome not in ("equal", "refused"):
                print(seed, name, outcome, make_case(seed).traits, flush=True)
    print(dict(counts))


if __name__ == "__main__":
    main()
