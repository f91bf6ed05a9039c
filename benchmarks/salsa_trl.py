"""Samples a second of PPO and RLOO from prompts to updated weights, against trl's trainers.

Both train the same tiny model on the same prompts: as many answers of the same length, the same reward, reference and
value network, as many epochs and minibatches. They take turns in one process; what counts is processor time, from the
end of the first batches to that of the last. No validation, no files. trl had PPO with a value network until 1.12, so
that each comparison needs an environment of its own, with this package in it:

    python -m venv env; env/bin/pip install -e . datasets "trl>=1.0,<1.13"; env/bin/python benchmarks/salsa_trl.py ppo
    python -m venv new; new/bin/pip install -e . datasets trl; new/bin/python benchmarks/salsa_trl.py rloo

    [--rounds 3] [--batches 8] [--threads 1] [--out results/bench/salsa_trl_ppo.json]
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast, TrainerCallback

from datamodules.reviews import Reviews
from datamodules.reviews_grammar import VOCABULARY
from zoo.bench.report import comparison, write_bench
from zoo.config import load_layers
from zoo.methods.salsa.module import Salsa
from zoo.methods.salsa.reward_model import RewardModel

CONFIGS = {"ppo": "salsa/learned_reward", "rloo": "salsa/rloo"}
#: Answers of a batch, batches that warm up.
ANSWERS, WARM = 128, 2


class Clock:
    """Processor time of a training: of all batches but the first, and of their sampling.

    Args:
        batches: Batches that count.
        calls: Ends of optimiser steps, or whatever `tick` is called at, of a batch.
    """

    def __init__(self, batches: int, calls: int = 1) -> None:
        self.batches, self.calls, self.count = batches, calls, 0
        self.started = self.seconds = self.sampling = 0.0

    def tick(self) -> None:
        """Say that a part of a batch has ended."""
        self.count += 1
        if self.count == WARM * self.calls:
            self.started, self.sampling = time.process_time(), 0.0
        if self.count == (WARM + self.batches) * self.calls:
            self.seconds = time.process_time() - self.started

    def sampled(self, draw: Callable[..., Any]) -> Callable[..., Any]:
        """Measure a function that samples."""

        def measured(*args: Any, **kwargs: Any) -> Any:
            before = time.process_time()
            found = draw(*args, **kwargs)
            self.sampling += time.process_time() - before
            return found

        return measured

    def result(self) -> dict[str, float]:
        """Samples a second, and the share of time in sampling."""
        if not self.seconds:
            raise RuntimeError(f"the training had {self.count} ticks, too few for {self.batches} batches")
        rate = ANSWERS * self.batches / self.seconds
        return {"samples_per_second": rate, "share_in_sampling": self.sampling / self.seconds}


class OurClock(Callback):
    """Lightning tells the clock of each batch."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_batch_end(self, *args: Any) -> None:
        """A batch has ended."""
        self.clock.tick()


class TheirClock(TrainerCallback):
    """transformers' Trainer tells the clock of each step."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """A step has ended: a batch for PPO, a minibatch for RLOO."""
        self.clock.tick()


def our_module(kind: str, reward: Path) -> tuple[Salsa, Reviews]:
    """Module and prompts of the config, the reference being the model that it starts from."""
    config = load_layers([CONFIGS[kind]], []).merged
    data = Reviews(**config["data"]["init_args"])
    options = {**config["model"]["init_args"], "reference": {"mode": "sft"}, "missing_eos_penalty": 0.0, "beta": 1.0}
    facts = {"vocab_size": data.vocab_size, "eos_id": data.eos_id, "pad_id": data.pad_id}
    if kind == "ppo":
        torch.manual_seed(1)
        net = RewardModel(lm=options["lm"], **facts)
        torch.save({"hyper_parameters": dict(net.hparams), "state_dict": net.state_dict()}, reward)
        options["reward_model"] = str(reward)
    torch.manual_seed(0)
    return Salsa(**{**options, **facts}), data


def ours(kind: str, batches: int, folder: Path) -> dict[str, float]:
    """Train with this package."""
    clock = Clock(batches)
    module, data = our_module(kind, folder / "reward.ckpt")
    module.answer = clock.sampled(module.answer)  # type: ignore[method-assign]
    steps = (batches + WARM) * module.hparams["ppo_epochs"] * module.hparams["minibatches"]
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, num_sanity_val_steps=0,
        callbacks=[OurClock(clock)], log_every_n_steps=1, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module, data)
    return clock.result()


def tokenizer() -> PreTrainedTokenizerFast:
    """The words of the reviews as a tokenizer of transformers."""
    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(VOCABULARY)}, unk_token=VOCABULARY[0]))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    pad, bos, eos = VOCABULARY[:3]
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=pad, bos_token=bos, eos_token=eos, unk_token=pad, padding_side="left"
    )


def prompts(data: Reviews, count: int) -> list[list[int]]:
    """Prompts of the first batches."""
    batches: Any = data.training_batches()
    per_epoch = len(batches)
    rows = [batches.batch(n // per_epoch, n % per_epoch)["prompt_ids"] for n in range(count)]
    return [row for part in rows for row in part.tolist()]


def their_ppo(batches: int, folder: Path) -> dict[str, float]:
    """Train with trl's PPO."""
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    clock = Clock(batches)
    module, data = our_module("ppo", folder / "reward.ckpt")
    hp = module.hparams
    module.setup("fit")
    scalars = []
    for source in (module.frozen["reward"], module.value):
        config = copy.deepcopy(source.lm.config)
        config.num_labels, config.pad_token_id = 1, data.pad_id
        net: Any = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        net.base_model.load_state_dict(source.lm.base_model.state_dict())
        net.score.weight.data.copy_(source.head.weight)
        scalars.append(net)
    plain = ppo_trainer.batch_generation
    ppo_trainer.batch_generation = clock.sampled(plain)
    options = PPOConfig(
        output_dir=str(folder), per_device_train_batch_size=ANSWERS, gradient_accumulation_steps=1,
        num_mini_batches=hp["minibatches"], num_ppo_epochs=hp["ppo_epochs"], local_rollout_forward_batch_size=ANSWERS,
        total_episodes=(batches + WARM) * ANSWERS, response_length=hp["answer_length"], stop_token="eos",
        temperature=1.0, kl_coef=hp["beta"], gamma=hp["gamma"], lam=hp["lam"], cliprange=hp["clip"],
        cliprange_value=hp["value_clip"], vf_coef=hp["value_weight"], learning_rate=hp["lr"], num_sample_generations=0,
        use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True, seed=0,
        gradient_checkpointing=False,
    )  # fmt: skip
    rows = Dataset.from_dict({"input_ids": prompts(data, batches + WARM)})
    model: Any = copy.deepcopy(module.policy)
    try:
        trainer = PPOTrainer(
            args=options, processing_class=tokenizer(), model=model, ref_model=copy.deepcopy(model),
            reward_model=scalars[0], value_model=scalars[1], train_dataset=rows, eval_dataset=rows,
            callbacks=[TheirClock(clock)],
        )  # fmt: skip
        trainer.train()
    finally:
        ppo_trainer.batch_generation = plain
    return clock.result()


def their_rloo(batches: int, folder: Path) -> dict[str, float]:
    """Train with trl's RLOO."""
    from datasets import Dataset
    from trl import RLOOConfig, RLOOTrainer

    module, data = our_module("rloo", folder / "reward.ckpt")
    hp = module.hparams
    module.policy.save_pretrained(folder / "policy")  # the reference is read from there
    updates = hp["ppo_epochs"] * hp["minibatches"]
    clock = Clock(batches, updates)
    words = tokenizer()

    def reward(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        asked = torch.tensor(words(prompts)["input_ids"])
        told = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in completion_ids], True, data.pad_id)
        lengths = torch.tensor([len(ids) for ids in completion_ids])
        mask: Tensor = torch.arange(told.shape[1]) < lengths[:, None]
        return data.reward(asked, told, mask).tolist()

    config = RLOOConfig(
        output_dir=str(folder), per_device_train_batch_size=ANSWERS // hp["minibatches"], gradient_accumulation_steps=1,
        steps_per_generation=hp["minibatches"], num_iterations=hp["ppo_epochs"],
        num_generations=hp["samples_per_prompt"], max_completion_length=hp["answer_length"], beta=hp["beta"],
        temperature=1.0, epsilon=hp["clip"], normalize_advantages=hp["whiten_advantages"], learning_rate=hp["lr"],
        max_steps=(batches + WARM) * updates, max_grad_norm=hp["max_grad_norm"], use_cpu=True, bf16=False,
        report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=updates, seed=0,
        gradient_checkpointing=False, model_init_kwargs={"dtype": "float32"},
    )  # fmt: skip
    texts = [" ".join(VOCABULARY[token] for token in row) for row in prompts(data, batches + WARM)]
    trainer = RLOOTrainer(
        model=str(folder / "policy"), reward_funcs=reward, args=config, processing_class=words,
        train_dataset=Dataset.from_dict({"prompt": texts}), callbacks=[TheirClock(clock)],
    )  # fmt: skip
    trainer._generate = clock.sampled(trainer._generate)
    trainer.train()
    return clock.result()


def main() -> None:
    """Measure, print and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trainer", choices=sorted(CONFIGS))
    parser.add_argument("--rounds", type=int, default=3, help="rounds; both take turns")
    parser.add_argument("--batches", type=int, default=8, help="batches of a round that count")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    kind = args.trainer
    found: dict[str, list[dict[str, float]]] = {"ours": [], "trl": []}
    with tempfile.TemporaryDirectory() as scratch:
        for _ in range(args.rounds):
            found["ours"].append(ours(kind, args.batches, Path(scratch)))
            found["trl"].append((their_ppo if kind == "ppo" else their_rloo)(args.batches, Path(scratch)))
    rates = {name: [one["samples_per_second"] for one in runs] for name, runs in found.items()}
    ratios = [a / b for a, b in zip(rates["ours"], rates["trl"], strict=True)]
    details = {
        "trainer": kind,
        "config": CONFIGS[kind],
        "answers": ANSWERS,
        "batches": args.batches,
        "samples_per_second": {name: statistics.median(values) for name, values in rates.items()},
        "share_in_sampling": {
            name: statistics.median(one["share_in_sampling"] for one in runs) for name, runs in found.items()
        },
        "clock": "processor time",
        "ratio_of_rounds": ratios,
        "threads": args.threads,
        "packages": {name: importlib.metadata.version(name) for name in ("trl", "accelerate", "datasets")},
    }
    print(json.dumps(details, indent=1))
    name = f"salsa_trl_{kind}"
    what = f"samples a second of {kind.upper()}, from prompts to updated weights, over those of trl's trainer"
    path = args.out or Path("results/bench") / f"{name}.json"
    write_bench(path, comparison(name, what, statistics.median(ratios), "", ">=", 2.0, details))


if __name__ == "__main__":
    main()
