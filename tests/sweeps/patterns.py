"""Many random pattern products by the Triton kernel, against the oracles of whole operations.

    python -m tests.sweeps.patterns [--cases 2000] [--seed 0] [--first 0] [--step 1]

Case k of a seed is always the same one. Without a GPU, Triton's interpreter runs the kernel. The exit status is 1 if
any case failed.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback

if __name__ == "__main__":
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
        torch.set_num_threads(1)

from tests.support.pattern_products import TOLERANCE, product_of


def main() -> int:
    parser = argparse.ArgumentParser(description="Random pattern products by the Triton kernel.")
    parser.add_argument("--cases", type=int, default=2000, help="number of cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the first case")
    parser.add_argument("--step", type=int, default=1, help="run every n-th case, to share the cases among processes")
    options = parser.parse_args()
    start, count, wrong = time.monotonic(), 0, 0
    worst = dict.fromkeys(TOLERANCE, 0.0)
    for k in range(options.first, options.cases, options.step):
        count += 1
        try:
            product = product_of(options.seed, k)
            error = product.error()
            worst[product.dtype] = max(worst[product.dtype], error)
            if error <= TOLERANCE[product.dtype]:
                continue
            print(f"case {k}: error {error:.2e}: {product}", flush=True)
        except Exception:
            print(f"case {k}: {traceback.format_exc(limit=4)}", flush=True)
        wrong += 1
    largest = ", ".join(f"{str(dtype).removeprefix('torch.')} {error:.1e}" for dtype, error in worst.items())
    print(f"{count} cases, {wrong} wrong; largest errors: {largest}; {time.monotonic() - start:.0f} s")
    return 1 if wrong or not count else 0


if __name__ == "__main__":
    sys.exit(main())
