"""One training step on several ranks, each with its rows of the global batch.

Rows are known by their place in the global batch, which keys their noise, dropout and drawn cells,
and every rank draws the same seed: so the ranks compute together what one rank would alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from fmrec_fast import noise
from fmrec_fast.distributed.exchange import batch_shares
from fmrec_fast.distributed.world import World
from fmrec_fast.losses import training_losses
from fmrec_fast.models.fave import FaveDraws
from fmrec_fast.models.recommender import FMRecommender
from fmrec_fast.reference.history_loss import Cells, WholeBatch, distinct, history_cells


class _Objective(nn.Module):
    """`training_losses` as a module, whose forward is all that a step reads of the model."""

    def __init__(self, model: FMRecommender, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(
        self,
        sequence: Tensor,
        target: Tensor,
        draws: FaveDraws,
        seed: Tensor,
        rows: Tensor,
        batch: int,
    ) -> tuple[Tensor, ...]:
        losses = training_losses(
            self.model, sequence, target, draws=draws, seed=seed, rows=rows, batch=batch
        )
        return tuple(getattr(losses, name) for name in self.names)


def _sum(_, bucket):  # without annotations, which DistributedDataParallel wants to be no strings
    # Not the mean: the ranks' losses are shares already.
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


def sharded(parameter: Tensor) -> bool:
    """Whether each rank holds rows of its own, whose gradient is complete as it comes."""
    return isinstance(parameter, DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part on this rank; all of it, unless it is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Replicas:
    """A model's training losses over the global batch, computed by all ranks.

    Gradients are summed over the ranks during backward (DistributedDataParallel); those of sharded
    parameters are left alone.

    Args:
        names: the parts of `Losses`, 'total' first.
    """

    def __init__(self, model: FMRecommender, names: Sequence[str], world: World) -> None:
        self.model, self.world = model, world
        objective = _Objective(model, names)
        apart = [name for name, parameter in objective.named_parameters() if sharded(parameter)]
        apart += [name for name, _ in objective.named_buffers()]  # constants, the same everywhere
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(objective, apart)
        # Which parameters no loss reads (the published model has some) is learnt in the first step.
        self.objective = DistributedDataParallel(
            objective, gradient_as_bucket_view=True, static_graph=True
        )
        self.objective.register_comm_hook(None, _sum)

    def losses(self, sequence: Tensor, target: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        """(the loss to differentiate, all parts as they are reported): this rank's shares of those
        of the global batch, of whose `batch` rows it has its share."""
        share = self.world.share(batch)
        rows = torch.arange(share.start, share.stop, device=sequence.device)
        seed = noise.draw_seed(sequence.device)
        draws = FaveDraws(cells=self._cells(sequence, seed, share, batch))
        with batch_shares(self.world.shares(batch)):
            parts = self.objective(sequence, target, draws, seed, rows, batch)
        return parts[0], torch.stack([part.detach() for part in parts]).double()

    def _cells(self, sequence: Tensor, seed: Tensor, share: range, batch: int) -> Cells | None:
        """The reconstruction loss's cells in these rows, of those drawn over the whole matrix."""
        weight, _ = self.model.fm.xstart_model.decoder_output()
        if sharded(weight):
            return None  # the op draws them
        _, count = distinct(sequence, len(weight))
        whole = WholeBatch(self.world.gather(count, batch), share.start, share.stop)
        if not share:
            return None
        ratio = self.model.loss_recon_mask_ratio
        return history_cells(sequence, len(weight), mask_ratio=ratio, seed=seed, whole=whole)


def clip_gradients(parameters: Iterable[Tensor], largest: float) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_`` where some gradients are spread over the ranks.

    Without such it is that function. Returns the norm of all gradients, the same on every rank.
    """
    parameters = list(parameters)
    gradients = [p.grad for p in parameters if p.grad is not None]
    spread = [gradient.to_local() for gradient in gradients if isinstance(gradient, DTensor)]
    if not spread:
        return torch.nn.utils.clip_grad_norm_(parameters, largest)
    whole = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    square = torch.nn.utils.get_total_norm(spread).square()
    dist.all_reduce(square)
    norm = (torch.nn.utils.get_total_norm(whole).square() + square).sqrt()
    torch._foreach_mul_(whole + spread, (largest / (norm + 1e-6)).clamp(max=1.0))
    return norm
