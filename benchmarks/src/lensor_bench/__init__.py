"""Benchmarks of Lensor: times, memory and correctness, compared with the standard implementation and other libraries.

`run` measures operations × convolutions × implementations and writes a results file (`results`), `report` creates
tables and plots from it, and `reproduce` creates the paper's figures. `conformance` compares libraries (`libraries`)
with the definitions in `definitions`, for every quantity and hyper-parameter. torch, rich and matplotlib are imported
on first use.
"""
