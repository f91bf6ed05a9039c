"""The cost model as plain functions: parameters, FLOPs, bytes, tokens a second, tokens a dollar (arXiv 2410.19456).

Units: bytes, seconds, floating-point operations (a multiply-add counts two); `GiB` is 2^30 bytes. Nothing here needs a
tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from zoo.errors import did_you_mean

GIB = 2**30


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama-style model: no biases, full multi-head attention, SwiGLU, untied embeddings.

    Attributes:
        vocab_size: Tokens `V`.
        width: Hidden size `D`.
        depth: Blocks `L`.
        intermediate: Hidden size of the MLP `I`.
        head_dim: Size of a head; divides the width.
    """

    vocab_size: int
    width: int
    depth: int
    intermediate: int = 0
    head_dim: int = 64

    def __post_init__(self) -> None:
        for key in ("vocab_size", "width", "depth", "head_dim"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}: {getattr(self, key)} is not accepted; accepted: 1 or more")
        if self.width % self.head_dim:
            raise ValueError(f"width: {self.width} is no multiple of head_dim {self.head_dim}")
        if not self.intermediate:
            object.__setattr__(self, "intermediate", int(2.7 * self.width))

    @property
    def heads(self) -> int:
        """Number of heads `H`."""
        return self.width // self.head_dim

    @property
    def matmul_parameters(self) -> int:
        """Weights that multiply activations, the output embedding among them: `L (4 D² + 3 D I) + V D`."""
        block = 4 * self.width**2 + 3 * self.width * self.intermediate
        return self.depth * block + self.vocab_size * self.width

    @property
    def parameters(self) -> int:
        """All parameters: `2 V D + L (4 D² + 3 D I + 2 D) + D` (Appendix B, Table 3, reconstructed)."""
        return self.matmul_parameters + self.vocab_size * self.width + (2 * self.depth + 1) * self.width


#: Appendix B, Table 3. The 100M row says D = 864, which gives another count; with 832 and the MLP of 864 it is exact.
SIZES = {
    "100m": Shape(32000, 832, 9, 2332),
    "500m": Shape(32000, 1536, 15, 4147),
    "1b": Shape(32000, 1920, 19, 5184),
    "2b": Shape(32000, 2496, 24, 6739),
}


@dataclass(frozen=True)
class Device:
    """Data sheet of an accelerator.

    Attributes:
        peak_flops: Dense bfloat16 operations a second, without sparsity; None if unknown.
        memory_bytes: Its memory.
        bandwidth: Bytes a second between memory and processor.
        link: Bytes a second to the other devices of a node, one direction.
    """

    peak_flops: float | None
    memory_bytes: float
    bandwidth: float
    link: float


#: By the name under which prices are given. Sources: data sheets of NVIDIA.
DEVICES = {
    "A100-40GB": Device(312e12, 40 * GIB, 1.555e12, 300e9),
    "A100-80GB": Device(312e12, 80 * GIB, 2.039e12, 300e9),
    "H100-80GB": Device(989e12, 80 * GIB, 3.35e12, 450e9),
    "H100-PCIe": Device(756e12, 80 * GIB, 2.0e12, 64e9),
    "H100-NVL": Device(835e12, 94 * GIB, 3.9e12, 300e9),
    "H200": Device(989e12, 141 * GIB, 4.8e12, 450e9),
}

#: Price of an hour relative to an A100-40GB, mean of two vendors as the paper rounds it (Appendix A, Table 2).
PAPER_RATIOS = {"A100-40GB": 1.00, "A100-80GB": 1.46, "H100-80GB": 2.53}

COMMS = ("single", "ddp", "fsdp_full", "fsdp_grad_op")
ATTENTIONS = ("eager", "sdpa", "flash", "efficient")
#: Bytes of a weight, of its gradient, of the two moments of AdamW, and of an activation.
PRECISIONS = {"bf16-true": (2, 2, 4, 2), "bf16-mixed": (4, 4, 8, 2), "32-true": (4, 4, 8, 4)}


def device_of(name: str, memory_bytes: float = 0) -> str:
    """Return the key of `DEVICES` for what CUDA calls a device, `name` itself if it is not known.

    Args:
        name: `torch.cuda.get_device_name()`, such as `NVIDIA A100-SXM4-40GB`.
        memory_bytes: Its memory, where the name does not say it.
    """
    if "A100" in name:
        return "A100-80GB" if "80GB" in name or memory_bytes > 45 * GIB else "A100-40GB"
    if "H100" in name:
        return "H100-PCIe" if "PCIe" in name else "H100-NVL" if "NVL" in name else "H100-80GB"
    return "H200" if "H200" in name else name


def flops_per_token(shape: Shape, seq_len: int, rule: str = "torchtitan") -> int:
    """Floating-point operations of training on one token, forward and backward.

    Args:
        shape: The model.
        seq_len: Tokens of a sequence `T`; attention counts the full `T²`, as is usual.
        rule: `matmul`: weights of matrix products alone, what `FlopCounterMode` counts. `torchtitan`: all parameters
            but the input embedding, `6 (N - N_in) + 12 L D T`. `nanogpt`: all parameters, `6 N + 12 L D T`.

    Raises:
        ValueError: If the rule is unknown.
    """
    counted = {
        "matmul": shape.matmul_parameters,
        "torchtitan": shape.parameters - shape.vocab_size * shape.width,
        "nanogpt": shape.parameters,
    }
    if rule not in counted:
        raise ValueError(f"rule: {rule!r} is not accepted; {did_you_mean(rule, counted)}")
    return 6 * counted[rule] + 12 * shape.depth * shape.width * seq_len


def attention_share(shape: Shape, seq_len: int) -> float:
    """Share of the attention scores in the FLOPs of a block whose MLP is counted as `8 D²`: `T / (6 D + T)`."""
    return seq_len / (6 * shape.width + seq_len)


def tokens_per_second(tokens: float, seconds: float) -> float:
    """Throughput of the processes together: tokens of the global batches over the time between two synchronisations."""
    return tokens / seconds


def mfu(tokens_per_second_device: float, flops_token: float, device: str, precision: str = "bf16-true") -> float | None:
    """Model FLOPs utilisation of one device; None if its peak is not known or the precision is not bfloat16."""
    known = DEVICES.get(device)
    if known is None or known.peak_flops is None or not precision.startswith("bf16"):
        return None
    return tokens_per_second_device * flops_token / known.peak_flops


def tokens_per_dollar(tokens_per_second_all: float, n_gpu: int, price: float, unit: str = "ratio") -> float:
    """Tokens that a dollar buys (arXiv 2410.19456, Section 2): `Token/Second ÷ Dollar/Second`.

    Args:
        tokens_per_second_all: Throughput of all devices together; 0 where the memory did not suffice.
        n_gpu: Number of devices.
        price: Of one device: relative to an A100-40GB (`ratio`, the "dollar" is then the price of one second of that
            device, which is how the paper's numbers have to be read), or in dollars an hour (`usd`).
        unit: `ratio` or `usd`.

    Raises:
        ValueError: If the price is not positive or the unit unknown.
    """
    if not price > 0:
        raise ValueError(f"price: {price} is not accepted; accepted: a number above 0")
    if unit not in ("ratio", "usd"):
        raise ValueError(f"unit: {unit!r} is not accepted; {did_you_mean(unit, ('ratio', 'usd'))}")
    return tokens_per_second_all * (3600 if unit == "usd" else 1) / (n_gpu * price)


def communication_bytes(parameter_bytes: float, comm: str, n: int) -> float:
    """Bytes that one of `n` devices sends in a step, by ring algorithms: a collective of `P` bytes sends `P (n-1)/n`.

    All-reduce is two of them (`ddp`: the gradients). `fsdp_grad_op` scatters gradients and gathers parameters once,
    `fsdp_full` gathers them for the backward pass again.

    Raises:
        ValueError: If `comm` is unknown.
    """
    collectives = {"single": 0, "ddp": 2, "fsdp_grad_op": 2, "fsdp_full": 3}
    if comm not in collectives:
        raise ValueError(f"comm: {comm!r} is not accepted; {did_you_mean(comm, COMMS)}")
    return collectives[comm] * parameter_bytes * (n - 1) / n


def state_bytes(parameters: int, precision: str = "bf16-true", comm: str = "single", n: int = 1) -> float:
    """Weights, gradients and AdamW's moments on one device; what a scheme shards is divided by `n`.

    `bf16-mixed` keeps everything in float32: 16 bytes a parameter, as `32-true` does.
    """
    weights, gradients, moments, _ = PRECISIONS[precision]
    share = n if comm.startswith("fsdp") else 1
    return parameters * (weights / (n if comm == "fsdp_full" else 1) + (gradients + moments) / share)


def activation_bytes(
    shape: Shape,
    batch: int,
    seq_len: int,
    attention: str = "flash",
    precision: str = "bf16-true",
    checkpointing: bool = False,
) -> float:
    """Bytes that the blocks keep for the backward pass, without the logits.

    For each token a block keeps, of size `D`: the inputs of both norms in float32, their normalised and weighted forms,
    q, k, v, and the attention's output in both layouts; and 4 vectors of size `I`. `eager` keeps the probabilities
    `[H, T]` of a token too, in float32 and, where that is another type, once more in the type of the activations. With
    `checkpointing` a block keeps its input alone, and one block at a time all of it.
    """
    e = PRECISIONS[precision][3]
    block = (9 * e + 2 * 4) * shape.width + 4 * e * shape.intermediate
    if attention == "eager":
        block += shape.heads * seq_len * (4 + (0 if e == 4 else e))
    blocks = shape.depth * e * shape.width + block if checkpointing else shape.depth * block
    return batch * seq_len * blocks


def logit_bytes(shape: Shape, batch: int, seq_len: int, precision: str = "bf16-true", chunks: int = 0) -> float:
    """Bytes at the peak of the loss: logits, their float32 log-probabilities and the gradient of these.

    With `chunks` only one chunk of the tokens has them at a time.
    """
    return batch * seq_len / max(chunks, 1) * shape.vocab_size * (PRECISIONS[precision][3] + 8)


def memory_bytes(
    shape: Shape,
    batch: int,
    seq_len: int,
    attention: str = "flash",
    precision: str = "bf16-true",
    comm: str = "single",
    n: int = 1,
    loss_chunks: int = 0,
    checkpointing: bool = False,
) -> float:
    """Estimate of the peak memory of a training step on one device, without what the allocator wastes."""
    return (
        state_bytes(shape.parameters, precision, comm, n)
        + activation_bytes(shape, batch, seq_len, attention, precision, checkpointing)
        + logit_bytes(shape, batch, seq_len, precision, loss_chunks)
    )


def price_of(gpu: str, prices: Mapping[str, float]) -> float:
    """Return the price of a device.

    Raises:
        ValueError: If it has none.
    """
    if gpu not in prices:
        raise ValueError(f"prices: there is none for {gpu!r}; {did_you_mean(gpu, prices)}")
    return prices[gpu]


def geometric_mean(values: list[float]) -> float:
    """Geometric mean of positive numbers."""
    return math.exp(sum(map(math.log, values)) / len(values))
