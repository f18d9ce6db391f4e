"""Public functions of the hot paths: argument checks, choice of backend, autograd."""

from fmrec_fast.ops.attention import attention
from fmrec_fast.ops.dropout import StreamDropout, TorchDropout, dropout
from fmrec_fast.ops.dropout_layer_norm import dropout_layer_norm
from fmrec_fast.ops.encoder import encoder
from fmrec_fast.ops.euler_sampler import euler_sampler
from fmrec_fast.ops.feed_forward import feed_forward
from fmrec_fast.ops.history_loss import history_loss
from fmrec_fast.ops.item_cross_entropy import item_cross_entropy
from fmrec_fast.ops.item_ranking import ItemIndex, item_topk, prepare_items, target_rank
from fmrec_fast.ops.linear import linear
from fmrec_fast.ops.noise_fusion import euler_noise_fusion, noise_fusion
from fmrec_fast.ops.picard_sweep import picard_sweep
from fmrec_fast.ops.rms_norm import rms_norm
from fmrec_fast.ops.self_attention import self_attention

__all__ = [
    "ItemIndex",
    "StreamDropout",
    "TorchDropout",
    "attention",
    "dropout",
    "dropout_layer_norm",
    "encoder",
    "euler_noise_fusion",
    "euler_sampler",
    "feed_forward",
    "history_loss",
    "item_cross_entropy",
    "item_topk",
    "linear",
    "noise_fusion",
    "picard_sweep",
    "prepare_items",
    "rms_norm",
    "self_attention",
    "target_rank",
]
