"""AIMv2 as a module: what reaches which loss, stages on one another's weights, captions, zero-shot, export."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor

from datamodules.image_captions import DigitsCaptions
from zoo.methods.aimv2.export import export, export_lit
from zoo.methods.aimv2.losses import normalise_patches, patchify, pixel_errors, pooled_mean, token_errors
from zoo.methods.aimv2.module import AIMv2
from zoo.methods.aimv2.networks import Towers

VOCAB, PAD, EOS = 12, 0, 1


def make_model(**changes: Any) -> AIMv2:
    arguments: dict[str, Any] = {"vocab_size": VOCAB, "pad_id": PAD, "eos_id": EOS, "context_length": 6}
    arguments |= {"in_channels": 1, "image_size": 12, "lr": 3e-3, "warmup_steps": 2}
    arguments |= {"trunk": {"patch_size": 3, "width": 16, "depth": 2, "heads": 2, "multiple_of": 16}}
    arguments |= {"decoder": {"width": 16, "depth": 2, "heads": 2, "multiple_of": 16, "mlp_width": 8, "mlp_depth": 2}}
    arguments |= {"text_tower": {"width": 16, "depth": 2, "heads": 2, "embed_dim": 8, "multiple_of": 16}}
    torch.manual_seed(0)
    return AIMv2(**(arguments | changes))


def make_batch(n: int = 5, seed: int = 0, size: int = 12) -> dict[str, Tensor]:
    """Noise images with captions of 2 to 5 tokens."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(2, VOCAB, (n, 5), generator=generator)
    length = torch.arange(n) % 4 + 1
    text[torch.arange(n), length] = EOS
    text[torch.arange(5) > length[:, None]] = PAD
    image = torch.randn(n, 1, size, size, generator=generator)
    return {"image": image, "text": text, "target": torch.arange(n) % 3 - 1}


def step(model: AIMv2, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Losses of one batch by name; `total` has the gradient. Prefix lengths follow from a fixed seed."""
    logged: dict[str, Tensor] = {}
    model.log_dict = lambda values, **_: logged.update(values)  # type: ignore[method-assign, assignment]
    torch.manual_seed(7)
    total = model.training_step(batch, 0)
    return {"total": total} | {key.removeprefix("train/"): value for key, value in logged.items()}


def gradient_of(model: AIMv2, start: str) -> Tensor:
    found = [p.grad for name, p in model.named_parameters() if name.startswith(start)]
    assert found, start
    return torch.stack([torch.zeros(()) if g is None else g.abs().max() for g in found]).max()


def begin(model: AIMv2) -> AIMv2:
    """Load what `init_from` names, as a trainer does."""
    model._trainer = SimpleNamespace(ckpt_path=None)  # type: ignore[assignment]
    model.setup("fit")
    return model


def save(model: AIMv2, path: Path) -> str:
    torch.save({"state_dict": model.state_dict()}, path)
    return str(path)


# ---------------------------------------------------------------- the losses


@pytest.mark.parametrize("alpha", [0.0, 0.4, 2.0])
def test_total_is_text_plus_alpha_times_pixels(alpha):
    got = step(make_model(alpha=alpha), make_batch())
    torch.testing.assert_close(got["total"].detach(), got["loss_text"] + alpha * got["loss_pixel"])


def test_the_step_is_the_algorithm_of_the_paper():
    """Written out once more, without the functions of the module, for prefix lengths that differ."""
    model, batch = make_model(), make_batch()
    got = step(model, batch)
    torch.manual_seed(7)
    lengths = torch.randint(1, 16, (5,))
    assert len(lengths.unique()) > 1
    place = torch.arange(16)
    allowed = (place[None, None] < lengths[:, None, None]) | (place[None, None] <= place[None, :, None])
    pixels, logits = model.decoder(model.trunk(batch["image"], allowed), batch["text"])
    target = normalise_patches(patchify(batch["image"], 3))
    pixel = text = 0.0
    n_pixel = n_text = 0
    for b in range(5):
        for j in range(int(lengths[b]), 16):
            pixel, n_pixel = pixel + (pixels[b, j - 1] - target[b, j]).square().mean(), n_pixel + 1
        for k in range(5):
            if batch["text"][b, k] != PAD:
                text, n_text = text - logits[b, k].log_softmax(0)[batch["text"][b, k]], n_text + 1
    torch.testing.assert_close(got["loss_pixel"], (pixel / n_pixel).detach())
    torch.testing.assert_close(got["loss_text"], (text / n_text).detach())


def test_labels_never_reach_the_loss():
    model, batch = make_model(), make_batch()
    assert torch.equal(step(model, batch)["total"], step(model, {**batch, "target": batch["target"] + 1})["total"])


def test_without_weight_a_part_gets_no_gradient():
    model = make_model(alpha=0.0)
    step(model, make_batch())["total"].backward()
    assert gradient_of(model, "decoder.pixel_head") == 0
    assert gradient_of(model, "decoder.text_head") > 0


def test_pixels_do_not_see_the_caption_and_are_those_of_image_only():
    model, batch = make_model(), make_batch()
    alone = make_model(objective="image_only")
    missing, unexpected = alone.load_state_dict(model.state_dict(), strict=False)
    assert not missing
    assert all("text" in name or name.split(".")[1] in ("embedding", "start", "positions") for name in unexpected)
    both, single = step(model, batch), step(alone, batch)
    torch.testing.assert_close(both["loss_pixel"], single["loss_pixel"])
    torch.testing.assert_close(single["total"].detach(), single["loss_pixel"])  # alpha weighs beside text alone
    errors = model.errors(batch, torch.full((5,), 4))["pixel"]
    model.zero_grad()
    pooled_mean(*errors).backward()
    for part in ("decoder.embedding", "decoder.text_head", "decoder.start", "decoder.positions"):
        assert gradient_of(model, part) == 0
    assert gradient_of(model, "trunk.patch_embed") > 0


VARIANTS: list[dict[str, Any]] = [
    {},
    {"objective": "image_only"},
    {"objective": "captioner"},
    {"objective": "captioner", "mask": "full"},
    {"mask": "causal"},
    {"order": "text_image"},
    {"image_head": "aimv1_mlp"},
    {"objective": "image_only", "image_head": "aimv1_mlp"},
    {"pixel_norm": "paper"},
    {"objective": "clip"},
    {"objective": "lit"},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=lambda c: "-".join(c.values()) or "aimv2")
def test_every_variant_trains_all_that_is_not_frozen(changes):
    model, batch = make_model(**changes), make_batch()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = step(model, batch)["total"]
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
    assert losses[-1] < 0.95 * losses[0]
    frozen = changes.get("objective") == "lit"
    for name, parameter in model.named_parameters():
        if frozen and name.startswith("trunk."):
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None, name
            assert parameter.grad.any() or name == "decoder.embedding.weight", name


def test_a_frozen_trunk_stays_out_of_the_optimiser():
    model = make_model(objective="lit")
    model._trainer = SimpleNamespace(estimated_stepping_batches=10)  # type: ignore[assignment]
    groups: Any = model.configure_optimizers()
    held = {id(p) for group in groups["optimizer"].param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    assert not any(id(p) in held for p in model.trunk.parameters())


def test_what_decays():
    model = make_model()
    model._trainer = SimpleNamespace(estimated_stepping_batches=10)  # type: ignore[assignment]
    found: Any = model.configure_optimizers()
    decayed, rest = found["optimizer"].param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    kept = {names[id(p)] for p in rest["params"]}
    assert {"trunk.positions", "decoder.positions", "decoder.start", "trunk.patch_embed.bias"} <= kept
    assert all("norm" in n or n.endswith(("positions", "start", "bias")) for n in kept)
    assert decayed["weight_decay"] == pytest.approx(1e-4 / 3e-3)
    assert rest["weight_decay"] == 0


# ---------------------------------------------------------------- prefix and masks


def test_prefix_lengths_are_drawn_for_each_image_and_leave_something_to_predict():
    model, images = make_model(), torch.zeros(3000, 1, 12, 12)
    lengths = model.draw_prefix(images, 3000, 0)
    assert (int(lengths.min()), int(lengths.max())) == (1, 15)
    assert lengths.bincount(minlength=16)[1:].min() > 120
    torch.manual_seed(1)
    whole = model.draw_prefix(images[:6], 6, 0)
    torch.manual_seed(1)
    assert torch.equal(model.draw_prefix(images[:2], 6, 4), whole[4:])  # the rows of a rank
    assert set(make_model(mask="causal").draw_prefix(images[:4], 4, 0).tolist()) == {1}


def test_features_have_no_mask_and_validation_has_one():
    model, batch = make_model().eval(), make_batch()
    full = model.trunk(batch["image"], torch.ones(1, 16, 16, dtype=torch.bool))
    torch.testing.assert_close(model(batch["image"]), full)
    assert not torch.allclose(model.encode(batch["image"], torch.full((5,), 3)), full)
    captioner = make_model(objective="captioner", mask="full").eval()
    image = batch["image"]
    torch.testing.assert_close(captioner.encode(image, torch.full((5,), 3)), captioner(image))
    torch.testing.assert_close(model.features(image), full.mean(1))


def test_evaluation_does_not_depend_on_the_random_state():
    results = []
    for seed in (0, 1):
        seed_everything(seed, verbose=False)
        data = DigitsCaptions(train_images=64, val_images=100, batch_size=32, eval_batch_size=40)
        trunk = {"patch_size": 2, "width": 16, "depth": 2, "heads": 2, "multiple_of": 16}
        torch.manual_seed(0)
        model = make_model(
            vocab_size=data.vocab_size, context_length=16, image_size=8, trunk=trunk, class_prompts=data.class_prompts
        )
        torch.manual_seed(seed)
        trainer = Trainer(
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        results.append(trainer.validate(model, data, verbose=False)[0])
    assert results[0] == results[1]
    assert set(results[0]) == {"val/loss_pixel", "val/loss_predict_zero", "val/loss_text"}


# ---------------------------------------------------------------- captions


def test_captions_are_the_most_likely_tokens_one_by_one():
    model, images = make_model().eval(), make_batch()["image"]
    said = model.caption(images)
    features = model.trunk(images)
    for b in range(5):
        tokens: list[int] = []
        while len(tokens) < 6 and EOS not in tokens:
            # the decoder with one more token of any kind: its last logits follow the tokens before it
            _, logits = model.decoder(features[b : b + 1], torch.tensor([[*tokens, 5]]))
            tokens.append(int(logits[0, -1].argmax()))
        padding = [PAD] * (said.shape[1] - len(tokens))
        assert said[b].tolist() == tokens + padding


def test_captions_of_images_that_were_learned_by_heart():
    model, batch = make_model(objective="captioner", mask="full"), make_batch(4)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(120):
        optimizer.zero_grad()
        step(model, batch)["total"].backward()
        optimizer.step()
    said = model.eval().caption(batch["image"])
    longest = int((batch["text"] != PAD).sum(1).max())
    assert torch.equal(said, batch["text"][:, :longest])
    predicted = model.predict_step(batch, 0)
    assert torch.equal(predicted["caption"], said)
    assert predicted["features"].shape == (4, 16, 16)


def test_a_caption_that_is_too_long_is_refused():
    batch = make_batch()
    for objective in ("aimv2", "clip"):
        with pytest.raises(ValueError, match="captions of 5 tokens are longer than context_length: 4"):
            step(make_model(context_length=4, objective=objective), batch)


def test_images_that_the_patch_size_does_not_divide():
    with pytest.raises(ValueError, match="images of 13 x 13 pixels cannot be cut into patches of 3"):
        make_model()(torch.zeros(1, 1, 13, 13))


# ---------------------------------------------------------------- stages on one another's weights


def test_high_resolution_goes_on_from_a_checkpoint(tmp_path: Path):
    small = make_model()
    source = save(small, tmp_path / "small.ckpt")
    large = begin(make_model(image_size=18, init_from=source, init_parts="network"))
    assert large.trunk.positions.shape == (36, 16)
    for name, value in small.state_dict().items():
        if name != "trunk.positions":
            assert torch.equal(large.state_dict()[name], value), name
    corner = large.trunk.positions.view(6, 6, 16)[0, 0] - small.trunk.positions[0]
    assert corner.abs().max() < small.trunk.positions[0].abs().max()
    assert torch.isfinite(step(large, make_batch(size=18))["total"])
    trunk_alone = begin(make_model(image_size=18, init_from=source))
    assert torch.equal(trunk_alone.trunk.positions, large.trunk.positions)
    assert torch.equal(trunk_alone.decoder.start, make_model(image_size=18).decoder.start)


def test_the_trunk_resizes_its_positions_for_other_images():
    model = make_model().eval()
    assert model(torch.randn(2, 1, 18, 15)).shape == (2, 30, 16)
    step(model, make_batch(size=18))["total"].backward()
    assert gradient_of(model, "trunk.positions") > 0


def test_weights_of_another_size_are_refused(tmp_path: Path):
    source = save(make_model(), tmp_path / "a.ckpt")
    wide = {"patch_size": 3, "width": 32, "depth": 2, "heads": 2, "multiple_of": 16}
    with pytest.raises(ValueError, match=r"weights do not fit the trunk; .*of another shape: .* is \[.*expected"):
        begin(make_model(trunk=wide, init_from=source))
    deep = {"patch_size": 3, "width": 16, "depth": 3, "heads": 2, "multiple_of": 16}
    with pytest.raises(ValueError, match=r"weights do not fit the trunk; .* missing: blocks.2"):
        begin(make_model(trunk=deep, init_from=source))
    with pytest.raises(ValueError, match="weights do not fit the decoder"):
        begin(make_model(vocab_size=VOCAB + 1, init_from=source, init_parts="network"))
    with pytest.raises(FileNotFoundError, match="init_from: no file of weights at"):
        begin(make_model(init_from=str(tmp_path / "none.ckpt")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"init_from: no \*.safetensors in"):
        begin(make_model(init_from=str(tmp_path / "empty")))


def test_a_resumed_run_does_not_read_its_first_weights_again():
    model = make_model(init_from="none.ckpt")
    model._trainer = SimpleNamespace(ckpt_path="here.ckpt")  # type: ignore[assignment]
    model.setup("fit")


# ---------------------------------------------------------------- LiT, zero-shot, export


def trained(model: AIMv2, batch: dict[str, Tensor], steps: int = 40) -> AIMv2:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        step(model, batch)["total"].backward()
        optimizer.step()
    return model.eval()


def test_lit_learns_to_classify_by_captions_on_a_frozen_trunk():
    """Three kinds of images, each with its caption; captions of the classes tell them apart."""
    generator = torch.Generator().manual_seed(3)
    kinds = torch.randn(3, 1, 12, 12, generator=generator)
    prompts = [[4 + c, 9, EOS] for c in range(3)]
    images = kinds + 0.1 * torch.randn(3, 1, 12, 12, generator=generator)
    model = make_model(objective="lit", class_prompts=prompts)
    before = {name: value.clone() for name, value in model.trunk.state_dict().items()}
    trained(model, {"image": images, "text": torch.tensor(prompts)})
    assert all(torch.equal(before[name], value) for name, value in model.trunk.state_dict().items())
    test = kinds.repeat(4, 1, 1, 1) + 0.1 * torch.randn(12, 1, 12, 12, generator=generator)
    cosines = model.classify(test)
    assert cosines.abs().max() <= 1 + 1e-5
    assert torch.equal(cosines.argmax(1), torch.arange(12) % 3)
    assert isinstance(model.towers, Towers)
    assert 1 <= float(model.towers.scale.detach()) <= 100


def test_zero_shot_accuracy_counts_labelled_images_alone():
    prompts = [[4, EOS], [5, EOS], [6, EOS]]
    model, batch = make_model(objective="clip", class_prompts=prompts).eval(), make_batch(9)
    said = model.classify(batch["image"]).argmax(1)
    model.log = model.log_dict = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    model.test_step({**batch, "target": torch.where(torch.arange(9) < 6, said, -1)}, 0)
    assert float(model.accuracy.compute()) == 1
    assert int(model.accuracy.tp) == 6


def test_lit_goes_to_transformers_and_back(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    model = make_model(objective="lit", in_channels=3).eval()
    assert model.towers is not None
    export_lit(model.trunk, model.towers, tmp_path / "lit")
    theirs = transformers.Aimv2Model.from_pretrained(tmp_path / "lit").eval()
    images, text = torch.randn(3, 3, 12, 12), torch.tensor([[5, 6, 7, 1], [8, 1, 0, 0], [3, 4, 1, 0]])
    said = theirs(input_ids=text, pixel_values=images, attention_mask=(text != PAD).long()).logits_per_image
    ours = model.towers.scale * model.embed_images(images) @ model.towers.embed_text(text).T
    torch.testing.assert_close(ours, said, atol=1e-4, rtol=1e-4)
    again = make_model(objective="lit", in_channels=3, init_from=str(tmp_path / "lit"), init_parts="network")
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.add_(1)
    begin(again)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    trunk_alone = begin(make_model(in_channels=3, init_from=str(tmp_path / "lit")))
    torch.testing.assert_close(trunk_alone(images), model(images))


def test_a_checkpoint_is_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    transformers = pytest.importorskip("transformers")
    from zoo.methods.aimv2.export import main

    for objective, name in (("aimv2", "Aimv2VisionModel"), ("lit", "Aimv2Model")):
        model = make_model(objective=objective)
        content = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}
        torch.save({**content, "pytorch-lightning_version": "2.6.6"}, tmp_path / f"{objective}.ckpt")
        main([str(tmp_path / f"{objective}.ckpt"), str(tmp_path / objective)])
        assert re.search(rf"transformers\.{name}\.from_pretrained", capsys.readouterr().out)
        theirs = getattr(transformers, name).from_pretrained(tmp_path / objective).eval()
        vision = theirs if objective == "aimv2" else theirs.vision_model
        images = torch.randn(2, 1, 12, 12)
        torch.testing.assert_close(vision(images).last_hidden_state, model(images), atol=1e-5, rtol=1e-4)
    clip = make_model(objective="clip")
    with pytest.raises(ValueError, match="objective: 'clip' pools by a mean"):
        export_lit(clip.trunk, clip.towers, tmp_path / "clip")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        export(tmp_path / "none.ckpt", tmp_path / "x")


# ---------------------------------------------------------------- figures and bad values


@pytest.mark.parametrize("changes", [{}, {"order": "text_image"}, {"image_head": "aimv1_mlp"}], ids=str)
def test_figures(changes):
    model, batch = make_model(**changes).eval(), make_batch()
    model.log = model.log_dict = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    assert model.figures() == {}
    model.validation_step(batch, 0)
    model._trainer = SimpleNamespace(datamodule=None)  # type: ignore[assignment]
    assert set(model.figures()) == {"next_patches", "captions"}
    target, shown, prefix = model.predicted_images(batch["image"])
    assert prefix == 5
    assert torch.equal(shown[:, :5], target[:, :5])
    lengths = torch.full((5,), 5)
    errors, counted = model.errors(batch, lengths)["pixel"]
    own = (shown - target).square().mean(2)[:, 1:]
    torch.testing.assert_close(own[counted], errors[counted])


def test_errors_agree_with_the_functions():
    model, batch = make_model().eval(), make_batch()
    lengths = torch.tensor([1, 4, 15, 9, 2])
    found = model.errors(batch, lengths)
    features = model.encode(batch["image"], lengths)
    pixels, logits = model.decoder(features, batch["text"])
    target = normalise_patches(patchify(batch["image"], 3))
    for name, expected in {
        "pixel": pixel_errors(pixels, target, lengths),
        "text": token_errors(logits, batch["text"], PAD),
        "predict_zero": pixel_errors(torch.zeros_like(target), target, lengths),
    }.items():
        for ours, theirs in zip(found[name], expected, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "aim"}, "objective: 'aim' is not accepted; accepted: aimv2, image_only, captioner, clip, lit"),
        ({"mask": "full"}, "mask: 'full' shows objective 'aimv2' the patches it predicts; accepted: captioner"),
        ({"alpha": -1.0}, "alpha: -1.0 is not accepted; accepted: 0 or more"),
        ({"order": "both"}, "order: 'both' is not accepted"),
        ({"image_head": "mlp"}, "image_head: 'mlp' is not accepted; accepted: linear, aimv1_mlp"),
        ({"decoder": {"widht": 8}}, "decoder.widht is not accepted; did you mean 'width'"),
        ({"objective": "clip", "text_tower": {"dept": 8}}, "text_tower.dept is not accepted; did you mean 'depth'"),
        ({"trunk": {"patch_size": 5, "width": 16, "depth": 1, "heads": 2}}, "trunk.patch_size: 5 does not divide"),
    ],
)
def test_bad_values_are_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message) if "(" in message else message):
        make_model(**changes)
