"""Nested experts over the MLPs of a `transformers` model: slices of its weights, a router, two ways of computing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.methods.dynamoe.losses import expert_widths, importance, similarity
from zoo.methods.dynamoe.routes import HEADS, Control, Route, Trace
from zoo.nn.distributed import all_reduce_sum


class Names(NamedTuple):
    """How a class of MLPs calls its parts."""

    gate: str
    """First matrix under the activation; "" for a plain MLP."""
    up: str
    down: str
    act: str


#: The MLPs that are understood: Llama, Mistral, Qwen, Gemma, OLMo, ...; GPT-2, GPT-Neo; GPT-NeoX (Pythia); StarCoder 2.
KNOWN = (
    Names("gate_proj", "up_proj", "down_proj", "act_fn"),
    Names("", "c_fc", "c_proj", "act"),
    Names("", "dense_h_to_4h", "dense_4h_to_h", "act"),
)


class Router(nn.Module):
    """Predicts, from the input of an MLP, how well its experts do: `W2 gelu(W1 x + b1) + b2` (form reconstructed).

    It starts with the full MLP for every token: predicted similarities of 0, or a label of `E - 1`.

    Args:
        width: Width of the model.
        units: Hidden units.
        experts: Number of experts, at least two.
        head: `score` predicts `S_0 ... S_{E-2}`, `label` gives logits of the `E` labels.
    """

    def __init__(self, width: int, units: int, experts: int, head: str) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, units)
        self.out = nn.Linear(units, experts if head == "label" else experts - 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        if head == "label":
            nn.init.constant_(self.out.bias[-1:], 2.0)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` to `[..., E - 1]` or `[..., E]`."""
        return self.out(F.gelu(self.hidden(x)))


class NestedMLP(nn.Module):
    """An MLP whose experts are the first `H_e` of its hidden neurons.

    It takes the parts of a dense MLP over under their names, so that the weights of the model keep their names too.
    No weight is copied: an expert is a view.

    Args:
        mlp: The MLP of a `transformers` layer.
        layer: Its number.
        experts: Number of experts.
        control: What all nested MLPs of the model do.

    Raises:
        ValueError: If the class of the MLP is not understood, or there are more experts than neurons.
    """

    def __init__(self, mlp: nn.Module, layer: int, experts: int, control: Control) -> None:
        super().__init__()
        self.names = names_of(mlp)
        for name, child in mlp.named_children():
            self.add_module(name, child)
        self.layer, self.experts, self.control = layer, experts, control
        down = matrix(self.down)
        self.model_width, self.hidden_width = down.shape
        self.widths = expert_widths(self.hidden_width, experts)
        self.blocks = [b - a for a, b in zip([0, *self.widths], self.widths, strict=False)]
        self.router: Router | None = None
        self.train(mlp.training)

    @property
    def up(self) -> nn.Module:
        """First linear map (of a gated MLP: the one without activation)."""
        return self.get_submodule(self.names.up)

    @property
    def down(self) -> nn.Module:
        """Last linear map."""
        return self.get_submodule(self.names.down)

    @property
    def gate(self) -> nn.Module | None:
        """First linear map under the activation; None in a plain MLP."""
        return self.get_submodule(self.names.gate) if self.names.gate else None

    @property
    def matrices(self) -> int:
        """Number of matrices: 3 if gated, 2 if plain."""
        return 3 if self.names.gate else 2

    def hidden(self, x: Tensor) -> Tensor:
        """Activations of all hidden neurons, `[..., D]` to `[..., H]`."""
        act, gate = self.get_submodule(self.names.act), self.gate
        return act(self.up(x)) if gate is None else act(gate(x)) * self.up(x)

    def sliced(self, x: Tensor, expert: int) -> Tensor:
        """Output of one expert, `[..., D]` to `[..., D]`, at its own cost."""
        if expert == self.experts - 1:
            return self.dense(x)
        act, n = self.get_submodule(self.names.act), self.widths[expert]
        h = F.linear(x, matrix(self.up)[:n], vector(self.up, n))
        gate = self.gate
        h = act(h) if gate is None else act(F.linear(x, matrix(gate)[:n], vector(gate, n))) * h
        return F.linear(h, matrix(self.down)[:, :n], vector(self.down))

    def outputs(self, hidden: Tensor) -> Tensor:
        """Outputs of all experts from the hidden activations, at the cost of one last matrix.

        Args:
            hidden: `[..., H]`.

        Returns:
            `[..., E, D]`: cumulative sums of the products of the blocks between two widths.
        """
        down = matrix(self.down)
        parts = [F.linear(h, w) for h, w in zip(hidden.split(self.blocks, -1), down.split(self.blocks, 1), strict=True)]
        total = torch.stack(parts, dim=-2).cumsum(-2)
        bias = vector(self.down)
        return total if bias is None else total + bias

    @torch.no_grad()
    def scores(self, hidden: Tensor) -> Tensor:
        """Similarity of each expert with the full MLP, float32 `[..., E]`, without gradient."""
        return similarity(self.outputs(hidden.detach()), self.control.similarity)

    def masked(self, hidden: Tensor, widths: Tensor) -> Tensor:
        """Output where the hidden neurons that are not in use are set to zero.

        Args:
            hidden: `[..., H]`.
            widths: int `[...]`: experts, or one for all; or float `[..., E]`: weights of experts.
        """
        if widths.is_floating_point():
            # a block is in use as far as an expert that holds it is
            keep = widths.flip(-1).cumsum(-1).flip(-1)
        else:
            keep = widths[..., None] >= torch.arange(self.experts, device=widths.device)
        if len(set(self.blocks)) == 1:
            shaped = hidden.unflatten(-1, (self.experts, -1)) * keep[..., None].to(hidden.dtype)
            return self.down(shaped.flatten(-2))
        blocks = torch.tensor(self.blocks, device=keep.device)
        return self.down(hidden * keep.to(hidden.dtype).repeat_interleave(blocks, dim=-1))

    def grouped(self, x: Tensor, widths: Tensor) -> Tensor:
        """Output where the tokens of each expert are computed together, by that expert alone.

        Args:
            x: `[..., D]`.
            widths: int64 `[...]`, or one for all.
        """
        if widths.ndim == 0:
            return self.sliced(x, int(widths))
        flat = x.reshape(-1, x.shape[-1])
        counts = torch.bincount(widths.reshape(-1), minlength=self.experts).tolist()
        if max(counts) == len(flat):  # one expert for all: nothing to sort
            return self.sliced(x, counts.index(len(flat)))
        order = widths.reshape(-1).argsort(stable=True)
        parts = [
            self.sliced(part, expert) if len(part) else part for expert, part in enumerate(flat[order].split(counts))
        ]
        done = torch.cat([part.to(parts[-1].dtype) for part in parts])
        return torch.empty_like(done).index_copy(0, order, done).reshape(x.shape)

    def dense(self, x: Tensor) -> Tensor:
        """The MLP as it was."""
        return self.down(self.hidden(x))

    def forward(self, x: Tensor) -> Tensor:
        """Ask the route for widths, and compute them."""
        route, trace, control = self.control.route, self.control.trace, self.control
        single = self.router is None
        prediction = self.router(x.detach()) if self.router is not None and route.needs_router else None
        hidden = scores = None
        if self.experts > 1 and (route.needs_scores or control.scored):
            hidden = self.hidden(x)
            scores = self.scores(hidden)
        asks = route.needs_router and single
        widths = None if self.experts == 1 or asks else route.widths(self.layer, prediction, scores)
        if trace is not None:
            self.note(trace, prediction, scores, widths, x)
        if widths is None:
            y = self.dense(x) if hidden is None else self.down(hidden)
        elif control.execution == "grouped" and hidden is None and not widths.is_floating_point():
            y = self.grouped(x, widths)
        else:
            y = self.masked(self.hidden(x) if hidden is None else hidden, widths)
        dropout = getattr(self, "dropout", None)
        return y if dropout is None else dropout(y)

    def note(
        self, trace: Trace, prediction: Tensor | None, scores: Tensor | None, widths: Tensor | None, x: Tensor
    ) -> None:
        """Write down what was seen."""
        if prediction is not None:
            trace.predictions[self.layer] = prediction
        if scores is not None:
            trace.scores[self.layer] = scores
        if widths is None:
            widths = torch.full(x.shape[:-1], self.experts - 1, device=x.device)
        trace.widths[self.layer] = widths if widths.is_floating_point() else widths.expand(x.shape[:-1])

    @torch.no_grad()
    def permute(self, order: Tensor) -> None:
        """Bring the hidden neurons into another order, in place; the function of the whole MLP stays."""
        for linear in (self.up, self.gate):
            if linear is not None:
                matrix(linear).copy_(matrix(linear)[order])
                bias = vector(linear)
                if bias is not None:
                    bias.copy_(bias[order])
        matrix(self.down).copy_(matrix(self.down)[:, order])


def names_of(mlp: nn.Module) -> Names:
    """Return the names of an MLP's parts.

    Raises:
        ValueError: If its class is not understood.
    """
    for names in KNOWN:
        parts = [getattr(mlp, name, None) for name in names if name]
        if all(isinstance(part, nn.Module) for part in parts):
            linears = [getattr(mlp, name) for name in names[:3] if name]
            if all(isinstance(getattr(linear, "weight", None), Tensor) for linear in linears):
                return names
    accepted = "; ".join(", ".join(filter(None, names[:3])) for names in KNOWN)
    raise ValueError(f"the MLP class {type(mlp).__name__} is not supported; accepted: MLPs with the layers {accepted}")


def matrix(linear: nn.Module) -> Tensor:
    """Weight of a linear layer as `[out, in]`, a view; GPT-2 keeps it the other way round."""
    weight: Any = linear.weight
    return weight if isinstance(linear, nn.Linear) else weight.t()


def vector(linear: nn.Module, n: int | None = None) -> Tensor | None:
    """First `n` numbers of a linear layer's bias, a view; None if it has none."""
    bias: Any = getattr(linear, "bias", None)
    return None if bias is None else bias[:n]


def nest(model: nn.Module, experts: int, similarity: str = "inner") -> tuple[list[NestedMLP], Control]:
    """Replace the MLP of every layer by a nested one, in place.

    Args:
        model: Causal language model of `transformers`.
        experts: Number of experts of each layer.
        similarity: Kind of similarity that is difficulty.

    Raises:
        ValueError: If the MLPs are of a class that is not understood, or not all layers have one.
    """
    control = Control(similarity=similarity)
    found = [
        (parent, child) for parent in model.modules() if isinstance(child := getattr(parent, "mlp", None), nn.Module)
    ]
    layers: int = model.config.num_hidden_layers  # type: ignore[union-attr, assignment]
    if len(found) != layers:
        raise ValueError(
            f"{type(model).__name__} has {len(found)} modules called mlp in {layers} layers: it is not supported; "
            "accepted: models such as Llama, Mistral, Qwen, GPT-2 and GPT-NeoX with one dense MLP a layer"
        )
    nested = []
    for layer, (parent, mlp) in enumerate(found):
        nested.append(NestedMLP(mlp, layer, experts, control))
        parent.mlp = nested[-1]  # type: ignore[assignment]
    return nested, control


def add_routers(layers: Iterable[NestedMLP], units: int, head: str) -> None:
    """Give each layer a new router, of the type of its weights and on their device.

    Raises:
        ValueError: If `head` is unknown or `units` is less than 1.
    """
    if head not in HEADS:
        raise ValueError(f"head: {head!r} is unknown; accepted: {', '.join(HEADS)}")
    if units < 1:
        raise ValueError(f"router_units: {units} is not accepted; accepted: 1 or more")
    for mlp in layers:
        if mlp.experts > 1:
            down = matrix(mlp.down)
            mlp.router = Router(mlp.model_width, units, mlp.experts, head).to(down.device, down.dtype)


def router_parameters(layers: Iterable[NestedMLP]) -> list[nn.Parameter]:
    """Parameters of all routers."""
    return [p for mlp in layers if mlp.router is not None for p in mlp.router.parameters()]


class Importances:
    """Adds up the importance of all hidden neurons while batches pass, then sorts by it."""

    def __init__(self, layers: Iterable[NestedMLP]) -> None:
        self.layers = list(layers)
        self.sums = [torch.zeros(mlp.hidden_width, device=matrix(mlp.down).device) for mlp in self.layers]

    @torch.no_grad()
    def add(self, model: Any, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Run dense forward passes over some batches (`input_ids [B, T]`, `attention_mask` where there is padding)."""
        counted: list[Tensor | None] = [None]

        def hook(mlp: NestedMLP) -> Any:
            def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                h = args[0] if counted[0] is None else args[0][counted[0]]
                self.sums[mlp.layer] += importance(h, matrix(mlp.down))

            return mlp.down.register_forward_pre_hook(add)

        handles = [hook(mlp) for mlp in self.layers]
        training = model.training
        model.eval()
        try:
            with self.layers[0].control.using(Route()):
                for batch in batches:
                    mask = batch.get("attention_mask")
                    counted[0] = None if mask is None else mask.bool()
                    model(input_ids=batch["input_ids"], attention_mask=mask, use_cache=False)
        finally:
            model.train(training)
            for handle in handles:
                handle.remove()

    def sort(self, reduce: bool = True) -> None:
        """Put the most important neurons of each layer first; `reduce` adds up what the ranks have seen."""
        for mlp, sums in zip(self.layers, self.sums, strict=True):
            mlp.permute((all_reduce_sum(sums) if reduce else sums).argsort(descending=True, stable=True))


def load_dense(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load the weights of the language model from a checkpoint of this method; routers stay as they are.

    Raises:
        ValueError: If names or shapes do not fit, naming the first few.
    """
    wanted = {name: value for name, value in model.state_dict().items() if ".router." not in name}
    given = {
        name.removeprefix("lm."): value
        for name, value in weights.items()
        if name.startswith("lm.") and ".router." not in name
    }
    wrong = [name for name in wanted.keys() & given.keys() if wanted[name].shape != given[name].shape]
    if bad := sorted([*(wanted.keys() ^ given.keys()), *wrong]):
        raise ValueError(
            f"init_from: {len(bad)} weights do not fit the model: {', '.join(bad[:3])}; accepted: a checkpoint of the "
            "same language model"
        )
    model.load_state_dict(given, strict=False)
