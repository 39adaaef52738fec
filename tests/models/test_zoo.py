"""LitDPO, LoRA, both callbacks and `sample_did` with every architecture of the zoo, against each sequence alone.

The truth is the model's own forward pass, given one sequence without padding. `make models` runs this file and writes
docs/models.md; without `LIT_DID_WRITE_MODELS` every architecture is compared with its line there. `make test` tries
those in `OFTEN`, `make test-all` all of them.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import lightning
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lit_did import LitDPO
from lit_did.batches.sequences import read_sequences
from lit_did.callbacks import DIDMonitor
from lit_did.integrations.trl import DIDCallback
from lit_did.models.trial import layout_of
from lit_did.sampling import sample_did
from tests.models import zoo

DOCUMENT = Path(__file__).parents[2] / "docs/models.md"
LAYOUTS = {"packed": "without padding", "padded": "padded", "alone": "one sequence at a time"}
HEAD = "| architecture | class | LitDPO and the callbacks | `sample_did` |\n|---|---|---|---|\n"
BETA = 0.5
TOLERANCE = 1e-3


# ---------------------------------------------------------------------------------------------------------------
# Three pairs in the forms of LitDPO's and TRL's batches
# ---------------------------------------------------------------------------------------------------------------


def _ids(length: int, seed: int) -> list[int]:
    return torch.randint(3, zoo.VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPTS = [_ids(9, 0), _ids(12, 1), _ids(3, 2)]
COMPLETIONS = [_ids(n, 10 + n) for n in (17, 6, 8, 5, 14, 2)]  # chosen, then rejected
SEQUENCES = [(PROMPTS[i % 3], completion) for i, completion in enumerate(COMPLETIONS)]


def padded() -> dict[str, Tensor]:
    length = max(len(prompt) + len(completion) for prompt, completion in SEQUENCES)
    shape = (len(SEQUENCES), length)
    batch = {name: torch.zeros(shape, dtype=torch.int64) for name in ("input_ids", "attention_mask")}
    batch["labels"] = torch.full(shape, -100)
    for row, (prompt, completion) in enumerate(SEQUENCES):
        start, end = len(prompt), len(prompt) + len(completion)
        batch["input_ids"][row, :end] = torch.tensor(prompt + completion)
        batch["attention_mask"][row, :end] = 1
        batch["labels"][row, start - 1 : end - 1] = torch.tensor(completion)
    return batch


def packed() -> dict[str, Tensor]:
    batch = padded()
    lengths = batch["attention_mask"].sum(1)
    flat = {name: batch[name][batch["attention_mask"] == 1][None] for name in ("input_ids", "labels")}
    return {**flat, "cu_seqlens": torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])}


def of_trl() -> dict[str, Tensor]:
    batch = padded()
    labels = batch.pop("labels")
    return {**batch, "completion_mask": (labels != -100).long().roll(1, 1)}


# ---------------------------------------------------------------------------------------------------------------
# The truth
# ---------------------------------------------------------------------------------------------------------------


def log_probs(model: nn.Module, sequences: list[tuple[list[int], list[int]]] = SEQUENCES) -> Tensor:
    """[sequences] log-probabilities of completions, one forward pass each."""
    values = []
    for prompt, completion in sequences:
        row = torch.tensor(prompt + completion)
        if (getattr(model.config, "rope_parameters", None) or {}).get("rope_type") == "dynamic":
            model(input_ids=row[None, :1], use_cache=False)  # it keeps what a longer sequence before asked for
        logits = model(input_ids=row[None], use_cache=False).logits[0]
        of_tokens = logits[len(prompt) - 1 : -1].log_softmax(-1)
        values.append(of_tokens.gather(1, torch.tensor(completion)[:, None]).sum())
    return torch.stack(values)


def margin(policy: Tensor, reference: Tensor) -> Tensor:
    """[pairs] of log-probabilities [sequences]."""
    chosen, rejected = (policy - reference).chunk(2)
    return BETA * (chosen - rejected)


class Truth(NamedTuple):
    policy: Tensor
    reference: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]


def truth_of(policy: nn.Module, reference: Tensor) -> Truth:
    """Of DPO's loss; `reference` [sequences]."""
    values = log_probs(policy)
    loss = -nn.functional.logsigmoid(margin(values, reference)).mean() + auxiliary_loss(policy)
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True, materialize_grads=True)
    return Truth(values.detach(), reference, loss.detach(), dict(zip(trained, gradients, strict=True)))


def auxiliary_loss(model: nn.Module) -> Tensor | float:
    """A mixture of experts' load-balancing loss of the batch, where its configuration asks for it.

    It is no sum over sequences, so it is the model's own of all of them, padded.
    """
    if not getattr(model.config, "output_router_logits", False):
        return 0.0
    batch = padded()
    outputs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    return model.config.router_aux_loss_coef * outputs.aux_loss


def assert_close(got: Tensor, expected: Tensor, what: str) -> None:
    error = ((got.double() - expected.double()).abs().max() / expected.abs().max()).item()
    assert error <= TOLERANCE, f"{what}: off by {error:.1e} of its size"


def assert_gradients(got: dict[str, Tensor], truth: Truth, what: str) -> None:
    least = 1e-2 * max(gradient.norm().item() for gradient in truth.gradients.values())  # below it is rounding
    errors = {n: (got[n] - g).norm().item() / (g.norm().item() + least) for n, g in truth.gradients.items()}
    worst = max(errors, key=errors.get)
    assert errors[worst] <= TOLERANCE, f"{what}: the gradient of {worst} is off by {errors[worst]:.1e} of its size"


# ---------------------------------------------------------------------------------------------------------------
# The sweep
# ---------------------------------------------------------------------------------------------------------------


class Record(lightning.Callback):
    """The gradients of the last optimiser step."""

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.gradients = {n: _gradient(p) for n, p in module.policy.named_parameters() if p.requires_grad}


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()


def _trainer(*callbacks: lightning.Callback) -> lightning.Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return lightning.Trainer(accelerator="cpu", max_steps=1, callbacks=list(callbacks), **quiet)


def _models(name: str) -> tuple[nn.Module, nn.Module]:
    """A policy that has left its reference."""
    policy, reference = zoo.build(name), zoo.build(name)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad and parameter.numel() > 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.3 * parameter.std() * noise)
    return policy, reference


def check_step(policy: nn.Module, reference: nn.Module, truth: Truth) -> None:
    """A training step, its gradients and what is logged of it, and a packed batch's values."""
    module = LitDPO(policy, reference, beta=BETA, learning_rate=0.0)
    record = Record()
    trainer = _trainer(record, DIDMonitor(every_n_steps=1))
    trainer.fit(module, torch.utils.data.DataLoader([padded()], batch_size=None))
    assert_gradients(record.gradients, truth, "LitDPO")
    logged = trainer.callback_metrics
    expected = margin(truth.policy, truth.reference).mean()
    scale = BETA * (truth.policy - truth.reference).abs().max()
    for kind in ("train/", "did/train/"):  # LitDPO's and DIDMonitor's
        assert abs(logged[f"{kind}reward_margin"] - expected) <= TOLERANCE * scale, kind
    statistics = module.eval()(packed())
    assert_close(statistics.policy_logprob, truth.policy, "LitDPO's policy")
    assert_close(statistics.reference_logprob, truth.reference, "LitDPO's reference")
    assert_close(statistics.log_ratio, truth.policy - truth.reference, "LitDPO's log-ratios")
    module.teardown("fit")


def check_trl(policy: nn.Module, reference: nn.Module, truth: Truth, folder: Path) -> None:
    """DIDCallback's measuring of a batch of TRL's."""
    trainer = transformers.Trainer(
        policy, transformers.TrainingArguments(str(folder), use_cpu=True, report_to="none", disable_tqdm=True)
    )
    statistics = DIDCallback(trainer, reference=reference)._measure(policy, of_trl())
    assert_close(statistics.policy_logprob, truth.policy, "DIDCallback's policy")
    assert_close(statistics.reference_logprob, truth.reference, "DIDCallback's reference")


def check_lora(name: str, reference: Tensor) -> None:
    """A LoRA policy, whose reference is itself without the adapter."""
    torch.manual_seed(2)
    lora = {"r": 2, "target_modules": zoo.lora_targets(name), "init_lora_weights": False}
    module = LitDPO(zoo.build(name), lora=lora, beta=BETA).eval()
    truth = truth_of(module.policy, reference)
    pairs = module.pair_statistics(padded())
    got = torch.cat([pairs.chosen.log_ratio, pairs.rejected.log_ratio])
    assert_close(got, truth.policy - truth.reference, "LoRA's log-ratios")
    assert (truth.policy - truth.reference).abs().max() > 1e-2  # the premise
    if isinstance(auxiliary_loss(module.policy), float):
        pairs.loss.mean().backward()
        assert_gradients({n: _gradient(p) for n, p in module.policy.named_parameters()}, truth, "LoRA")
    module.teardown("fit")


def check_sampling(policy: nn.Module, reference: nn.Module) -> bool:
    """Checks the log-probabilities that `sample_did` returns. Returns whether it used the models' caches."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        samples = sample_did(
            policy,
            reference,
            PROMPTS[0],
            max_new_tokens=10,  # beyond windows and chunks
            eos_token_id=None,
            num_samples=8,
            num_islands=4,
            ess_threshold=1.0,
            progress=False,
        )
    assert samples.num_resamplings.sum() > 0  # the premise
    completions = samples.completions.tolist()
    with torch.no_grad():
        for model, got in ((policy, samples.policy_logprob), (reference, samples.reference_logprob)):
            whole = log_probs(model, [(PROMPTS[0], completion) for completion in completions])
            if (got - whole).abs().max() > TOLERANCE * whole.abs().max():
                # A token's probability depends on how much follows it: what counts is what is known when it is drawn.
                assert_close(got, token_by_token(model, completions), "sample_did")
    return not any("cache" in str(warning.message) for warning in caught)


def token_by_token(model: nn.Module, completions: list[list[int]]) -> Tensor:
    """[completions] log-probabilities after the first prompt, a forward pass for every prefix."""
    total = torch.zeros(len(completions))
    for row, completion in enumerate(completions):
        for length, token in enumerate(completion):
            prefix = torch.tensor([PROMPTS[0] + completion[:length]])
            total[row] += model(input_ids=prefix, use_cache=False).logits[0, -1].log_softmax(-1)[token]
    return total


# What most people train, and one of each other kind: convolutions, states, windows, encoders, refused ones.
OFTEN = {
    *("gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2", "smollm3", "granite"),
    *("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "qwen3_next", "mamba2", "jamba", "rwkv", "bloom", "falcon"),
    *("bart", "bert", "cpmant", "llama, tied", "llama, eager", "llama, dynamic RoPE", "mixtral, router loss"),
}
CASES = [pytest.param(name, marks=[] if name in OFTEN else pytest.mark.long) for name in zoo.NAMES]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_architecture(name: str, table: dict[str, str], tmp_path: Path) -> None:
    policy, reference = _models(name)
    if name in zoo.REFUSED:
        with pytest.raises((TypeError, ValueError), match=type(policy).__name__):
            LitDPO(policy, reference)(padded())
        _compare(table, name, policy, "refused: " + zoo.REFUSED[name], "")
        return
    with torch.no_grad():
        of_reference = log_probs(reference)
    # RWKV scales its weights in eval mode, and has no dropout.
    truth = truth_of(policy.train("rwkv" in name), of_reference)
    policy.eval()
    cached = check_sampling(policy, reference)
    check_step(policy, reference, truth)
    check_trl(policy, reference, truth, tmp_path)
    check_lora(name, of_reference)
    kind = layout_of(policy, read_sequences(padded())).kind
    _compare(table, name, policy, LAYOUTS[kind], "" if cached else "reads every prefix whole")


def test_the_page_is_what_would_be_written():
    """Its text, and the lines of what is not built, which no other test compares."""
    assert DOCUMENT.read_text() == _document(_lines())


def test_every_exception_is_of_an_architecture_and_few_are_refused():
    architectures = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert {*zoo._OWN, *zoo._LORA, *zoo.NOT_BUILT} <= architectures
    assert set(zoo.REFUSED) | OFTEN <= set(zoo.NAMES)
    assert len(architectures & set(zoo.REFUSED)) <= 10


# ---------------------------------------------------------------------------------------------------------------
# docs/models.md
# ---------------------------------------------------------------------------------------------------------------


def _lines() -> dict[str, str]:
    """The lines of the document's table by their first column."""
    lines = DOCUMENT.read_text().splitlines() if DOCUMENT.exists() else []
    rows = [re.match(r"\| `(.*?)` \|", line) for line in lines]
    return {row[1]: line for row, line in zip(rows, lines, strict=True) if row}


@pytest.fixture(scope="module")
def table() -> Iterator[dict[str, str]]:
    """The lines of the table, which `make models` writes."""
    lines = _lines()
    yield lines
    if os.environ.get("LIT_DID_WRITE_MODELS"):
        DOCUMENT.write_text(_document(lines))


def _document(lines: dict[str, str]) -> str:
    """docs/models.md with these lines."""
    above = DOCUMENT.read_text().split(HEAD)[0]
    rows = [lines[name] for name in zoo.NAMES if name in lines]
    rows += [f"| `{name}` | | not tried: {why} | |" for name, why in zoo.NOT_BUILT.items()]
    return above + HEAD + "\n".join(rows) + "\n"


def _compare(table: dict[str, str], name: str, model: nn.Module, layout: str, note: str) -> None:
    line = f"| `{name}` | {type(model).__name__} | {layout} | {note} |"
    if os.environ.get("LIT_DID_WRITE_MODELS"):
        table[name] = line
    assert table.get(name) == line, "docs/models.md has another line: `make models` writes it"
