"""Model soups: weighted means of the weights of models that were fine-tuned from one pre-trained model."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

#: Elements of a tensor that are held at once while files are averaged.
CHUNK = 1 << 22
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def soup_weights(members: int, alpha: float | None = None, weights: Sequence[float] | None = None) -> list[float]:
    """Weights of the members of a soup.

    Args:
        members: Number of members.
        alpha: Of two members the weight of the second: `theta = alpha theta_other + (1 - alpha) theta_sft1`; outside
            [0, 1] it extrapolates.
        weights: Barycentric coordinates; they sum to 1. Neither: all alike.

    Raises:
        ValueError: If they do not fit the members.
    """
    if members < 1:
        raise ValueError("a soup needs at least one member")
    if alpha is not None and weights is not None:
        raise ValueError("alpha and weights exclude each other")
    if alpha is not None:
        if members != 2:
            raise ValueError(f"alpha: {alpha} is for two members, there are {members}; accepted: weights")
        return [1 - alpha, alpha]
    if weights is None:
        return [1 / members] * members
    if len(weights) != members or not math.isclose(sum(weights), 1, abs_tol=1e-6):
        raise ValueError(f"weights: {list(weights)} are not accepted; accepted: {members} numbers that sum to 1")
    return [float(w) for w in weights]


def average(parts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Weighted sum of tensors of one shape, computed in float64 and returned in the dtype of the first.

    Members of weight 0 do not count, so that a single one of weight 1 comes out bit by bit. Tensors that are not
    floating point are those of the first member.
    """
    used = [(part, w) for part, w in zip(parts, weights, strict=True) if w != 0]
    if not parts[0].is_floating_point() or (len(used) == 1 and used[0][1] == 1):
        return (used[0][0] if parts[0].is_floating_point() else parts[0]).clone()
    total = torch.zeros_like(parts[0], dtype=torch.float64)
    for part, w in used:
        total.add_(part.double(), alpha=w)
    return total.to(parts[0].dtype)


def check_members(shapes: Sequence[Mapping[str, Sequence[int]]], bases: Sequence[str], names: Sequence[str]) -> None:
    """Refuse members that were not fine-tuned from one model.

    Args:
        shapes: Of each member, the shape of each tensor.
        bases: Of each member, the fingerprint of the weights that it was fine-tuned from, `""` if it is not known.
        names: What to call the members.

    Raises:
        ValueError: If tensors are missing or of other shapes, naming them, or the members have different bases.
    """
    for other, name in zip(shapes[1:], names[1:], strict=True):
        missing = sorted(shapes[0].keys() ^ other.keys())
        wrong = [n for n in sorted(shapes[0].keys() & other.keys()) if list(shapes[0][n]) != list(other[n])]
        if missing or wrong:
            said = [f"only one has {', '.join(missing[:3])}"] if missing else []
            said += [f"{n} is {list(shapes[0][n])} and {list(other[n])}" for n in wrong[:3]]
            raise ValueError(f"members {names[0]} and {name} do not fit together: {'; '.join(said)}")
    known = {base: name for base, name in zip(bases, names, strict=True) if base}
    if len(known) > 1:
        raise ValueError(
            f"members {' and '.join(list(known.values())[:2])} were fine-tuned from different models (fingerprints "
            f"{' and '.join(list(known)[:2])}); accepted: members of one pre-trained model"
        )


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """Return a short hash of names, shapes and the first values of tensors, in float32."""
    digest = hashlib.sha256()
    for name in sorted(state):
        head = state[name].detach().flatten()[:256].cpu().float().contiguous()
        digest.update(f"{name}{list(state[name].shape)}".encode())
        digest.update(head.numpy().tobytes())
    return digest.hexdigest()[:16]


def distinct(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state without second names of one tensor (tied weights): the first name stays."""
    seen: set[tuple[Any, ...]] = set()
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        key = (value.data_ptr(), tuple(value.shape), tuple(value.stride())) if value.numel() else (name,)
        if key not in seen:
            seen.add(key)
            out[name] = value
    return out


def soup(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """Average state dicts in memory; see `average`.

    Raises:
        ValueError: If they do not fit together.
    """
    check_members(
        [{n: v.shape for n, v in state.items()} for state in states],
        [""] * len(states),
        [f"{i + 1}" for i in range(len(states))],
    )
    return {name: average([state[name] for state in states], weights) for name in states[0]}


# Files


@dataclass(frozen=True)
class Member:
    """Weights of a model that can be read piece by piece.

    Attributes:
        name: What to call it.
        shapes: Shape of each tensor.
        dtypes: Its dtype.
        read: Returns elements `start` to `stop` of a tensor in row-major order, flat.
        base: Fingerprint of what it was fine-tuned from, or `""`.
    """

    name: str
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    read: Callable[[str, int, int], Tensor]
    base: str = ""


def memory_member(name: str, state: Mapping[str, Tensor], base: str = "") -> Member:
    """A member whose tensors are in memory."""
    state = distinct(state)
    return Member(
        name,
        {n: tuple(v.shape) for n, v in state.items()},
        {n: v.dtype for n, v in state.items()},
        lambda n, start, stop: state[n].detach().cpu().flatten()[start:stop],
        base,
    )


def safetensors_files(path: Path) -> list[Path]:
    """Files of weights of a model directory, or the file itself.

    Raises:
        ValueError: If there is none.
    """
    if path.is_file():
        return [path]
    index = path / "model.safetensors.index.json"
    if index.is_file():
        return sorted({path / file for file in json.loads(index.read_text("utf-8"))["weight_map"].values()})
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ValueError(f"no weights at {path}; accepted: a folder or file with .safetensors, or a checkpoint (.ckpt)")
    return files


def file_member(path: Path) -> Member:
    """A member in safetensors files; nothing is kept in memory.

    Raises:
        ValueError: If there are no weights at `path`.
    """
    from safetensors import safe_open

    place: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, torch.dtype] = {}
    base = ""
    named = {text: dtype for dtype, text in _DTYPES.items()}
    for file in safetensors_files(path):
        with safe_open(file, framework="pt") as opened:
            base = (opened.metadata() or {}).get("base", base)
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                part = opened.get_slice(name)
                if part.get_dtype() not in named:
                    raise ValueError(f"{file}: {name} is {part.get_dtype()}; accepted: {', '.join(named)}")
                place[name], shapes[name], dtypes[name] = file, tuple(part.get_shape()), named[part.get_dtype()]

    def read(name: str, start: int, stop: int) -> Tensor:
        # opened for each piece: a mapping that stays open keeps all pages that were read in memory
        with safe_open(place[name], framework="pt") as opened:
            shape = shapes[name]
            if len(shape) < 2:
                return opened.get_tensor(name).flatten()[start:stop].clone()
            row = math.prod(shape[1:])
            first, last = start // row, -(-stop // row)
            return opened.get_slice(name)[first:last].flatten()[start - first * row : stop - first * row].clone()

    return Member(str(path), shapes, dtypes, read, base)


def write_safetensors(
    path: Path,
    shapes: Mapping[str, Sequence[int]],
    dtypes: Mapping[str, torch.dtype],
    pieces: Iterable[Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file from flat pieces of its tensors in the order of `shapes`; none of them is kept.

    The library's own writer needs all tensors at once. Format: length of the header (8 bytes, little endian), header
    in JSON, data.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * dtypes[name].itemsize
        header[name] = {"dtype": _DTYPES[dtypes[name]], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_name(path.name + ".part")
    with partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for piece in pieces:
            file.write(piece.contiguous().view(torch.uint8).numpy().data)
        written = file.tell() - 8 - len(text)
    if written != offset:
        partial.unlink()
        raise ValueError(f"{path}: {written} bytes of data instead of {offset}")
    partial.replace(path)


def write_soup(members: Sequence[Member], weights: Sequence[float], path: Path) -> None:
    """Average members into a safetensors file, a piece of a tensor at a time.

    Raises:
        ValueError: If the members do not fit together.
    """
    check_members([m.shapes for m in members], [m.base for m in members], [m.name for m in members])
    first = members[0]
    # wide tensors first: a few bytes of int or half precision must not shift the alignment of what follows
    names = sorted(first.shapes, key=lambda n: (-first.dtypes[n].itemsize, n))

    def pieces() -> Iterator[Tensor]:
        for name in names:
            size = math.prod(first.shapes[name])
            row = max(math.prod(first.shapes[name][1:]), 1)
            step = max(CHUNK // row, 1) * row  # whole rows, so that no row is read twice
            for start in range(0, size, step):
                stop = min(start + step, size)
                read = [m.read(name, start, stop) for m, w in zip(members, weights, strict=True) if w or m is first]
                kept = [w for m, w in zip(members, weights, strict=True) if w or m is first]
                yield average([r.to(first.dtypes[name]) if r.dtype != first.dtypes[name] else r for r in read], kept)

    bases = {m.base for m in members if m.base}
    metadata = {"base": bases.pop()} if bases and all(m.base for m in members) else {}
    write_safetensors(path, {n: first.shapes[n] for n in names}, first.dtypes, pieces(), metadata)


# Adapters


def adapter_soup(
    adapters: Sequence[tuple[Mapping[str, Tensor], Mapping[str, Any]]], weights: Sequence[float]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Average LoRA adapters so that the result, merged, is the average of the merged models.

    Averaging the factors one by one would not do: the mean of products is not the product of means. The factors are put
    side by side instead; the rank is the sum of the ranks.

    Args:
        adapters: Of each member the tensors (`....lora_A.weight` `[r, in]`, `....lora_B.weight` `[out, r]`) and the
            `adapter_config.json`.
        weights: Weight of each member.

    Raises:
        ValueError: If the adapters sit on other layers or models, or have parts other than the two factors.
    """
    names = sorted(adapters[0][0])
    other = [n for n in names if ".lora_A." not in n and ".lora_B." not in n]
    if other:
        raise ValueError(f"adapters with {other[0]} cannot be averaged; accepted: plain LoRA (lora_A and lora_B)")
    bases = {str(config.get("base_model_name_or_path")) for _, config in adapters}
    if len(bases) > 1:
        raise ValueError(f"the adapters are of different models: {', '.join(sorted(bases))}; accepted: one")
    patterned = [k for _, c in adapters for k in ("rank_pattern", "alpha_pattern") if c.get(k)]
    if patterned or any(config.get("use_dora") for _, config in adapters):
        raise ValueError(f"adapters with {(patterned or ['use_dora'])[0]} cannot be averaged; accepted: plain LoRA")
    for state, _ in adapters[1:]:
        if sorted(state) != names:
            raise ValueError(f"the adapters are on different layers: {', '.join(sorted({*state} ^ {*names})[:3])}")

    def scale(config: Mapping[str, Any]) -> float:
        return config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])

    out = {}
    for name in names:
        if ".lora_A." in name:
            out[name] = torch.cat([state[name] for state, _ in adapters], dim=0)
        else:
            scaled = [(w * scale(c) * s[name].double()) for (s, c), w in zip(adapters, weights, strict=True)]
            out[name] = torch.cat(scaled, dim=1).to(adapters[0][0][name].dtype)
    rank = sum(config["r"] for _, config in adapters)
    return out, {**adapters[0][1], "r": rank, "lora_alpha": rank, "use_rslora": False}
