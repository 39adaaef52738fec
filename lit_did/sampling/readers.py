"""Language models, and functions of prefixes, that read token by token and keep what they have read."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Sequence
from operator import index
from typing import Any

import torch
from torch import Tensor, nn

from lit_did.functional.enumeration import NextToken
from lit_did.models.loading import (
    check_adapter_is_all_that_trains,
    check_positions_are_kept,
    check_same_vocabulary,
    check_separate,
    is_peft,
)
from lit_did.models.measuring import unwrapped
from lit_did.models.quiet import adapter_off, evaluating
from lit_did.ops.reference import LARGEST_LOGIT

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def unmasked(logits: Tensor) -> Tensor:
    """`logits` with -inf in place of what masks such as -1e9 and finfo.min mean, as the operators have it."""
    return logits.masked_fill(logits < -LARGEST_LOGIT, -torch.inf)


class CachedModel:
    """A transformers causal language model that reads token by token, in eval mode, without gradients.

    It keeps the model's own cache (`past_key_values`). A model without one, or whose cache fails, reads everything
    again at every step, each row without its padding. That is slower, and just as right. One warning says so.

    Args:
        model: A causal language model. Its own mode is put back after every read.
        without_adapter: Reads with `model`, a PeftModel, without its adapter.
        cache: False: reads everything again at every step.

    Raises:
        TypeError: `model` is no module.
        ValueError: `without_adapter`, and `model` is no PeftModel; or its adapter is made of virtual tokens.
    """

    def __init__(self, model: nn.Module, *, without_adapter: bool = False, cache: bool = True) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"Expected a causal language model, but got {type(model).__name__}.")
        self._model = unwrapped(model)
        if without_adapter and not is_peft(self._model):
            raise ValueError(f"Expected a PeftModel with `without_adapter`, but got {type(self._model).__name__}.")
        if is_peft(self._model):
            check_positions_are_kept(self._model)
        self._without_adapter = without_adapter
        self.max_tokens = _max_tokens(self._model)
        inner = self._model.get_base_model() if is_peft(self._model) else self._model
        self.name = type(inner).__name__
        self._accepts = inspect.signature(inner.forward).parameters
        takes_any = any(parameter.kind == parameter.VAR_KEYWORD for parameter in self._accepts.values())
        if "input_ids" not in self._accepts and not takes_any:
            raise TypeError(f"Expected a causal language model, which takes `input_ids`, but got {self.name}.")
        self.caches = cache and "past_key_values" in self._accepts
        self._told = not cache  # that everything is read again
        self._cache = None
        self._input_ids: Tensor | None = None  # [n, t], all that was read
        self._mask: Tensor | None = None  # [n, t]

    def read(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits [n, V] of the token that follows, once `input_ids` [n, t], t >= 1, are read too.

        Args:
            input_ids: int64, on any device.
            attention_mask: [n, t], 0 where a token is padding; without it none is.
        """
        device = next(self._model.parameters()).device
        input_ids = input_ids.to(device)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(device).long()
        first = self._input_ids is None
        self._input_ids = input_ids if first else torch.cat([self._input_ids, input_ids], 1)
        self._mask = mask if first else torch.cat([self._mask, mask], 1)
        if self._input_ids.shape[1] > self.max_tokens:
            raise ValueError(
                f"Expected prompt and completion to be at most {self.max_tokens} tokens, the positions of "
                f"{type(self._model).__name__}, but got {self._input_ids.shape[1]}."
            )
        if self.caches:
            try:
                return self._read_on(self._input_ids if self._cache is None else input_ids)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # of a model whose cache is not for this
                self.give_up_cache(f"cannot read on with its cache ({type(error).__name__}: {error})")
        if not self._told:
            self.give_up_cache("has no cache of keys and values")
        return self._read_whole()

    def select(self, rows: Tensor) -> None:
        """Goes on with `rows` [m] int64 of what was read, in their order; a row may come several times."""
        rows = rows.to(self._input_ids.device)
        self._input_ids, self._mask = self._input_ids[rows], self._mask[rows]
        if self._cache is not None:
            try:
                self._cache.reorder_cache(rows)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                self.give_up_cache(f"cannot reorder its cache ({type(error).__name__}: {error})")

    def give_up_cache(self, reason: str) -> None:
        """Reads everything again from here on."""
        self.caches, self._cache, self._told = False, None, True
        warn_without_cache(self.name, reason)

    def agrees(self, logits: Tensor) -> bool:
        """Whether the model's forward pass over a whole row gives these logits [n, V] of the last `read`.

        The row is the one with the most padding, and is read without it.
        """
        row = int(self._mask.sum(1).argmin())
        whole = self._forward(self._input_ids[row][self._mask[row] > 0][None])[0, -1]
        return self._close(*(unmasked(x.double()).log_softmax(-1) for x in (logits[row], whole)))

    def agrees_on(self, prompt: Tensor, completion: Tensor, log_prob: Tensor) -> bool:
        """Whether one forward pass gives the log-probability of `completion` [m] after `prompt` [1, t]."""
        row = torch.cat([prompt[0], completion])[None].to(next(self._model.parameters()).device)
        length = len(completion)
        logits = unmasked(self._forward(row[:, :-1], length)[0, -length:].double())
        return self._close(log_prob, logits.log_softmax(-1).gather(1, row[0, -length:, None]).sum().cpu())

    def _close(self, values: Tensor, expected: Tensor) -> bool:
        """Whether log-probabilities differ by rounding alone."""
        parameter = next(self._model.parameters())
        # A model in half precision rounds other sums when it reads on than when it reads everything.
        half = parameter.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled(parameter.device.type)
        finite = expected.isfinite()
        scale = expected[finite].abs().max() if finite.any() else 1.0
        return bool(((values - expected)[finite].abs() <= (5e-2 if half else 1e-3) * scale).all())

    def _read_on(self, input_ids: Tensor) -> Tensor:
        inputs = {"attention_mask": self._mask, "past_key_values": self._cache, "use_cache": True}
        # Models count positions themselves, each in its own way. Padding on the left takes none.
        if "position_ids" in self._accepts and not self._mask.all():
            inputs["position_ids"] = (self._mask.cumsum(1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        outputs = self._run(input_ids=input_ids, **inputs, **self._options(1))
        self._cache = getattr(outputs, "past_key_values", None)
        if self._cache is None:
            self.give_up_cache("returns no cache")
        return outputs.logits[:, -1]

    def _read_whole(self) -> Tensor:
        if self._mask.all():
            return self._forward(self._input_ids)[:, -1]
        rows = zip(self._input_ids, self._mask, strict=True)
        return torch.cat([self._forward(row[mask > 0][None])[:, -1] for row, mask in rows])

    def _forward(self, input_ids: Tensor, keep: int = 1) -> Tensor:
        """The model's own logits [n, T, V], of the last `keep` positions at least."""
        options = {"use_cache": False} if "use_cache" in self._accepts else {}
        return self._run(input_ids=input_ids, **options, **self._options(keep)).logits

    def _options(self, keep: int) -> dict[str, Any]:
        options = {"logits_to_keep": keep, "output_router_logits": False}  # the last: no load-balancing loss here
        return {name: value for name, value in options.items() if name in self._accepts}

    def _run(self, **inputs: Any) -> Any:
        with adapter_off(self._model) if self._without_adapter else evaluating(self._model):
            return self._model(**inputs)


def warn_without_cache(name: str, reason: str) -> None:
    """Warns that a model reads everything again at every step."""
    warnings.warn(
        f"{name} {reason}, so it reads every prefix whole at every step. Results are right, but sampling is slower.",
        stacklevel=3,
    )


class CachedFunction:
    """A function from prefixes [n, t] to logits [n, V], read like a `CachedModel`; it begins with one empty prefix."""

    def __init__(self, function: NextToken, name: str) -> None:
        self._function, self._name = function, name
        self._prefixes = torch.zeros(1, 0, dtype=torch.long)

    def read(self, tokens: Tensor) -> Tensor:
        """Logits [n, V] once `tokens` [n, t] are read too."""
        self._prefixes = torch.cat([self._prefixes, tokens], 1)
        logits = self._function(self._prefixes)
        if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.shape[:-1] != tokens.shape[:1]:
            got = f"{logits.dtype} {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(
                f"Expected `{self._name}` to return floats [{len(tokens)}, V] of {len(tokens)} prefixes, but got {got}."
            )
        return logits

    def select(self, rows: Tensor) -> None:
        """Goes on with the prefixes `rows` [m] int64."""
        self._prefixes = self._prefixes[rows]


def as_readers(
    policy: nn.Module | NextToken,
    reference: nn.Module | NextToken | None,
    prompt: Tensor | Sequence[int] | None,
    max_new_tokens: int,
    *,
    cache: bool = True,
) -> tuple[CachedModel, CachedModel, Tensor] | tuple[CachedFunction, CachedFunction, Tensor]:
    """Both models ready to read, and the prompt [1, t] to read first. Raises what `sample_did` says.

    `cache`: as in `CachedModel`.
    """
    if not isinstance(policy, nn.Module):
        for name, model in (("policy", policy), ("reference", reference)):
            if not callable(model) or isinstance(model, nn.Module):
                raise TypeError(
                    f"Expected `{name}` to be a function of prefixes, or both to be language models, "
                    f"but got {type(model).__name__}."
                )
        if prompt is not None:
            raise ValueError("Expected `prompt` to be None with functions, which know theirs, but got one.")
        return CachedFunction(policy, "policy"), CachedFunction(reference, "reference"), torch.zeros(1, 0).long()
    if reference is None:
        if not is_peft(unwrapped(policy)):
            raise ValueError("Expected `reference`, or a PeftModel as `policy`, but got neither.")
        check_adapter_is_all_that_trains(unwrapped(policy))
        second = CachedModel(policy, without_adapter=True, cache=cache)
    elif not isinstance(reference, nn.Module):
        raise TypeError(f"Expected `reference` to be a language model, but got {type(reference).__name__}.")
    else:
        check_separate(unwrapped(policy), unwrapped(reference))
        check_same_vocabulary(unwrapped(policy), unwrapped(reference))
        second = CachedModel(reference, cache=cache)
    first, prompt = CachedModel(policy, cache=cache), _checked_prompt(prompt)
    reference = policy if reference is None else reference
    for name, model, reader in (("policy", policy, first), ("reference", reference, second)):
        check_token_ids("prompt", prompt, model, f"`{name}`")
        if prompt.shape[1] + max_new_tokens - 1 > reader.max_tokens:  # the last token is not read
            raise ValueError(
                f"Expected `prompt` and `max_new_tokens` to be at most {reader.max_tokens + 1} tokens together, as "
                f"`{name}` has {reader.max_tokens} positions, but got {prompt.shape[1]} and {max_new_tokens}."
            )
    return first, second, prompt


def check_token_ids(argument: str, token_ids: Tensor, model: nn.Module, name: str) -> None:
    """Raises ValueError if `token_ids` are not of the vocabulary of `model`: a GPU's own failure names nothing."""
    embeddings = unwrapped(model).get_input_embeddings() if hasattr(unwrapped(model), "get_input_embeddings") else None
    size = getattr(embeddings, "num_embeddings", None)
    least, largest = (int(value) for value in token_ids.aminmax())
    if least < 0 or (size is not None and largest >= size):
        below = "" if size is None else f" and below {size}, the vocabulary of {name}"
        got = least if least < 0 else largest
        raise ValueError(f"Expected `{argument}` to be token ids of at least 0{below}, but got {got}.")


def _checked_prompt(prompt: Tensor | Sequence[int] | None) -> Tensor:
    """[1, t] int64."""
    if prompt is None:
        raise ValueError("Expected `prompt`, the token ids that completions follow, but got None.")
    if not isinstance(prompt, Tensor | list | tuple):
        raise TypeError(
            "Expected `prompt` to be token ids, a tensor or a list (of a BatchEncoding its `input_ids`), "
            f"but got {type(prompt).__name__}."
        )
    expected = "Expected `prompt` to be integers of shape [t] or [1, t], t >= 1, but got"
    try:
        token_ids = torch.as_tensor(prompt)
    except (ValueError, TypeError, RuntimeError, OverflowError):  # words, None, lists of unequal lengths, huge numbers
        shown = repr(prompt)
        raise ValueError(f"{expected} {shown[:100]}{'...' if len(shown) > 100 else ''}.") from None
    token_ids = token_ids[None] if token_ids.dim() == 1 else token_ids
    if token_ids.dim() != 2 or len(token_ids) != 1 or not token_ids.shape[1] or token_ids.dtype not in INTEGERS:
        raise ValueError(f"{expected} {token_ids.dtype} {tuple(token_ids.shape)}.")
    return token_ids.long()


def _max_tokens(model: nn.Module) -> float:
    """How many tokens `model` can read: infinite, unless it looks positions up in a table."""
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if not isinstance(limit, int) or not hasattr(model, "get_input_embeddings"):
        return math.inf
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m is not model.get_input_embeddings()]
    of_positions = any(table.num_embeddings - limit in (0, 2) for table in tables)  # OPT's begins at 2
    return limit if of_positions else math.inf


def ends_of(policy: nn.Module | NextToken, eos_token_id: int | Sequence[int] | str | None) -> list[int]:
    """The tokens that end a completion: `eos_token_id`, or with "auto" those of the policy's `generation_config`.

    Raises:
        TypeError: `eos_token_id` is something else.
    """
    ends = eos_token_id
    if isinstance(eos_token_id, str) and eos_token_id == "auto":
        config = getattr(unwrapped(policy), "generation_config", None) if isinstance(policy, nn.Module) else None
        ends = getattr(config, "eos_token_id", None)
    if ends is None:
        return []
    if isinstance(ends, bool):
        raise TypeError(f'Expected `eos_token_id` to be a token id, several, None or "auto", but got {eos_token_id!r}.')
    try:
        return sorted({index(token) for token in ([ends] if hasattr(ends, "__index__") or ends == "" else ends)})
    except TypeError:
        raise TypeError(
            f'Expected `eos_token_id` to be a token id, several, None or "auto", but got {eos_token_id!r}.'
        ) from None
