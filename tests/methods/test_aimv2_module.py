"""AIMv2 as a module: what reaches which loss, masks, captions, figures, bad values."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything

from datamodules.image_captions import DigitsCaptions
from tests.methods.aimv2_toy import EOS, PAD, gradient_of, make_batch, make_model, quiet_trainer, step
from zoo.methods.aimv2.losses import normalise_patches, patchify, pixel_errors, pooled_mean, token_errors

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
    lengths = model.draw_prefix({"image": images}, 3000, 0)
    assert (int(lengths.min()), int(lengths.max())) == (1, 15)
    assert lengths.bincount(minlength=16)[1:].min() > 120
    torch.manual_seed(1)
    whole = model.draw_prefix({"image": images[:6]}, 6, 0)
    torch.manual_seed(1)
    assert torch.equal(model.draw_prefix({"image": images[:2]}, 6, 4), whole[4:])  # the rows of a rank
    assert set(make_model(mask="causal").draw_prefix({"image": images[:4]}, 4, 0).tolist()) == {1}


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
        results.append(quiet_trainer().validate(model, data, verbose=False)[0])
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


# ---------------------------------------------------------------- figures and bad values


@pytest.mark.parametrize("changes", [{}, {"order": "text_image"}, {"image_head": "aimv1_mlp"}], ids=str)
def test_figures(changes):
    model, batch = make_model(**changes).eval(), make_batch()
    model.log = model.log_dict = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    assert model.figures() == {}
    model.validation_step(batch, 0)
    model._trainer = SimpleNamespace(datamodule=None)  # type: ignore[assignment]
    assert set(model.figures()) == {"next_patches", "captions"}
    errors, counted = model.errors(batch, torch.full((5,), 5))["pixel"]
    for i in range(5):
        target, shown, prefix = model.predicted_patches(batch["image"][i], batch["text"][i])
        assert prefix == 5
        assert torch.equal(shown[:5], target[:5])
        own = (shown - target).square().mean(1)[1:]
        torch.testing.assert_close(own[counted[i]], errors[i, counted[i]])


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
