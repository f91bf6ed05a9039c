"""The points of the paper's four figures, read off its vector graphics: tokens a dollar, 0 for out of memory.

The dollar is the price of one second of an A100-40GB. Axis positions are known to half a percent of the axis.
"""

from __future__ import annotations

from typing import Any

#: Figures 1 and 4, global batch.
BATCHES = (16, 32, 64, 128, 256, 512, 1024)
FIGURE_1 = """
100m eager 23450 19730 16360 15220 15040 14530 14410
100m flash 52300 55930 63650 62170 50450 49370 48500
500m eager  9320  8360  7890  7960  7460  7880  6800
500m flash 21180 19550 16500 16270 16170 15720 15240
1b   eager  6720  6290  5610  5460  5350  5350     0
1b   flash 15940 12660 11680 11100 10640 10550 10370
2b   eager  2660  3070  2940  2650  2630  2710     0
2b   flash  4750  4510  4480  4310  4360  4320  3870
"""
#: Figure 2, number of GPUs; best of batch and scheme, with FlashAttention.
GPUS = (1, 2, 4, 8, 16, 32, 64)
FIGURE_2 = """
100m A100-40GB 53590 59070 52960 50450 49370 48500 48760
100m A100-80GB 63650 62180 48620 47960 46900 45920 62100
100m H100-80GB 56170 43330 39630 38220 37530 38140 14450
500m A100-40GB 21180 19550 16500 16260 16170 15720 15240
500m A100-80GB 16490 16170 14540 14090 13990 13680 13690
500m H100-80GB 12370 12090 11670 11350 11280 11140  8490
1b   A100-40GB 17130 14910 11520 11080 10940 10530 10540
1b   A100-80GB 12330 12650 11670 11090 10630 10420 10360
1b   H100-80GB 15930 11170 10180  9890  9500  9630  9630
2b   A100-40GB  5590  4800  4730  4000  4310  4350  4320
2b   A100-80GB  4750  4510  4480  4030  3890  3810  3870
2b   H100-80GB  3980  3590  3230  2850  2840  2830  2820
"""
#: Figure 3, number of nodes of A100-80GB (one node: 2 to 8 GPUs).
NODES = (1, 2, 4, 8)
FIGURE_3 = """
100m ddp          62140 46870 45890 62060
100m fsdp_full    58390 41800 38920 48720
100m fsdp_grad_op 55550 44750 39040 61520
500m ddp          16160 13980 13670 13680
500m fsdp_full    15680 13260 13220 12960
500m fsdp_grad_op 14530 12820 12700 13630
1b   ddp          11350 10620 10420 10360
1b   fsdp_full    12650  9400  9370  8810
1b   fsdp_grad_op 11670  9380  9640  9430
2b   ddp           4230  3610  3530  3500
2b   fsdp_full     4490  3890  3810  3870
2b   fsdp_grad_op  4510  3890  3800  3860
"""
FIGURE_4 = """
100m ddp          12220 30670 41350 51540 62180 50460 49380 46900
100m fsdp_full    19870 31740 42690 59070 58420 43430 43490 48310
100m fsdp_grad_op 20070 22890 42270 53880 55590 45450 41930 48510
500m ddp          10180 15340 16660 16500 16260 16170 15720 13680
500m fsdp_full    11620 15890 17060 15680 15060 15360 15420 15240
500m fsdp_grad_op 10400 14380 19550 15990 15040 14910 15570 14170
1b   ddp           8900 13350 11520 11120 11090 10630 10540 10360
1b   fsdp_full     9670 13590 12650 10670  9800  9470  9370  8820
1b   fsdp_grad_op 10980 14910 11480 11670  9720  9390  9640  9430
2b   ddp           4580  4230  4000  3960  3610  3560  3500     0
2b   fsdp_full     4470  3990  4500  4480  4200  4360  4320  3870
2b   fsdp_grad_op  4810  4740  4510  4410  4310  4080  4080  3860
"""


def _rows(text: str, figure: int, axis: str, second: str, values: tuple[int, ...]) -> list[dict[str, Any]]:
    rows = []
    for line in text.strip().splitlines():
        size, name, *numbers = line.split()
        for x, number in zip(values, numbers, strict=True):
            row = {"figure": figure, "size": size, second: name, axis: x, "tokens_per_dollar": float(number)}
            rows.append({**row, "status": "ok" if row["tokens_per_dollar"] else "oom"})
    return rows


def published_rows() -> list[dict[str, Any]]:
    """All points, each with its figure, its size and the axes that the figure shows."""
    return [
        *_rows(FIGURE_1, 1, "global_batch", "attention", BATCHES),
        *_rows(FIGURE_2, 2, "n_gpu", "gpu", GPUS),
        *_rows(FIGURE_3, 3, "nodes", "comm", NODES),
        *_rows(FIGURE_4, 4, "global_batch", "comm", (8, *BATCHES)),
    ]
