"""One of several processes that train an mmdet config together without a GPU.

mmdet's own launcher wants a GPU for each process, so the process group is made here, over gloo. Importing
this needs no mmdet: pytest looks for doctests in every file.
"""

import torch
import torch.distributed as dist


def main(config: str) -> None:
    """Trains, and raises unless all processes end with the same student."""
    from mmengine.config import Config
    from mmengine.runner import Runner

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    runner = Runner.from_cfg(Config.fromfile(config))
    runner.train()
    flat = torch.cat([parameter.detach().flatten() for parameter in runner.model.module.parameters()])
    others = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(others, flat)
    if not all(torch.equal(flat, other) for other in others):
        raise SystemExit("the processes' students differ")
    dist.destroy_process_group()
