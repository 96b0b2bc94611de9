"""Batch normalisation over the global batch, so that a judge is trained alike on any number of ranks.

Legend: B rows of this rank, C channels, H height, W width.
"""

from __future__ import annotations

import torch
from torch import distributed, nn
from torch.distributed.nn.functional import all_reduce


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """Batch norm with mean and variance of the rows of all ranks, which hold equally many.

    torch's SyncBatchNorm refuses tensors on the CPU.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # torch's name of the argument
        """Return the normalised rows (B, C, H, W); in training every rank calls it."""
        if not self.training:
            return super().forward(input)
        values_BCHW = input.float()
        mean_C = _over_ranks(values_BCHW.mean((0, 2, 3)))
        centered_BCHW = values_BCHW - mean_C[:, None, None]
        variance_C = _over_ranks(centered_BCHW.square().mean((0, 2, 3)))
        self._note(
            mean_C.detach(), variance_C.detach(), input.numel() // input.shape[1] * distributed.get_world_size()
        )
        scale_C = self.weight * torch.rsqrt(variance_C + self.eps)
        normal_BCHW = centered_BCHW * scale_C[:, None, None] + self.bias[:, None, None]
        return normal_BCHW.to(input.dtype)

    @torch.no_grad()
    def _note(self, mean_C: torch.Tensor, variance_C: torch.Tensor, count: int) -> None:
        """Move the running statistics, with the unbiased variance of ``count`` values, as torch does."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.running_mean.lerp_(mean_C, self.momentum)
        self.running_var.lerp_(variance_C * count / (count - 1), self.momentum)
        self.num_batches_tracked.add_(1)


def _over_ranks(values_C: torch.Tensor) -> torch.Tensor:
    """Return the mean over ranks; its gradient flows back to all of them."""
    total_C: torch.Tensor = all_reduce(values_C)  # type: ignore[no-untyped-call]
    return total_C / distributed.get_world_size()


def make_batch_norms_global(network: nn.Module) -> None:
    """Replace every batch norm of a network, in place, by one over all ranks with the same weights."""
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.BatchNorm2d:
                whole = GlobalBatchNorm2d(child.num_features, child.eps, child.momentum)
                whole.load_state_dict(child.state_dict())
                setattr(parent, name, whole)
