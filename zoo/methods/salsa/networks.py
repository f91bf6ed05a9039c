"""Language models from values, folders or checkpoints; networks with a scalar at each token; likelihoods of answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from zoo.methods.salsa.soup import distinct, fingerprint
from zoo.nn.fsdp2 import blocks
from zoo.nn.lm import build_lm

#: Where checkpoints of the three methods keep their language model.
PREFIXES = ("policy.", "lm.", "net.lm.")
#: Options of adapters that the methods share.
ADAPTER_OPTIONS = ("lora_rank", "lora_alpha", "lora_targets")


def add_adapters(model: Any, rank: int, alpha: float = 16.0, targets: list[str] | None = None) -> Any:
    """Put low-rank adapters (peft) into a model; only they are trainable then. Rank 0 leaves it alone."""
    if not rank:
        return model
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=targets or "all-linear")  # type: ignore[arg-type]
    return inject_adapter_in_model(config, model)


def merge_adapters(model: Any) -> Any:
    """Add adapters to the weights below them and take them out; a model without adapters stays as it is."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BaseTunerLayer):
                child.merge()  # type: ignore[operator]
                setattr(parent, name, child.get_base_layer())
    return model


def has_adapters(model: nn.Module) -> bool:
    """Whether a model has adapters."""
    return any(".lora_" in name for name, _ in model.named_parameters())


def no_dropout(model: nn.Module) -> nn.Module:
    """Switch dropout off for good: a ratio of two passes with different masks is noise."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for key in ("attention_dropout", "dropout", "drop_prob"):
            if isinstance(vars(module).get(key), float):
                setattr(module, key, 0.0)
    return model


def freeze(model: nn.Module) -> nn.Module:
    """Evaluation mode, no gradients."""
    return model.eval().requires_grad_(False)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of a run without running code from it.

    Raises:
        ValueError: If it is missing or no checkpoint.
    """
    if not path.is_file():
        raise ValueError(f"there is no checkpoint {path}")
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(content, dict) or "hyper_parameters" not in content or "state_dict" not in content:
        raise ValueError(f"{path} is no checkpoint of sft, reward_model or salsa")
    return content


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], what: str) -> None:
    """Load weights; the second name of a tied tensor may be missing.

    Raises:
        ValueError: If names or shapes do not fit, naming the first few.
    """
    own = model.state_dict()
    pointers = {v.data_ptr() for n, v in own.items() if n in weights and v.numel()}
    missing = [n for n, v in own.items() if n not in weights and v.data_ptr() not in pointers]
    shared = [n for n in weights if n in own]
    wrong = [f"{n} is {list(weights[n].shape)}, not {list(own[n].shape)}" for n in shared if weights[n].shape != own[n].shape]  # fmt: skip  # noqa: E501
    extra = [n for n in weights if n not in own]
    if missing or wrong or extra:
        said = [*wrong[:2], *(f"{n} is missing" for n in missing[:2]), *(f"{n} is unknown" for n in extra[:2])]
        raise ValueError(f"{what}: weights do not fit the model: {'; '.join(said)}")
    model.load_state_dict(dict(weights), strict=False)


def load_lm(spec: str | Mapping[str, Any], vocab_size: int | None = None, merge: bool = True) -> tuple[Any, str]:
    """Build a language model from values, a folder or hub name, or a checkpoint of `sft`, `reward_model` or `salsa`.

    Args:
        spec: Values, folder or name as in `zoo.nn.lm.build_lm`, or the path of a `.ckpt`.
        vocab_size: Number of tokens of the data.
        merge: Whether the adapters of a checkpoint are merged into its weights.

    Returns:
        The model in evaluation mode, and the fingerprint of what it was fine-tuned from, `""` if it is not known.

    Raises:
        ValueError: If there is no such model, or it does not fit the data.
    """
    if not isinstance(spec, str) or not spec.endswith(".ckpt"):
        return build_lm(spec, vocab_size), ""
    content = read_checkpoint(Path(spec).expanduser())
    options = content["hyper_parameters"]
    model, _ = load_lm(options["lm"], options.get("vocab_size"))
    if vocab_size is not None and model.get_input_embeddings().num_embeddings < vocab_size:
        raise ValueError(f"the model {spec} has fewer tokens than the {vocab_size} of the data")
    model = add_adapters(model, *(options.get(key) for key in ADAPTER_OPTIONS))  # type: ignore[arg-type]
    prefix = next((p for p in PREFIXES if any(n.startswith(p) for n in content["state_dict"])), None)
    if prefix is None:
        raise ValueError(f"{spec} holds no language model")
    own = {n.removeprefix(prefix): v for n, v in content["state_dict"].items() if n.startswith(prefix)}
    load_weights(model, own, spec)
    return (merge_adapters(model) if merge else model).eval(), str(content.get("base", ""))


def lm_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a model, tied ones once."""
    return distinct(model.state_dict())


def start_from(model: nn.Module, spec: str, vocab_size: int | None = None) -> None:
    """Load the weights of another model, below adapters where `model` has some.

    Args:
        model: The model, with or without adapters.
        spec: Folder, hub name, or checkpoint; see `load_lm`.
        vocab_size: Number of tokens of the data.

    Raises:
        ValueError: If they do not fit.
    """
    load_below_adapters(model, lm_state(load_lm(spec, vocab_size)[0]), spec)


def load_below_adapters(model: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Load weights into a model, below its adapters where it has some.

    Raises:
        ValueError: If they do not fit, beginning with `what`.
    """
    own = model.state_dict()
    places = {n.replace(".base_layer.", "."): n for n in own}
    kept = {n: v for n, v in own.items() if ".lora_" in n}
    load_weights(model, {**kept, **{places.get(n, n): v for n, v in state.items()}}, what)


def base_fingerprint(model: nn.Module) -> str:
    """Fingerprint of the weights without adapters, which models fine-tuned from the same weights share."""
    state = distinct({n.replace(".base_layer.", "."): v for n, v in model.state_dict().items() if ".lora_" not in n})
    return fingerprint(state)


def shard_each(module: LightningModule, networks: Sequence[nn.Module | None]) -> bool:
    """Shard each of some networks by itself where the strategy is FSDP2; to be called in `configure_model`.

    Args:
        module: The module that they belong to; rank 0's initial values of all of it are those of all ranks.
        networks: Its networks; None are passed over.

    Returns:
        Whether they were sharded.
    """
    strategy = module.trainer.strategy
    if not isinstance(strategy, ModelParallelStrategy):
        return False
    from torch.distributed.fsdp import fully_shard

    mesh = module.device_mesh["data_parallel"]  # type: ignore[index]
    for tensor in [*module.parameters(), *module.buffers()]:
        dist.broadcast(tensor.detach(), 0)
    for net in networks:
        if net is not None:
            for block in blocks(net, getattr(strategy, "min_parameters", 1_000_000)):
                fully_shard(block, mesh=mesh)
            fully_shard(net, mesh=mesh)
    return True


class ScalarModel(nn.Module):
    """A language model with a scalar at each token instead of logits: a reward or value network.

    Args:
        lm: The language model; its head is not used, and not trained.
        init_std: Standard deviation of the new head's weights; None for `1 / sqrt(d + 1)`.
    """

    def __init__(self, lm: Any, init_std: float | None = None) -> None:
        super().__init__()
        self.lm = lm
        width = lm.config.hidden_size
        self.head = nn.Linear(width, 1, bias=False)
        nn.init.normal_(self.head.weight, std=1 / math.sqrt(width + 1) if init_std is None else init_std)
        output = lm.get_output_embeddings()
        if output is not None and output.weight is not lm.get_input_embeddings().weight:
            output.requires_grad_(False)

    def forward(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Return float32 `[B, S]` for tokens int64 `[B, S]`, padded anywhere, with `mask` bool `[B, S]`."""
        hidden = self.lm.base_model(input_ids=input_ids, **placed(mask), use_cache=False).last_hidden_state
        return self.head(hidden).squeeze(-1).float()

    def score(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Return the scalar at the last token of each row, float32 `[B]`."""
        from zoo.methods.salsa.losses import last_token

        return self(input_ids, mask).gather(1, last_token(mask)[:, None])[:, 0]


def load_reward(path: str, vocab_size: int | None = None) -> tuple[ScalarModel, float]:
    """Load the network and the shift of a checkpoint of `reward_model`.

    Raises:
        ValueError: If it is of another method.
    """
    content = read_checkpoint(Path(path).expanduser())
    state = content["state_dict"]
    if "net.head.weight" not in state:
        raise ValueError(f"reward_model: {path} is no checkpoint of reward_model")
    lm, _ = load_lm(path, vocab_size)
    net = ScalarModel(lm)
    with torch.no_grad():
        net.head.weight.copy_(state["net.head.weight"])
    return net, float(state["shift"])


def positions(mask: Tensor) -> Tensor:
    """Positions of tokens that may be padded on the left, int64 of the shape of `mask`."""
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)


def placed(mask: Tensor) -> dict[str, Tensor]:
    """Mask and positions for a causal model; nothing if no row of `mask`, bool `[B, S]`, is padded on the left.

    What follows the end of a text is hidden from it by causality, and attention without a mask is faster.
    """
    return {} if bool(mask[:, 0].all()) else {"attention_mask": mask, "position_ids": positions(mask)}


class Likelihood(NamedTuple):
    """Of each token of the answers, `[B, T]` float32."""

    logprobs: Tensor
    entropy: Tensor | None
    """Entropy of the distribution that the token was drawn from, nats, if it was asked for; no gradient."""
    hidden: Tensor | None
    """Last hidden states before each token `[B, T, d]`, if they were asked for."""


def answer_likelihood(
    model: Any,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    tokens: Tensor,
    mask: Tensor,
    *,
    temperature: float = 1.0,
    hidden: bool = False,
    entropy: bool = False,
) -> Likelihood:
    """Log-probability of each token of answers, under the distribution that it is sampled from.

    Args:
        model: Causal language model of `transformers`.
        prompt_ids: int64 `[B, P]`, padded on the left.
        prompt_mask: bool `[B, P]`.
        tokens: int64 `[B, T]`.
        mask: bool `[B, T]`.
        temperature: Divides the logits, as in sampling.
        hidden: Whether to return hidden states.
        entropy: Whether to return entropies.
    """
    output = model(
        input_ids=torch.cat([prompt_ids, tokens], dim=1),
        **placed(torch.cat([prompt_mask, mask], dim=1)),
        use_cache=False,
        logits_to_keep=tokens.shape[1] + 1,
        output_hidden_states=hidden,
    )
    logs = torch.log_softmax(output.logits[:, :-1].float() / temperature, dim=-1)
    with torch.no_grad():
        mean = -(logs.exp() * logs).sum(dim=-1) if entropy else None
    states = output.hidden_states[-1][:, -tokens.shape[1] - 1 : -1] if hidden else None
    return Likelihood(logs.gather(-1, tokens[..., None])[..., 0], mean, states)


def check_tokens(eos_id: int | None, pad_id: int | None) -> None:
    """Refuse data whose end-of-text token cannot be learned.

    Raises:
        ValueError: If there is none, or it is the padding too.
    """
    if eos_id is None:
        raise ValueError("eos_id: the tokenizer has no end-of-text token; answers would never end")
    if pad_id is None or pad_id == eos_id:
        raise ValueError(f"pad_id: {pad_id} is not accepted with eos_id {eos_id}; accepted: a token of its own")
