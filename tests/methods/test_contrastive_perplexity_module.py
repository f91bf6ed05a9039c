"""Contrastive perplexity as a module: sentence likelihoods, objectives, adapters, the sign check, checkpoints."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.perplexity_sets.synthetic import PerplexitySets
from tests.nn.test_distributed import on_two_ranks
from zoo.errors import RunError
from zoo.methods.contrastive_perplexity.losses import (
    contrastive_perplexity,
    log_perplexity,
    official_loss,
    perplexity,
    prototype,
)
from zoo.methods.contrastive_perplexity.module import OBJECTIVES, ContrastivePerplexity
from zoo.methods.contrastive_perplexity.networks import adapters_off, merge_adapters, sentence_logprobs
from zoo.nn.lm import build_lm

LLAMA: dict[str, Any] = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32, "initializer_range": 0.3}
GPT2: dict[str, Any] = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
GPT2 |= {"initializer_range": 0.3, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
both_models = pytest.mark.parametrize("lm", [LLAMA, GPT2], ids=["llama", "gpt2"])
VOCAB = 23


def make_model(**changes: Any) -> ContrastivePerplexity:
    arguments: dict[str, Any] = {"lm": LLAMA, "vocab_size": VOCAB, "eos_id": 2}
    torch.manual_seed(0)
    return ContrastivePerplexity(**(arguments | changes))


def make_batch(p: int = 3, n: int = 2, r: int = 0, anchors: int = 2, seed: int = 0) -> dict[str, Any]:
    """Sentences of 3 to 7 random tokens, filled up with the token 9, which is a word too."""
    generator = torch.Generator().manual_seed(seed)
    shape = (anchors, p + n + r)
    length = torch.randint(3, 8, shape, generator=generator)
    mask = torch.arange(7) < length[..., None]
    ids = torch.randint(3, VOCAB, (*shape, 7), generator=generator).where(mask, torch.tensor(9))
    return {"input_ids": ids, "attention_mask": mask, "sizes": [p, n, r], "anchor_id": torch.arange(anchors)}


def step(model: ContrastivePerplexity, batch: dict[str, Any]) -> dict[str, Tensor]:
    """What a step logs, and `total`, its loss with gradient."""
    logged: dict[str, Tensor] = {}
    model.log_dict = lambda values, **_: logged.update(values)  # type: ignore[method-assign, assignment]
    total = model.training_step(batch, 0)
    return {"total": total} | {key.removeprefix("train/"): value for key, value in logged.items()}


@torch.no_grad()
def one_by_one(lm: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Log-perplexity of each sentence by `transformers`' own loss, and its predicted tokens, without any padding."""
    ids, mask = batch["input_ids"].flatten(0, 1), batch["attention_mask"].flatten(0, 1)
    rows = [row[keep][None] for row, keep in zip(ids, mask, strict=True)]
    losses = torch.stack([lm(input_ids=row, labels=row).loss for row in rows])
    return losses.view(mask.shape[0] // sum(batch["sizes"]), -1), torch.tensor([row.shape[1] - 1 for row in rows])


# ---------------------------------------------------------------- likelihood of sentences


@both_models
def test_log_perplexity_is_that_of_transformers_whatever_the_padding(lm: dict[str, Any]) -> None:
    model, batch = make_model(lm=lm), make_batch()
    expected, tokens = one_by_one(model.lm, batch)
    got, counts = model.log_perplexities(batch)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert counts.flatten().tolist() == tokens.tolist()
    ids, mask = batch["input_ids"].flatten(0, 1), batch["attention_mask"].flatten(0, 1)
    order = (torch.arange(7) + mask.sum(dim=1, keepdim=True)) % 7  # the same tokens flush right
    left = log_perplexity(*sentence_logprobs(model.lm, ids.gather(1, order), mask.gather(1, order)))
    torch.testing.assert_close(left, expected.flatten(), atol=1e-5, rtol=1e-5)


@both_models
@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_logits_in_chunks_give_the_same_loss_and_gradients(lm: dict[str, Any], chunk: int) -> None:
    batch = make_batch(r=1)
    plain, chunked = (make_model(lm=lm, objective="paper_log", lambda_lm=0.5, head_chunk=c) for c in (0, chunk))
    losses = [step(model, batch)["total"] for model in (plain, chunked)]
    torch.testing.assert_close(losses[0], losses[1])
    for loss in losses:
        loss.backward()
    for (name, one), (_, two) in zip(plain.named_parameters(), chunked.named_parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, atol=1e-6, rtol=1e-4, msg=name)


def test_logits_in_chunks_never_hold_all_tokens() -> None:
    model, batch = make_model(objective="sft_pos", head_chunk=4), make_batch()
    seen: list[int] = []
    model.lm.lm_head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[0]))
    step(model, batch)["total"].backward()
    assert max(seen) == 4
    assert sum(seen) >= int(batch["attention_mask"].sum()) - 10


def test_checkpointed_activations_change_nothing() -> None:
    models = [make_model(objective="paper_log", gradient_checkpointing=flag) for flag in (False, True)]
    for model in models:
        step(model, make_batch())["total"].backward()
    for one, two in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one.grad, two.grad)


# ---------------------------------------------------------------- objectives


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("r", [0, 2])
def test_the_loss_is_the_equation_on_perplexities_of_single_sentences(objective: str, r: int) -> None:
    model = make_model(objective=objective, tau=0.4, alpha=1.3, lambda_lm=0.7, beta=0.6, gamma=0.2)
    batch = make_batch(p=3, n=2, r=r)
    l, _tokens = one_by_one(model.lm, batch)  # noqa: E741
    pos, neg, random = l.split([3, 2, r], dim=1)
    every_neg = torch.cat([neg, random], dim=1)
    if objective == "paper":
        phi = perplexity(pos), perplexity(every_neg)
        expected = contrastive_perplexity(*phi, prototype(phi[0]), 1.3, 0.4, "inside") + 0.7 * pos.mean()
    elif objective == "paper_log":
        expected = contrastive_perplexity(pos, every_neg, prototype(pos), 1.3, 0.4, "inside") + 0.7 * pos.mean()
    elif objective == "official":
        expected = official_loss(pos, neg, random, prototype(pos), 1.3, 0.4) + 0.7 * pos.mean()
    elif objective == "sft_pos":
        expected = pos.mean()
    elif objective == "unlikelihood_neg":
        expected = -every_neg.mean()
    elif objective == "dpo":
        expected = torch.tensor(math.log(2))  # policy and reference are one before the first step
    else:
        expected = -torch.nn.functional.logsigmoid(0.6 * (neg - pos[:, :2]) - 0.2).mean()
    logged = step(model, batch)
    torch.testing.assert_close(logged["total"], expected, atol=1e-5, rtol=1e-5)
    assert logged["log_ppl_pos"].item() == pytest.approx(pos.mean().item(), abs=1e-5)
    assert logged["gap"].item() == pytest.approx((every_neg.mean() - pos.mean()).item(), abs=1e-5)


def test_switches_reach_the_objective() -> None:
    batch = make_batch(anchors=3)
    arguments: dict[str, Any] = {"objective": "paper_log", "tau": 0.3}
    one = step(make_model(**arguments), batch)["total"].item()
    for change in ({"tau_mode": "cancel"}, {"prototype": "batch"}, {"alpha": 2.0}, {"distance": "one_sided"}):
        assert step(make_model(**(arguments | change)), batch)["total"].item() != pytest.approx(one, abs=1e-6)
    detached = make_model(**arguments, detach_prototype=True)
    loss = step(detached, batch)["total"]
    assert loss.item() == pytest.approx(one, abs=1e-6)
    loss.backward()
    attached = make_model(**arguments)
    step(attached, batch)["total"].backward()
    assert not torch.allclose(detached.lm.lm_head.weight.grad, attached.lm.lm_head.weight.grad)


def test_what_is_watched() -> None:
    model, batch = make_model(objective="paper_log"), make_batch()
    l, _ = model.log_perplexities(batch)  # noqa: E741
    below = (l[:, 3:] < l[:, :3].mean(dim=1, keepdim=True)).float().mean()
    logged = step(model, batch)
    assert logged["frac_neg_below_prototype"].item() == pytest.approx(below.item())
    assert {"loss", "contrastive", "log_ppl_pos", "log_ppl_neg", "gap"} <= logged.keys()


@pytest.mark.parametrize("rank", [0, 4])
def test_dpo_moves_pairs_apart_and_leaves_its_reference(rank: int) -> None:
    model = make_model(objective="dpo", beta=0.5, lora_rank=rank)
    batch = make_batch(p=2, n=2)
    trained = [p for p in model.lm.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05)
    with torch.no_grad():
        if model.reference is None:
            with adapters_off(model.lm):
                reference = model.log_perplexities(batch)[0]
        else:
            reference = model.log_perplexities(batch, model.reference)[0]
    before = model.log_perplexities(batch)[0].detach()
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = step(model, batch)["total"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[-1] < 0.9 * losses[0]
    after = model.log_perplexities(batch)[0].detach()

    def gap(l: Tensor) -> float:  # noqa: E741
        return (l[:, 2:] - l[:, :2]).mean().item()

    assert gap(after) > gap(before) + 0.02
    with torch.no_grad():
        if model.reference is None:
            with adapters_off(model.lm):
                now = model.log_perplexities(batch)[0]
            assert model.lm.training
            assert all(p.requires_grad for p in trained)
        else:
            now = model.log_perplexities(batch, model.reference)[0]
            assert not any(p.requires_grad for p in model.reference.parameters())
    assert torch.equal(reference, now)


def test_the_reference_of_dpo_has_no_dropout_and_causes_no_warning(tmp_path: Path) -> None:
    model = world_model(make_data(), objective="dpo", lm=GPT2 | {"resid_pdrop": 0.5})
    fit(model, make_data(), tmp_path)
    assert model.reference is not None
    assert not any(part.training for part in model.reference.modules())
    assert all(part.training for part in model.lm.modules())


def test_without_negatives_only_the_positives_can_be_learned() -> None:
    batch = make_batch(p=2, n=0)
    assert step(make_model(objective="sft_pos"), batch)["total"].isfinite()
    with pytest.raises(ValueError, match="objective: 'paper_log' needs negatives"):
        step(make_model(objective="paper_log"), batch)


def batch_prototype(number: int) -> dict[str, Tensor]:
    l_pos = torch.tensor([[1.0, 2.0], [4.0, 3.0]])[number : number + 1].requires_grad_()
    l_neg = torch.tensor([[5.0, 2.5], [4.5, 6.0]])[number : number + 1].requires_grad_()
    c = prototype(l_pos, "batch")
    loss = contrastive_perplexity(l_pos, l_neg, c)
    (loss / 2).backward()
    assert l_pos.grad is not None
    return {"c": c.detach(), "loss": loss.detach(), "grad": l_pos.grad}


def test_the_batch_prototype_of_two_processes_is_that_of_all_anchors(tmp_path: Path) -> None:
    found = on_two_ranks(batch_prototype, tmp_path)
    l_pos = torch.tensor([[1.0, 2.0], [4.0, 3.0]], requires_grad=True)
    l_neg = torch.tensor([[5.0, 2.5], [4.5, 6.0]])
    c = prototype(l_pos, "batch")
    loss = contrastive_perplexity(l_pos, l_neg, c)
    loss.backward()
    assert [part["c"].item() for part in found] == [2.5, 2.5]
    assert sum(part["loss"].item() for part in found) / 2 == pytest.approx(loss.item())
    torch.testing.assert_close(torch.cat([part["grad"] for part in found]), l_pos.grad)


# ---------------------------------------------------------------- adapters


@both_models
def test_adapters_alone_are_trained_and_merge_into_the_weights(lm: dict[str, Any], tmp_path: Path) -> None:
    model = make_model(lm=lm, objective="paper_log", lora_rank=3, lora_alpha=6.0)
    batch = make_batch()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if ".lora_" in name} != set()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):  # B is zero, so A gets its gradient in the second step
        optimizer.zero_grad()
        step(model, batch)["total"].backward()
        assert all(p.grad is None for name, p in model.named_parameters() if name not in trained)
        optimizer.step()
    assert {name for name, p in model.named_parameters() if not torch.equal(p, start[name])} == trained
    ids = batch["input_ids"][0]
    with torch.no_grad():
        expected = model.lm.eval()(input_ids=ids).logits
        with adapters_off(model.lm):
            assert not torch.allclose(model.lm(input_ids=ids).logits, expected, atol=1e-3)
        merged = model.merged()
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)
        assert not any("lora" in name for name, _ in merged.named_parameters())
        assert any("lora" in name for name, _ in model.lm.named_parameters()), "the module itself stays as it was"
        merged.save_pretrained(tmp_path)
        again = build_lm(str(tmp_path))
        torch.testing.assert_close(again(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)


def test_adapters_sit_where_they_are_asked_for() -> None:
    def places(**changes: Any) -> set[str]:
        model = make_model(lora_rank=2, **changes)
        return {name.split(".lora_")[0].rpartition(".")[2] for name, _ in model.named_parameters() if ".lora_" in name}

    linear = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert places() == linear
    assert places(lora_targets=["q_proj", "v_proj"]) == {"q_proj", "v_proj"}
    assert places(lora_targets=[*sorted(linear), "lm_head"]) == {*linear, "lm_head"}


def test_an_adapted_head_is_part_of_chunked_logits() -> None:
    batch = make_batch()
    losses = []
    for chunk in (0, 5):
        model = make_model(objective="paper_log", lora_rank=2, lora_targets=["lm_head"], head_chunk=chunk)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.fill_(0.1)
        losses.append(step(model, batch)["total"])
    torch.testing.assert_close(*losses)


def test_merging_a_model_without_adapters_changes_nothing() -> None:
    lm = make_model().lm
    state = {name: value.clone() for name, value in lm.state_dict().items()}
    merged = merge_adapters(lm).state_dict()
    assert all(torch.equal(merged[name], value) for name, value in state.items())


def test_four_bits_need_loaded_weights_adapters_and_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    for changes in ({"lora_rank": 4}, {"lm": "some/model"}):
        with pytest.raises(ValueError, match="four_bit: true needs a pre-trained model"):
            make_model(four_bit=True, **changes)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        make_model(lm="some/model", four_bit=True, lora_rank=4)


# ---------------------------------------------------------------- sign check and starting weights


def make_data(**changes: Any) -> PerplexitySets:
    arguments: dict[str, Any] = {"num_anchors": 12, "positives": 2, "negatives": 2, "candidates": 3, "batch_size": 3}
    arguments |= {"val_documents": 6, "test_documents": 6, "val_prompts": 4, "test_prompts": 4, "eval_batch_size": 4}
    return PerplexitySets(**(arguments | changes))


def world_model(data: PerplexitySets, **changes: Any) -> ContrastivePerplexity:
    return make_model(vocab_size=data.vocab_size, eos_id=data.eos_id, **({"objective": "paper_log"} | changes))


def prefer(model: ContrastivePerplexity, data: PerplexitySets, wanted: bool) -> None:
    """Make the wanted (or the unwanted) words likely everywhere."""
    lexicon = data.world.wanted if wanted else data.world.unwanted
    head = model.lm.lm_head.weight
    with torch.no_grad():
        head.zero_()
        model.lm.model.norm.weight.fill_(1.0)
        direction = torch.randn(head.shape[1], generator=torch.Generator().manual_seed(0))
        model.lm.model.embed_tokens.weight.copy_(direction.expand_as(model.lm.model.embed_tokens.weight))
        for layer in model.lm.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        head[[data.world.token[word] for word in lexicon]] = direction / direction.norm()


def fit(model: ContrastivePerplexity, data: Any, folder: Path, **changes: Any) -> Trainer:
    arguments: dict[str, Any] = {"max_steps": 2, "limit_val_batches": 0, "logger": False, "accelerator": "cpu"}
    arguments |= {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder}
    trainer = Trainer(**(arguments | {"enable_checkpointing": False} | changes))
    with_loader = {"train_dataloaders": data} if isinstance(data, DataLoader) else {"datamodule": data}
    trainer.fit(model, **with_loader)  # type: ignore[arg-type]
    return trainer


@pytest.mark.parametrize("objective", ["paper", "paper_log", "official"])
@pytest.mark.parametrize("members", [{}, {"negatives": 0, "random_negatives": 2}], ids=["hard", "random"])
def test_training_that_would_go_the_wrong_way_is_refused(
    objective: str, members: dict[str, Any], tmp_path: Path
) -> None:
    data = make_data(**members)
    model = world_model(data, objective=objective)
    prefer(model, data, wanted=False)
    start = model.lm.lm_head.weight.detach().clone()
    with pytest.raises(RunError, match="the negatives are more likely than the positives: log-perplexity"):
        fit(model, data, tmp_path)
    assert torch.equal(model.lm.lm_head.weight, start)
    assert model.global_step == 0
    prefer(model, data, wanted=True)
    assert fit(model, data, tmp_path).global_step == 2


@pytest.mark.parametrize("changes", [{"distance": "one_sided"}, {"sign_check_batches": 0}, {"objective": "sft_pos"}])
def test_the_sign_is_checked_only_where_it_matters(changes: dict[str, Any], tmp_path: Path) -> None:
    data = make_data()
    model = world_model(data, **changes)
    prefer(model, data, wanted=False)
    assert fit(model, data, tmp_path).global_step == 2


def test_the_sign_check_disturbs_neither_data_nor_weights(tmp_path: Path) -> None:
    losses = []
    for checked in (0, 3):
        data = make_data()
        seed_everything(0, verbose=False)
        model = world_model(data, sign_check_batches=checked, distance="one_sided")
        seen: list[float] = []
        model.log_dict = lambda values, seen=seen, **_: seen.append(float(values["train/loss"]))  # type: ignore
        fit(model, data, tmp_path, max_steps=4)
        assert model.lm.training
        losses.append(seen)
    assert losses[0] == losses[1]


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_the_sign_check_reads_any_loader(tmp_path: Path) -> None:
    data = make_data()
    model = world_model(data)
    prefer(model, data, wanted=False)
    batches = data.training_batches()
    loader: Any = DataLoader([batches.batch(0, i) for i in range(3)], batch_size=None)  # type: ignore[arg-type]
    with pytest.raises(RunError, match="more likely than the positives"):
        fit(model, loader, tmp_path, limit_val_batches=None)


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 2}, {"objective": "dpo"}])
def test_training_starts_from_the_weights_of_another_run(changes: dict[str, Any], tmp_path: Path) -> None:
    data = make_data(source="corpus", corpus_size=12)
    base = world_model(data, objective="sft_pos", lr=0.05)
    fit(base, data, tmp_path, enable_checkpointing=True, max_steps=3).save_checkpoint(tmp_path / "base.ckpt")
    model = world_model(data, init_from=str(tmp_path / "base.ckpt"), sign_check_batches=0, lr=1e-12, **changes)
    fit(model, make_data(), tmp_path, max_steps=1)
    ids = make_batch()["input_ids"][0]
    with torch.no_grad():
        expected = base.lm.eval()(input_ids=ids).logits
        torch.testing.assert_close(model.lm.eval()(input_ids=ids).logits, expected)
        if model.reference is not None:
            torch.testing.assert_close(model.reference(input_ids=ids).logits, expected)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    data = make_data()
    for name, lm in (("narrow", LLAMA | {"hidden_size": 8}), ("shallow", LLAMA | {"num_hidden_layers": 1})):
        torch.save({"state_dict": world_model(data, lm=lm).state_dict()}, tmp_path / f"{name}.ckpt")
        with pytest.raises(ValueError, match=r"init_from: \d+ weights do not fit the model"):
            fit(world_model(data, init_from=str(tmp_path / f"{name}.ckpt")), data, tmp_path)
    with pytest.raises(FileNotFoundError, match="no file of weights"):
        fit(world_model(data, init_from=str(tmp_path / "none.ckpt")), data, tmp_path)


# ---------------------------------------------------------------- evaluation, schedule, arguments


def test_perplexities_are_per_token_and_mixtures_weigh_documents(tmp_path: Path) -> None:
    data = make_data()
    model = world_model(data)
    trainer = fit(model, data, tmp_path, max_steps=1)
    trainer.test(model, datamodule=data, verbose=False)
    values = trainer.callback_metrics
    sums = []
    for unwanted in (False, True):
        batches, total = data.document_batches("test", unwanted), torch.zeros(2)
        for index in range(len(batches)):
            batch: Any = batches.batch(0, index)
            one = {key: batch[key][:, None] for key in ("input_ids", "attention_mask")}
            l, tokens = one_by_one(model.lm, {**one, "sizes": [1]})  # noqa: E741
            total += torch.stack([(l.flatten() * tokens).sum(), tokens.sum()])
        sums.append(total)
    for name, share in (("wanted", 0.0), ("mixed_50", 0.5), ("mixed_75", 0.75), ("unwanted", 1.0)):
        nll, tokens = (1 - share) * sums[0] + share * sums[1]
        assert values[f"test/ppl_{name}"].item() == pytest.approx(math.exp(nll / tokens), rel=1e-4)
    assert set(model.figures()) == {"perplexities"}


def test_continuations_end_and_follow_their_generator() -> None:
    data = make_data()
    model = world_model(data, max_new_tokens=6).eval()
    batch = data.prompt_batches("test").batch(0, 0)
    one, two, three = (
        model.generate(batch["prompt_ids"], batch["prompt_mask"], torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    )
    assert torch.equal(one.tokens, two.tokens)
    assert not torch.equal(one.tokens, three.tokens)
    assert one.tokens.shape[1] <= 6
    assert model.predict_step(batch, 0).tokens.shape[0] == len(batch["prompt_ids"])


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [0.5, 1, 1, 1, 1]), ("linear", [0.5, 1, 1, 0.75, 0.5]), ("cosine", [0.5, 1, 1, None, 0.5])],
)
def test_schedules(schedule: str, expected: list[float | None], tmp_path: Path) -> None:
    data = make_data()
    model = world_model(data, schedule=schedule, warmup_steps=2, lr=1e-3, sign_check_batches=0)
    rates: list[float] = []
    model.on_train_batch_start = lambda *_: rates.append(  # type: ignore[method-assign, assignment]
        model.trainer.optimizers[0].param_groups[0]["lr"] / 1e-3
    )
    fit(model, data, tmp_path, max_steps=6)
    for got, wanted in zip(rates[:5], expected, strict=True):
        assert wanted is None or got == pytest.approx(wanted, abs=0.02)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "ppo"}, "objective: 'ppo' is unknown; accepted: paper, paper_log, official, sft_pos"),
        ({"tau_mode": "outside"}, "tau_mode: 'outside'"),
        ({"prototype": "median"}, "prototype: 'median'"),
        ({"distance": "squared"}, "distance: 'squared'"),
        ({"objective": "official", "distance": "one_sided"}, "distance: 'one_sided' does not go with objective"),
        ({"schedule": "step"}, "schedule: 'step'"),
        ({"tau": 0.0}, "tau: 0.0 is not accepted; accepted: above 0"),
        ({"lr": -1.0}, "lr: -1.0"),
        ({"alpha": -0.1}, "alpha: -0.1 is not accepted; accepted: 0 or more"),
        ({"lambda_lm": -1.0}, "lambda_lm: -1.0"),
        ({"head_chunk": -1}, "head_chunk: -1"),
        ({"lora_rank": -1}, "lora_rank: -1"),
        ({"top_p": 0.0}, "top_p: 0.0"),
        ({"lm": {"model_type": "llamma"}}, "model_type: 'llamma' is not a causal language model"),
        ({"lora_rank": 2, "lora_targets": ["qkv"]}, "qkv"),
    ],
)
def test_bad_values_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(**changes)
