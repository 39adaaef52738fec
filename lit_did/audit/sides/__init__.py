"""The part "sides": what DPO would learn of the pairs, from models of their two sides, before any training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from lit_did.audit.blocks import Paragraph, SideBySide, Table
from lit_did.audit.report import Estimate, Finding, Part
from lit_did.audit.settings import Settings
from lit_did.audit.sides.fitting import base_of, fit_side_models, folds_of, held_out_scores, score
from lit_did.audit.sides.prediction import Drawn, draw, line_between, predicted_change
from lit_did.audit.source import AuditData
from lit_did.audit.statistics import calibration_slope, mean_over_groups, share_over_groups
from lit_did.audit.tokenized import tokenized
from lit_did.data.dataset import Example
from lit_did.functional import fit_power_law
from lit_did.ops import SequenceStatistics
from lit_did.sampling.prompts import LEAST_RELIABLE

LEAST_PROMPTS = 8
CONDITIONS = (
    "The side models are small adapters, fitted here to a few pairs. They are not the population's side models, so all "
    "figures of this part are estimates of what better side models would say. If chosen and rejected completions come "
    "from two sources, independently, well-fitted side models have k = 1, and the prediction is DPO's optimum. If a "
    "judge labelled the pairs, k (log pi_w - log pi_l) stands in for the judge's reward, of which it is a distorted "
    "copy, and the prediction is an approximation."
)


def examine_sides(
    data: AuditData,
    settings: Settings,
    tokenizer: Any,
    reference: nn.Module | None,
    policy: nn.Module | None,
    parts: Mapping[str, Part],
) -> Part:
    """Fits a model to each side and predicts what DPO would learn. The models that are given stay as they are.

    Args:
        data: The pairs.
        settings: beta, the tokenising, and how many prompts get draws, up to which length.
        tokenizer: A transformers tokenizer.
        reference: The model that DPO would start from. None: `policy` without its adapter.
        policy: A policy that was trained, to compare the prediction with. None: there is none.
        parts: The parts that ran before.
    """
    part = Part(
        "sides",
        "Before training: the two sides",
        "Two small adapters of the reference are fine-tuned, one on the chosen and one on the rejected completions. "
        "Neither ever scores a pair that it was fitted to. From them follows what DPO would learn.",
    )
    examples = list(tokenized(data.rows, settings, tokenizer))
    place = {int(row): number for number, row in enumerate(data.row_numbers)}
    places = np.array([place[example.index] for example in examples])
    groups = data.prompt_groups[places]
    if len(np.unique(groups)) < LEAST_PROMPTS:
        part.blocks.append(Paragraph(f"Too few prompts for side models: at least {LEAST_PROMPTS} are needed."))
        return part

    base = base_of(reference, policy)
    folds = folds_of(groups, settings.seed)
    options: dict[str, Any] = {"seed": settings.seed, "progress": settings.progress}
    models = fit_side_models(base, examples, folds, batch_size=settings.batch_size, **options)
    by_chosen, by_rejected = held_out_scores(models, examples, folds, settings.batch_size)  # [pairs, 2] each
    beside = _beside(base, reference, policy, examples, settings.batch_size)
    margins = [_margin(x) for x in (by_chosen, by_rejected, beside.reference_logprob.numpy())]
    side_margin = margins[0] - margins[1]
    column = np.full(len(data), np.nan)
    column[places] = side_margin
    part.columns["side_margin"] = column

    accuracy = share_over_groups((side_margin > 0) + 0.5 * (side_margin == 0), groups)
    k, line = calibration_slope(side_margin, groups), line_between(margins[0], margins[1], margins[2], groups)
    part.figures |= {"side_accuracy": accuracy, "k": k, "s": line.s, "r_squared": line.r_squared}
    rows: list[list[Any]] = [
        ["accuracy of the side margin M_w - M_l", accuracy],
        ["calibration slope k (1 for independent sides)", k],
        ["s of M_rho = (1 - s) M_w + s M_l", line.s],
        ["R^2 of that line", line.r_squared],
    ]
    if policy is not None:
        exponent = _exponent(by_chosen - by_rejected, beside.log_ratio.numpy(), groups)
        part.figures["exponent"] = exponent
        rows.append(["exponent of a law towards the policy", exponent])
    part.blocks += [
        Paragraph(CONDITIONS),
        Table(
            "The sides on held-out pairs",
            ["quantity", "value"],
            rows,
            "Intervals over prompts, for these side models. s is 0 where the reference lies at the chosen side and 1 "
            "where it lies at the rejected side. R^2 compares what the line leaves over with the distance between the "
            "sides. It is 1 on the line, and can be below 0. Errors of the side models pull s towards 1/2 and lower "
            "R^2.",
        ),
    ]
    part.findings += _findings(accuracy, k, parts)
    if not 0 < k.value < math.inf:
        part.blocks.append(Paragraph(f"No prediction, because it needs a slope k above 0, and k is {k}."))
        return part

    # -- the predicted policy, for completions that are cut ------------------------------------------------------
    length = settings.max_new_tokens
    pairs = _sample_of_prompts(examples, groups, settings)
    if not pairs:
        part.blocks.append(Paragraph("No prediction, because completions with several scored turns are not sampled."))
        return part
    drawn = draw(
        models, base, examples, folds, pairs, exponent=k.value / settings.beta, max_new_tokens=length, **options
    )
    _predict(part, drawn, models, beside, base, reference, policy, examples, folds, groups, k, settings)
    part.blocks.append(_samples(drawn, data, places, tokenizer, settings.seed))
    return part


def _beside(
    base: nn.Module, reference: nn.Module | None, policy: nn.Module | None, examples: Sequence[Example], batch_size: int
) -> SequenceStatistics:
    """The statistics [pairs, 2] of the policy beside the reference. Without a policy, the reference is its own."""
    return score(base, base, examples, batch_size) if policy is None else score(policy, reference, examples, batch_size)


def _margin(values: np.ndarray) -> np.ndarray:
    return values[:, 0] - values[:, 1]


def _divided(estimate: Estimate, by: float) -> Estimate:
    return Estimate(estimate.value / by, estimate.lower / by, estimate.upper / by, estimate.count)


def _exponent(sides: np.ndarray, policy: np.ndarray, groups: np.ndarray) -> Estimate:
    """b of log pi_w - log pi_l = b (log pi - log rho) + a constant of the prompt, over both completions [pairs, 2]."""
    try:
        fit = fit_power_law(
            torch.from_numpy(sides.ravel()),
            torch.from_numpy(policy.ravel()),
            group=torch.from_numpy(np.repeat(groups, 2)),
        )
    except ValueError:  # a policy that is its reference
        return Estimate(math.nan)
    return Estimate(fit.exponent, fit.lower, fit.upper, fit.num_prompts)


def _findings(accuracy: Estimate, k: Estimate, parts: Mapping[str, Part]) -> list[Finding]:
    baselines = parts["data"].figures.get("baselines", {}) if "data" in parts else {}
    longer = baselines.get("longer")
    beside = "" if longer is None else f"; taking the longer side is right in {longer}"
    found = [
        Finding(
            "side_accuracy",
            f"Models of the two sides tell held-out sides apart in {accuracy} of the pairs{beside}.",
            "",
            False,
            0.3,
            value=accuracy,
        )
    ]
    if math.isnan(k.lower):
        return found
    if k.lower > 1 or k.upper < 1:
        why = "larger" if k.upper < 1 else "smaller"
        text = (
            f"The sides are not independent, or their models are not well fitted: k = {k}, where independent sides "
            f"have 1, so the side models' margins are {why} than their accuracy warrants."
        )
    elif k.upper - k.lower > 1:
        text = f"There is too little data to tell whether the sides are independent: k = {k}. Independent sides have 1."
    else:
        text = f"The sides may be independent: k = {k}, and independent sides have 1."
    return [*found, Finding("independent_sides", text, "", False, 0.35, value=k)]


def _sample_of_prompts(examples: Sequence[Example], groups: np.ndarray, settings: Settings) -> list[int]:
    """A pair of each of `num_prompts` prompts."""
    plain = _plain(examples)
    _, first = np.unique(groups[plain], return_index=True)
    count = min(settings.num_prompts, len(first))
    chosen = np.random.default_rng(settings.seed).choice(first, count, replace=False)
    return [plain[number] for number in chosen]


def _plain(examples: Sequence[Example]) -> list[int]:
    """The pairs without further turns within a completion, which cannot be cut or drawn."""
    return [i for i, e in enumerate(examples) if e.chosen_context is None and e.rejected_context is None]


def _predict(
    part: Part,
    drawn: Sequence[Drawn],
    models: Any,
    whole: SequenceStatistics,
    base: nn.Module,
    reference: nn.Module | None,
    policy: nn.Module | None,
    examples: Sequence[Example],
    folds: np.ndarray,
    groups: np.ndarray,
    k: Estimate,
    settings: Settings,
) -> None:
    """Adds the predicted change of both log-likelihoods, what happened, and the DID entropy of the predicted policy."""
    length, of_pair = settings.max_new_tokens, {groups[d.pair]: d for d in drawn}
    used = [i for i in _plain(examples) if groups[i] in of_pair]
    cut = [
        examples[i]._replace(chosen_ids=examples[i].chosen_ids[:length], rejected_ids=examples[i].rejected_ids[:length])
        for i in used
    ]
    by_chosen, by_rejected = held_out_scores(models, cut, folds[used], settings.batch_size)
    log_partition = np.array([of_pair[groups[i]].optimum.estimate.log_partition for i in used])
    change = predicted_change(by_chosen - by_rejected, log_partition, exponent=k.value / settings.beta)
    predicted = [mean_over_groups(change[:, side], groups[used]) for side in range(2)]
    part.figures |= {"predicted_chosen_change": predicted[0], "predicted_rejected_change": predicted[1]}
    rows: list[list[Any]] = [[f"predicted, first {length} tokens, these prompts", *predicted]]
    if policy is not None:
        beside = _beside(base, reference, policy, cut, settings.batch_size).log_ratio.numpy()
        rows.append(
            [f"policy, first {length} tokens, these prompts"]
            + [mean_over_groups(beside[:, side], groups[used]) for side in range(2)]
        )
        happened = [mean_over_groups(whole.log_ratio[:, side].numpy(), groups) for side in range(2)]
        rows.append(["policy, whole completions, all pairs", *happened])
        part.figures |= {"chosen_change": happened[0], "rejected_change": happened[1]}
    part.blocks.append(
        Table(
            "Change of the log-likelihood by DPO (nats a completion)",
            ["", "chosen", "rejected"],
            rows,
            f"The prediction is for training to the end with beta {settings.beta:g} on pairs cut at {length} tokens: k "
            f"(log pi_w - log pi_l) / beta - log Z, with k = {k.value:.3g} fixed. log Z comes from sequential Monte "
            f"Carlo for {len(drawn)} prompts. The intervals are over these prompts. A run that stops early changes "
            "less.",
        )
    )
    prompts = np.array([groups[d.pair] for d in drawn])
    entropies = [d.did.estimate for d in drawn]
    entropy = mean_over_groups([e.entropy for e in entropies], prompts)
    concentration = mean_over_groups([d.did.concentration for d in drawn], prompts)
    reliable = sum(e.reliable for e in entropies)
    of_target = sum(d.optimum.estimate.reliable for d in drawn)
    part.figures |= {
        "predicted_did_entropy": entropy,
        "predicted_did_concentration": concentration,
        "reliable_prompts": {"did_entropy": reliable, "log_partition": of_target, "of": len(drawn)},
    }
    part.blocks.append(
        Table(
            f"DID of the predicted policy, completions of at most {length} tokens",
            ["quantity", "value"],
            [
                ["DID entropy (nats)", entropy],
                ["DID entropy a token (nats)", _divided(entropy, length)],
                ["concentration (nats)", concentration],
                ["prompts with a reliable estimate of the DID entropy", f"{reliable} of {len(drawn)}"],
                ["prompts with a reliable sample of the predicted policy", f"{of_target} of {len(drawn)}"],
            ],
            "The DID is proportional to (pi_w / pi_l)^(k / beta) over whole completions, which needs no normalising "
            "per token. Prompts without a reliable estimate bias these figures.",
        )
    )
    falls = predicted[0].upper < 0
    known = k.lower > 0 and of_target >= LEAST_RELIABLE * len(drawn)  # else the table says how little is known
    if known and (falls or predicted[0].lower > 0):
        direction = "less" if falls else "more"
        part.findings.append(
            Finding(
                "predicted_displacement",
                f"DPO with beta {settings.beta:g} is predicted to make the first {length} tokens of chosen completions "
                f"{direction} likely, by {predicted[0]} nats.",
                "",
                False,
                0.25,
                value=predicted[0],
            )
        )


def _samples(drawn: Sequence[Drawn], data: AuditData, places: np.ndarray, tokenizer: Any, seed: int) -> SideBySide:
    """One completion of the predicted policy and one of its DID for each prompt."""
    generator = torch.Generator().manual_seed(seed)

    def text(samples: Any) -> str:
        row = int(torch.multinomial(samples.log_weight.exp(), 1, generator=generator))
        completion = samples.completions[row]
        return tokenizer.decode(completion[completion >= 0].tolist())

    return SideBySide(
        "Draws of the predicted policy and of its DID",
        [
            (data.texts(int(places[d.pair]))[0], {"predicted policy": text(d.optimum), "its DID": text(d.did)})
            for d in drawn
        ],
        "The predicted policy is rho (pi_w / pi_l)^(k / beta), normalised once, over whole completions. Its DID lacks "
        "rho, so most of its completions are no language. `TargetLogitsProcessor` draws from another, locally "
        "normalised distribution, the softmax of the combined logits at every token.",
    )
