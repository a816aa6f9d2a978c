"""Layers and functions for other libraries; import the module of the library that you use."""
