"""Training on several ranks, on torch.distributed; torchrun starts and restarts them."""

from fmrec_fast.distributed.world import World, joined

__all__ = ["World", "joined"]
