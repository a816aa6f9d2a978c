"""Benchmarks of Lensor: times, memory and correctness compared with the standard way and with other libraries.

`run` measures operations × convolutions × implementations into a results file (`results`), `report` turns that into
tables and plots, `reproduce` into the paper's figures. `conformance` asks libraries (`libraries`) for the quantities
that `definitions` defines, for every hyper-parameter. torch, rich and matplotlib are imported when they are first
needed.
"""
