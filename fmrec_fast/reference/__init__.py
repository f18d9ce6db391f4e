"""The definitions: differentiable PyTorch without cleverness, one module per op.

They are the specification that every kernel is held against, and the fallback where none runs.
`published` is the published program itself, operation for operation, as test oracle and peer.
"""
