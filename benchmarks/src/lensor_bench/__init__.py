"""Benchmarks of Lensor: times, memory and correctness, compared with the standard way and with other libraries.

`run` measures operations × convolutions × implementations into a results file (`results`), `report` makes tables and
plots from it, and `reproduce` the paper's figures. `conformance` compares libraries (`libraries`) with the definitions
in `definitions`, for every quantity and hyper-parameter. torch, rich and matplotlib are imported on first use.
"""
