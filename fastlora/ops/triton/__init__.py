"""The Triton path: which kernels a call launches, in which order.

Each module does this for the module of `fastlora.ops` with its name; `grouped` has the products of rows in groups, which `mixed` and `experts` share.
"""
