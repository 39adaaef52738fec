"""The part "sides": what DPO would learn of the pairs, from models of their two sides, before any training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from lit_did.audit.blocks import Paragraph, SideBySide, Table
from lit_did.audit.prompts import nothing_to_complete, places_to_complete
from lit_did.audit.report import Estimate, Finding, Part
from lit_did.audit.settings import Settings
from lit_did.audit.sides.fitting import base_of, fit_side_models, folds_of, held_out_scores, score
from lit_did.audit.sides.prediction import Drawn, draw, line_between, predicted_change
from lit_did.audit.source import AuditData
from lit_did.audit.statistics import MIN_PROMPTS, calibration_slope, mean_over_groups, share_over_groups
from lit_did.audit.tokenized import tokenized
from lit_did.data.dataset import Example
from lit_did.functional import fit_power_law
from lit_did.sampling.prompts import LEAST_RELIABLE

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
        parts: The parts that ran before: "reference", and with a policy "policy".
    """
    part = Part(
        "sides",
        "Before training: the two sides",
        "Four small adapters of the reference are trained: for each half of the prompts, one on the chosen and one on "
        "the rejected completions of the other half, so that none scores a pair that it was fitted to. They predict "
        "what DPO would learn.",
    )
    examples = list(tokenized(data.rows, settings, tokenizer))
    place = {int(row): number for number, row in enumerate(data.row_numbers)}
    places = np.array([place[example.index] for example in examples])
    groups = data.prompt_groups[places]
    if len(np.unique(groups)) < MIN_PROMPTS:
        part.blocks.append(Paragraph(f"Too few prompts for side models: at least {MIN_PROMPTS} are needed."))
        return part

    base = base_of(reference, policy)
    folds = folds_of(groups, settings.seed)
    options: dict[str, Any] = {"seed": settings.seed, "progress": settings.progress}
    try:
        models = fit_side_models(base, examples, folds, batch_size=settings.batch_size, **options)
    except (FloatingPointError, torch.OutOfMemoryError) as error:
        part.findings.append(_failed(error))
        part.blocks.append(Paragraph(part.findings[-1].sentence))
        return part
    whole, first_tokens = held_out_scores(models, examples, folds, settings.batch_size, settings.max_new_tokens)
    by_chosen, by_rejected = whole  # [pairs, 2] each
    by_reference = _both_sides(parts["reference"], "reference_logprob", places)
    margins = [_margin(x) for x in (by_chosen, by_rejected, by_reference)]
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
        learned = _both_sides(parts["policy"], "log_ratio", places)
        part.figures["exponent"] = _exponent(by_chosen - by_rejected, learned, groups)
        rows.append(["exponent of a law towards the policy", part.figures["exponent"]])
    part.blocks += [
        Paragraph(CONDITIONS),
        Table(
            "The sides on held-out pairs",
            ["quantity", "value"],
            rows,
            "Intervals over prompts, for these side models. s is 0 where the reference lies at the chosen side and 1 "
            "where it lies at the rejected side. R^2 is 1 less the squared distance from that line over the squared "
            "distance between the sides. It is 1 on the line, and can be below 0. Errors of the side models lower k "
            "and R^2, and pull s towards 1/2.",
        ),
    ]
    part.findings += _findings(accuracy, k, parts)

    # -- the predicted policy, for completions that are cut ------------------------------------------------------
    plain = [i for i, e in enumerate(examples) if e.chosen_context is None and e.rejected_context is None]
    if not plain:
        part.blocks.append(Paragraph("No prediction, because completions with several scored turns are not sampled."))
        return part
    cut = _cut(examples, plain, groups, first_tokens, settings)
    part.figures["k_of_cut"] = cut.k
    if not 0 < cut.k.value < math.inf:
        part.blocks.append(Paragraph(_no_prediction(cut.k.value, settings.max_new_tokens)))
        return part
    pairs = [plain[i] for i in places_to_complete(cut.examples, cut.groups, settings, [base])]
    if not pairs:
        part.blocks.append(nothing_to_complete(settings))
        return part
    exponent = cut.k.value / settings.beta
    drawn = draw(
        models, base, examples, folds, pairs, exponent=exponent, max_new_tokens=settings.max_new_tokens, **options
    )
    happened = None if policy is None else _mean_changes(learned, groups)
    _predict(part, drawn, cut, groups, happened, settings, reference, policy)
    part.blocks.append(_samples(drawn, data, places, tokenizer, settings.seed))
    return part


def _failed(error: Exception) -> Finding:
    """Says why there are no side models. The other parts of the audit stay."""
    if isinstance(error, torch.OutOfMemoryError):
        why, advice = "memory ran out", "Use a smaller `batch_size` or `max_length`."
    else:
        why, advice = "their loss became NaN or infinite", "Check the reference's weights, or load it in bfloat16."
    sentence = f"The side models could not be fitted, because {why}."
    return Finding("no_side_models", sentence, advice, raised=False, severity=1.0)


def _no_prediction(k: float, length: int) -> str:
    """Why there is no prediction with such a slope of cut pairs."""
    if k == math.inf:
        why = f"the side models are right on every pair cut at {length} tokens, so no finite slope k fits"
    elif k == 0 or math.isnan(k):
        why = f"the side models see no difference between the sides of pairs cut at {length} tokens"
    else:
        why = f"it needs a slope k above 0, and that of pairs cut at {length} tokens is {k:.3g}"
    return f"No prediction, because {why}."


def _both_sides(part: Part, name: str, places: np.ndarray) -> np.ndarray:
    """[pairs, 2] a column of an earlier part for the chosen and for the rejected completions."""
    return np.stack([np.asarray(part.columns[f"{side}_{name}"], float)[places] for side in ("chosen", "rejected")], 1)


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
    by_chance = not accuracy.lower > 0.5
    found = [
        Finding(
            "side_accuracy",
            f"Models of the two sides prefer the chosen completion in {accuracy} of the held-out pairs"
            f"{', which chance explains' if by_chance else ''}{beside}.",
            "Do not rely on what this part predicts. More pairs (`max_pairs`) may help." if by_chance else "",
            False,
            0.3,
            value=accuracy,
        )
    ]
    if math.isinf(k.value):
        side = "right" if k.value > 0 else "wrong"
        text = (
            f"The side models are {side} on every pair, so the slope k is not finite, and it cannot be said whether "
            "the sides are independent."
        )
    elif math.isnan(k.lower):
        return found
    elif k.upper < 1:  # independent sides have 1, judged ones at least 1 (docs/theory.md)
        text = (
            f"The side models are noisy, so it cannot be said whether the sides are independent: k = {k}, where good "
            "side models have 1 or more."
        )
    elif k.lower > 1:
        text = (
            f"The sides are not independent, or their models learned too little: k = {k}, where independent sides have "
            "1."
        )
    elif k.upper - k.lower > 1:
        text = f"There is too little data to tell whether the sides are independent: k = {k}. Independent sides have 1."
    else:
        text = f"The sides may be independent: k = {k}, and independent sides have 1."
    return [*found, Finding("independent_sides", text, "", False, 0.35, value=k)]


class _Cut(NamedTuple):
    """The pairs whose completions can be cut, cut at `max_new_tokens`, as the prediction needs them."""

    examples: list[Example]
    groups: np.ndarray
    """[pairs] the number of each pair's prompt"""
    log_ratio: np.ndarray
    """[pairs, 2] held-out log pi_w - log pi_l of the chosen and of the rejected completion"""
    k: Estimate
    """their calibration slope, which may differ from that of whole completions"""


def _cut(
    examples: Sequence[Example],
    plain: Sequence[int],
    groups: np.ndarray,
    first_tokens: np.ndarray,
    settings: Settings,
) -> _Cut:
    length = settings.max_new_tokens
    cut = [
        examples[i]._replace(chosen_ids=examples[i].chosen_ids[:length], rejected_ids=examples[i].rejected_ids[:length])
        for i in plain
    ]
    by_chosen, by_rejected = first_tokens[:, plain]
    log_ratio = by_chosen - by_rejected
    return _Cut(cut, groups[plain], log_ratio, calibration_slope(_margin(log_ratio), groups[plain]))


def _mean_changes(changes: np.ndarray, groups: np.ndarray) -> list[Estimate]:
    """The means of [pairs, 2] over the pairs."""
    return [mean_over_groups(changes[:, side], groups) for side in range(2)]


def _predict(
    part: Part,
    drawn: Sequence[Drawn],
    cut: _Cut,
    groups: np.ndarray,
    happened: Sequence[Estimate] | None,
    settings: Settings,
    reference: nn.Module | None,
    policy: nn.Module | None,
) -> None:
    """Adds the predicted change of both log-likelihoods, what happened, and the DID entropy of the predicted policy.

    Args:
        part: Where they go.
        drawn: The draws.
        cut: The pairs, cut.
        groups: [pairs] the number of each pair's prompt, of all pairs, for the pairs of `drawn`.
        happened: The policy's mean changes over all whole pairs. None: there is no policy.
        settings: beta and the length.
        reference, policy: The models.
    """
    length, of_prompt = settings.max_new_tokens, {groups[d.pair]: d for d in drawn}
    reliable = sum(d.did.estimate.reliable for d in drawn)
    of_target = sum(d.optimum.estimate.reliable for d in drawn)
    used = np.array([i for i, group in enumerate(cut.groups) if group in of_prompt])
    log_partition = np.array([of_prompt[group].optimum.estimate.log_partition for group in cut.groups[used]])
    change = predicted_change(cut.log_ratio[used], log_partition, exponent=cut.k.value / settings.beta)
    predicted = _mean_changes(change, cut.groups[used])
    part.figures |= {"predicted_chosen_change": predicted[0], "predicted_rejected_change": predicted[1]}
    rows: list[list[Any]] = [[f"predicted, first {length} tokens, these prompts", *predicted]]
    if policy is not None and happened is not None:
        beside = score(policy, reference, [cut.examples[i] for i in used], settings.batch_size)
        of_these = _mean_changes(beside.log_ratio.numpy(), cut.groups[used])
        rows.append([f"policy, first {length} tokens, these prompts", *of_these])
        rows.append(["policy, whole completions, all pairs", *happened])
        part.figures |= {"chosen_change": happened[0], "rejected_change": happened[1]}
    part.blocks.append(
        Table(
            "Change of the log-likelihood by DPO (nats a completion)",
            ["", "chosen", "rejected"],
            rows,
            f"The prediction is for training to the end with beta {settings.beta:g} on pairs cut at {length} tokens: k "
            f"(log pi_w - log pi_l) / beta - log Z, with k fixed at {cut.k.value:.3g}, the slope of the cut pairs. log "
            f"Z comes from sequential Monte Carlo for {len(drawn)} prompts. The intervals are over these prompts. A "
            f"run that stops early changes less.{_unreliable(of_target, drawn, cut, settings)}",
        )
    )
    prompts = np.array([groups[d.pair] for d in drawn])
    most = drawn[0].did.log_num_completions
    entropy = _between(0, mean_over_groups([d.did.estimate.entropy for d in drawn], prompts), most)
    concentration = _between(0, mean_over_groups([d.did.concentration for d in drawn], prompts), most)
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
                ["prompts", len(drawn)],
                ["prompts with a reliable estimate of the DID entropy", reliable],
                ["prompts with a reliable sample of the predicted policy", of_target],
            ],
            "The DID is proportional to (pi_w / pi_l)^(k / beta) over whole completions, which needs no normalising "
            f"per token.{_unreliable(reliable, drawn, cut, settings)}",
        )
    )
    falls = predicted[0].upper < 0
    known = cut.k.lower > 0 and _most_are_reliable(of_target, drawn)  # else the table says how little is known
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


def _between(least: float, estimate: Estimate, most: float) -> Estimate:
    """The estimate of a quantity within these bounds. Student's interval of few prompts may exceed them."""
    return estimate._replace(lower=max(estimate.lower, least), upper=min(estimate.upper, most))  # NaN stays


def _most_are_reliable(reliable: int, drawn: Sequence[Drawn]) -> bool:
    return reliable >= LEAST_RELIABLE * len(drawn)


def _unreliable(reliable: int, drawn: Sequence[Drawn], cut: _Cut, settings: Settings) -> str:
    """What a note adds if too few prompts have a reliable estimate."""
    if _most_are_reliable(reliable, drawn):
        return ""
    return (
        f" Do not rely on these figures: the estimate is reliable for {reliable} of {len(drawn)} prompts only. The "
        f"larger the exponent k / beta is, here {cut.k.value / settings.beta:.3g}, and the longer the completions are, "
        "the more particles are needed. A larger `beta` or a smaller `max_new_tokens` helps."
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
