"""Language models and functions of prefixes that read token by token and keep what they have read."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Sequence
from operator import index
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lit_did.functional.enumeration import NextToken
from lit_did.models.forward import num_positions
from lit_did.models.loading import (
    check_adapter_is_all_that_trains,
    check_positions_are_kept,
    check_same_vocabulary,
    check_separate,
)
from lit_did.models.quiet import adapter_off, evaluating
from lit_did.models.wrappers import inner, is_peft, unwrapped
from lit_did.ops.reference import LARGEST_LOGIT

CACHES = ("cache", "past_key_values")  # the name since transformers 5.24, and the one before
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def unmasked(logits: Tensor) -> Tensor:
    """`logits` with -inf in place of masks such as -1e9 and finfo.min, as in the operators."""
    return logits.masked_fill(logits < -LARGEST_LOGIT, -torch.inf)


class CachedModel:
    """A transformers causal language model that reads token by token, in eval mode, without gradients.

    It keeps the model's own cache of keys and values. A model without a cache, or whose cache fails, reads everything
    again at every step, each row without its padding. The results are the same, but it is slower, so one warning says
    so.

    Args:
        model: A causal language model. Its train or eval mode is restored after every read.
        without_adapter: Whether to read `model`, a PeftModel, without its adapter.
        cache: Whether to use the model's cache.

    Raises:
        TypeError: `model` is no causal language model.
        ValueError: The adapter of `model` is made of virtual tokens.
    """

    def __init__(self, model: nn.Module, *, without_adapter: bool = False, cache: bool = True) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"Expected a causal language model, but got {type(model).__name__}.")
        self._model: Any = unwrapped(model)
        if is_peft(self._model):
            check_positions_are_kept(self._model)
        self._without_adapter = without_adapter
        self.max_tokens = _max_tokens(self._model)
        base = inner(self._model)
        self.name = type(base).__name__
        self._accepts = inspect.signature(base.forward).parameters
        takes_any = any(parameter.kind == parameter.VAR_KEYWORD for parameter in self._accepts.values())
        if "input_ids" not in self._accepts and not takes_any:
            raise TypeError(f"Expected a causal language model, which takes `input_ids`, but got {self.name}.")
        self._cache_name = next((name for name in CACHES if name in self._accepts), "")
        self.caches = cache and bool(self._cache_name)
        self.has_cached = False
        """whether any logits so far came from a cache"""
        self._warned = not cache
        self._cache: Any = None
        self._input_ids = torch.empty(0, 0, dtype=torch.long)  # [n, t], all that was read
        self._mask = self._input_ids  # [n, t]

    def check_prompt(self, prompt: Tensor, max_new_tokens: int, name: str) -> None:
        """Raises ValueError if the model, which is the argument `name`, cannot read a prompt and what follows it."""
        check_token_ids("prompt", prompt, self._model, f"`{name}`")
        if len(prompt) + max_new_tokens - 1 > self.max_tokens:  # the last token is not read
            raise ValueError(
                f"Expected `prompt` and `max_new_tokens` to be at most {self.max_tokens + 1} tokens together "
                f"because `{name}` has {self.max_tokens} positions, but got {len(prompt)} and {max_new_tokens}."
            )

    def read(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Reads on.

        Args:
            input_ids: [n, t] int64 on any device: the tokens that follow those read so far.
            attention_mask: [n, t] 0 where a token is padding. None: no token is.

        Returns:
            [n, V] logits of the next token.
        """
        device = next(self._model.parameters()).device
        input_ids = input_ids.to(device)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(device).long()
        first = not self._input_ids.numel()
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
        if not self._warned:
            self.give_up_cache("has no cache of keys and values")
        return self._read_whole()

    def select(self, rows: Tensor) -> None:
        """Goes on with `rows` [m] int64 of what was read, in this order. A row may occur several times."""
        rows = rows.to(self._input_ids.device)
        self._input_ids, self._mask = self._input_ids[rows], self._mask[rows]
        if self._cache is not None:
            try:
                self._cache.reorder_cache(rows)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                self.give_up_cache(f"cannot reorder its cache ({type(error).__name__}: {error})")

    def give_up_cache(self, reason: str | None) -> None:
        """Reads everything again from here on. Warns unless `reason` is None."""
        self.caches, self._cache, self._warned = False, None, True
        if reason is not None:
            warn_without_cache(self.name, reason)

    def agrees(self, logits: Tensor, length: int | None = None) -> bool:
        """Whether the model's forward pass over a whole row gives the logits that a read gave.

        The row is the one with the most padding, and is read without it.

        Args:
            logits: [n, V] of the last read, or of the read that ended at `length` tokens.
            length: How many tokens were read then.
        """
        row = int(self._mask.sum(1).argmin())
        token_ids, mask = self._input_ids[row][:length], self._mask[row][:length]
        whole = self._forward(token_ids[mask > 0][None])[0, -1]
        return self._close(*(unmasked(x.double()).log_softmax(-1) for x in (logits[row], whole)))

    def agrees_on(self, prompt: Tensor, completion: Tensor, log_prob: Tensor) -> bool:
        """Whether one forward pass gives the log-probability of `completion` [m] after `prompt` [t]."""
        row = torch.cat([prompt, completion])[None].to(next(self._model.parameters()).device)
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
        inputs = {"attention_mask": self._mask, self._cache_name: self._cache, "use_cache": True}
        # Models count positions themselves, each in its own way. Padding on the left takes none.
        if "position_ids" in self._accepts and not self._mask.all():
            inputs["position_ids"] = (self._mask.cumsum(1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        outputs = self._run(input_ids=input_ids, **inputs, **self._options(1))
        self.has_cached |= self._cache is not None
        given = (getattr(outputs, name, None) for name in CACHES)
        self._cache = next((cache for cache in given if cache is not None), None)
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
        f"{name} {reason}, so it reads the whole prefix again at every step. Results are right, but sampling "
        "is slower.",
        stacklevel=3,
    )


def warn_without_padding(name: str) -> None:
    """Warns that prompts of different lengths are read one after the other."""
    warnings.warn(
        f"{name} gives other results for prompts that are padded to one length than in its own forward pass, so it "
        "reads prompts of different lengths one after the other. Results are right, but sampling is slower.",
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
    prompts: Sequence[Tensor] | None,
    max_new_tokens: int,
    *,
    cache: bool = True,
) -> tuple[CachedModel, CachedModel, tuple[Tensor, ...]] | tuple[CachedFunction, CachedFunction, tuple[Tensor, ...]]:
    """Both models, ready to read, and what to read first: the arguments of `read`.

    Args:
        policy: A causal language model or a function of prefixes.
        reference: The same, or None for a PeftModel that is read without its adapter.
        prompts: For language models what `checked_prompt` returns, once for each row. They are padded on the left to
            the longest. None for functions.
        max_new_tokens: How many tokens will follow a prompt.
        cache: Whether language models use their caches.

    Raises:
        TypeError: A model has the wrong type.
        ValueError: The models do not belong together, or a prompt does not fit them.
    """
    if not isinstance(policy, nn.Module):
        functions = []
        for name, function in (("policy", policy), ("reference", reference)):
            if not callable(function) or isinstance(function, nn.Module):
                raise TypeError(
                    f"Expected `{name}` to be a function of prefixes, or both to be language models, "
                    f"but got {type(function).__name__}."
                )
            functions.append(CachedFunction(function, name))
        if prompts is not None:
            raise ValueError("Expected `prompt` to be None because the models are functions, but got one.")
        return functions[0], functions[1], (torch.zeros(1, 0).long(),)
    first, second = model_readers(policy, reference, cache=cache)
    if prompts is None:
        raise ValueError("Expected `prompt` to be the token ids that completions follow, but got None.")
    for prompt in prompts:
        first.check_prompt(prompt, max_new_tokens, "policy")
        second.check_prompt(prompt, max_new_tokens, "reference")
    return first, second, left_padded(prompts)


def as_reader(
    model: nn.Module | NextToken,
    name: str,
    beside: nn.Module | NextToken,
    prompts: Sequence[Tensor] | None,
    max_new_tokens: int,
    *,
    cache: bool = True,
) -> CachedModel | CachedFunction:
    """A further model, ready to read what the two of `as_readers` read. Errors are theirs.

    Args:
        model: It is of the kind of `beside`.
        name: The argument that it is, for errors.
        beside: The policy.
        prompts: As for `as_readers`.
        max_new_tokens: As for `as_readers`.
        cache: As for `as_readers`.
    """
    if isinstance(model, nn.Module) != isinstance(beside, nn.Module) or not callable(model):
        kind = "a causal language model" if isinstance(beside, nn.Module) else "a function of prefixes"
        raise TypeError(f"Expected `{name}` to be {kind}, as `policy` is, but got {type(model).__name__}.")
    if not isinstance(model, nn.Module):
        return CachedFunction(model, name)
    reader = CachedModel(model, cache=cache)
    for prompt in prompts or ():
        reader.check_prompt(prompt, max_new_tokens, name)
    return reader


def model_readers(policy: nn.Module, reference: Any, *, cache: bool = True) -> tuple[CachedModel, CachedModel]:
    """Two language models, ready to read. Arguments and errors are those of `as_readers`."""
    model, without_adapter = second_model(policy, reference)
    return CachedModel(policy, cache=cache), CachedModel(model, without_adapter=without_adapter, cache=cache)


def left_padded(prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """[n, t] token ids of `prompts` [t], 0 where they are padded, and their attention mask."""
    ones = [torch.ones_like(prompt) for prompt in prompts]
    token_ids, mask = (pad_sequence(list(rows), True, padding_side="left") for rows in (prompts, ones))
    return token_ids, mask


def second_model(policy: Any, reference: Any) -> tuple[nn.Module, bool]:
    """The model to run as the reference of `policy`, and whether to run it without its adapter.

    Raises:
        TypeError: A model is no module.
        ValueError: `reference` is None and `policy` cannot be its own reference, or the two do not belong together.
    """
    for name, model in (("policy", policy), ("reference", policy if reference is None else reference)):
        if not isinstance(model, nn.Module):
            raise TypeError(f"Expected `{name}` to be a causal language model, but got {type(model).__name__}.")
    if reference is None:
        if not is_peft(unwrapped(policy)):
            raise ValueError(
                "Expected `reference` to be a causal language model, but got None, and `policy` is "
                f"{type(unwrapped(policy)).__name__}. Only a PeftModel can be its own reference, without its adapter."
            )
        check_adapter_is_all_that_trains(unwrapped(policy))
        return policy, True
    check_separate(unwrapped(policy), unwrapped(reference))
    check_same_vocabulary(unwrapped(policy), unwrapped(reference))
    return reference, False


def check_token_ids(argument: str, token_ids: Tensor, model: nn.Module, name: str) -> None:
    """Raises ValueError if `token_ids` are outside the vocabulary of `model`: a GPU's own error names no argument."""
    plain: Any = unwrapped(model)
    embeddings = plain.get_input_embeddings() if hasattr(plain, "get_input_embeddings") else None
    size = getattr(embeddings, "num_embeddings", None)
    least, largest = (int(value) for value in token_ids.aminmax())
    if least < 0 or (size is not None and largest >= size):
        below = "" if size is None else f" and below {size}, the vocabulary of {name}"
        got = least if least < 0 else largest
        raise ValueError(f"Expected `{argument}` to be token ids of at least 0{below}, but got {got}.")


def checked_prompt(prompt: Tensor | Sequence[int]) -> Tensor:
    """[t] int64, on the CPU.

    Raises:
        TypeError: `prompt` is no tensor and no list.
        ValueError: It does not hold integers, or has another shape than [t] or [1, t].
    """
    if not isinstance(prompt, Tensor | list | tuple):
        raise TypeError(
            f"Expected `prompt` to be token ids, a tensor or a list, but got {type(prompt).__name__}. Pass the "
            "`input_ids` of a BatchEncoding."
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
    return token_ids[0].cpu().long()


def _max_tokens(model: Any) -> float:
    """How many tokens `model` can read: infinite, unless it looks positions up in a table."""
    limit = num_positions(model)
    if limit == math.inf or not hasattr(model, "get_input_embeddings"):
        return math.inf
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m is not model.get_input_embeddings()]
    of_positions = any(table.num_embeddings - limit in (0, 2) for table in tables)  # OPT's begins at 2
    return limit if of_positions else math.inf


def ends_of(policy: nn.Module | NextToken, eos_token_id: int | Sequence[int] | Literal["auto"] | None) -> list[int]:
    """The tokens that end a completion: `eos_token_id`, or with "auto" those of the policy's `generation_config`.

    Raises:
        TypeError: `eos_token_id` is something else.
    """
    expected = f'Expected `eos_token_id` to be a token id, several, None or "auto", but got {eos_token_id!r}.'
    ends: Any = eos_token_id
    if isinstance(eos_token_id, str) and eos_token_id == "auto":
        config = getattr(unwrapped(policy), "generation_config", None) if isinstance(policy, nn.Module) else None
        ends = getattr(config, "eos_token_id", None)
    if ends is None:
        return []
    if isinstance(ends, bool):
        raise TypeError(expected)
    try:
        return sorted({index(token) for token in ([ends] if hasattr(ends, "__index__") or ends == "" else ends)})
    except TypeError:
        raise TypeError(expected) from None
